"""The card of a saved directory, README.md, in the hub's form: facts, what was done, how to load.

`write_card` writes it as the directory is saved. A run that measures the saved model adds its
figures by `add_to_card`, an export says by `add_export_to_card` which program read it. Facts of the
base's card that hold for the pruned model too are kept; its text describes another model.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.repocard import metadata_load, metadata_save

from prunelight.planning.plan import Plan
from prunelight.runtime.files.atomic_files import atomic_replacement
from prunelight.runtime.files.checksums import file_checksum, sealed, unsealed

log = logging.getLogger(__name__)

CARD = "README.md"

_KEPT_FACTS = (
    "license",
    "license_name",
    "license_link",
    "language",
    "base_model",
    "datasets",
    "pipeline_tag",
    "library_name",
    "tags",
)
# Comments between which stands what a run measured, and what was exported.
_FIGURES = ("<!-- figures of the run -->", "<!-- end of the figures -->")
_EXPORTS = ("<!-- exports -->", "<!-- end of the exports -->")
_GGUF = "The dense weights were read from the GGUF file"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def write_card(
    directory: Path,
    base_card: Path | None,
    base: str,
    loads_in: Mapping[str, str],
    gguf_file: str | None = None,
) -> None:
    """Write the card of a saved directory; its plans are read from `plan*.json` there.

    Args:
        directory: what is saved, with config.json and plans.
        base_card: card of the model that was pruned, if it has one.
        base: hub id of that model; "" if it has none.
        loads_in: program -> whether it reads the model.
        gguf_file: file that the base's weights were read from, if it was a GGUF.
    """
    files = sorted(directory.glob("plan*.json"), key=lambda file: (len(file.name), file.name))
    plans = {file.name: plan for file in files if (plan := _read_plan(file)) is not None}
    facts = _card_facts({} if base_card is None else facts_of(base_card), base, [*plans.values()])
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    of = facts.get("base_model")
    of = of[0] if isinstance(of, list) and of else of
    title = f"{str(of).rpartition('/')[2]}, pruned" if of else "A pruned language model"
    parts = [
        f"# {title}",
        f"Pruned{f' from `{of}`' if of else ''} with prunelight."
        + _on_weights(base_card, gguf_file),
        *(["## What was done", _what_was_done(plans)] if plans else []),
        "\n".join(_FIGURES),
        "## How to load it",
        _how_to_load(config),
    ]
    if loads_in:
        answers = "\n".join(f"- {engine}: {answer}" for engine, answer in loads_in.items())
        parts += ["## Which programs read it", answers]
    parts.append("\n".join(_EXPORTS))
    card = directory / CARD
    card.write_text("\n" + "\n\n".join(parts) + "\n", encoding="utf-8")
    metadata_save(card, facts)


def add_to_card(directory: Path, figures: str, marker: str = "prunelight.json") -> None:
    """Put figures into the card of a saved directory, and its new checksum into the marker.

    The card is replaced whole, then the marker. Figures that were added before are replaced.

    Args:
        directory: that `save` wrote; one without a card of ours stays as it is.
        figures: Markdown.
        marker: file with the checksums of the directory.
    """
    _replace_part(directory, _FIGURES, lambda _: figures.strip(), marker)


def add_export_to_card(
    directory: Path, name: str, told: str, marker: str = "prunelight.json"
) -> None:
    """Put an export of a saved directory into its card; one of the same name is replaced.

    Args:
        directory: that `save` wrote; one without a card of ours stays as it is.
        name: of the export, such as "gguf, q8_0".
        told: which program read it, and what that gave, in one line.
        marker: file with the checksums of the directory.
    """

    def with_export(before: str) -> str:
        exports = [line for line in before.splitlines() if line.startswith("- ")]
        others = [line for line in exports if not line.startswith(f"- {name}: ")]
        return "\n".join(["## Exports", "", *others, f"- {name}: {told}"])

    _replace_part(directory, _EXPORTS, with_export, marker)


def _replace_part(
    directory: Path, part: tuple[str, str], change: Callable[[str], str], marker: str
) -> None:
    """Replace what stands between two comments of a card; then its checksum in the marker."""
    card = directory / CARD
    begin, end = part
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    before, has_begin, rest = text.partition(begin)
    inside, has_end, after = rest.partition(end)
    if not has_begin or not has_end:
        log.warning("%s has no place for %s: it is left as it is", card, _name_of(part))
        return
    told = change(inside.strip())
    for comment in part:
        told = told.replace(comment, "")
    with atomic_replacement(card) as temporary:
        temporary.write_text(f"{before}{begin}\n\n{told}\n\n{end}{after}", encoding="utf-8")
    place = directory / marker
    if not place.is_file():
        return
    values = unsealed(place.read_text(encoding="utf-8"))
    if CARD in values.get("files", {}):
        values["files"][CARD] = file_checksum(card)
        with atomic_replacement(place) as temporary:
            temporary.write_text(sealed(values), encoding="utf-8")


def _name_of(part: tuple[str, str]) -> str:
    return part[1].removeprefix("<!-- end of the ").removesuffix(" -->")


def facts_of(card: Path) -> dict[str, Any]:
    """Return the facts in the first lines of a model card; none, if it has none."""
    try:
        return metadata_load(card) or {}
    except OSError:
        return {}
    except Exception as error:  # of YAML; a card of others must not end a save
        log.warning("%s is not read: %s", card.name, str(error).partition("\n")[0])
        return {}


def is_local_path(value: Any) -> bool:
    """Return whether a value is a path of this machine."""
    return isinstance(value, str) and len(value) > 1 and Path(value).is_absolute()


def forget_local_base(card: Path) -> None:
    """Remove a base that is a path of this machine from the card that peft wrote, in place."""
    facts = facts_of(card)
    if not is_local_path(base := facts.get("base_model")):
        return
    tags = [tag for tag in facts.get("tags") or [] if str(base) not in tag]
    metadata_save(card, {**{k: v for k, v in facts.items() if k != "base_model"}, "tags": tags})


def _card_facts(known: Mapping[str, Any], base: str, plans: Sequence[Plan]) -> dict[str, Any]:
    """Return the facts of the card: those of the base that still hold, and ours."""
    kept = {name: known[name] for name in _KEPT_FACTS if known.get(name)}
    kept = {name: value for name, value in kept.items() if not is_local_path(value)}
    if base and _HUB_ID.fullmatch(base) and not Path(base).exists():
        kept["base_model"] = base
    tags = kept.get("tags") or []
    own = ["prunelight", "pruned", *(plan.method.lower() for plan in plans)] if plans else []
    tags = [*([tags] if isinstance(tags, str) else tags), *(own or ["prunelight"])]
    kept["tags"] = list(dict.fromkeys(tags))
    return {"library_name": "transformers", "pipeline_tag": "text-generation", **kept}


def _on_weights(base_card: Path | None, gguf_file: str | None) -> str:
    """Return the word that the dense weights were de-quantized, also where an earlier card says so.

    Figures of such a model are not those of the base in full precision.
    """
    if gguf_file is not None:
        return f" {_GGUF} `{gguf_file}`, which may hold fewer bits, and converted."
    try:
        text = "" if base_card is None else base_card.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
    told = re.search(rf"{re.escape(_GGUF)} `[^`\n]*`[^\n.]*\.", text)
    return f" {told[0]}" if told else ""


def _read_plan(file: Path) -> Plan | None:
    """Return a plan; None for a file of that name which the caller gave, and which is none."""
    try:
        return Plan.load(file)
    except (ValueError, TypeError, KeyError, OSError) as error:
        log.warning("%s is not told of in the card: %s", file.name, error)
        return None


def _what_was_done(plans: Mapping[str, Plan]) -> str:
    lines = []
    for name, plan in plans.items():
        done = [text for step in plan.steps for text in _words(step, plan)]
        lines.append(f"- {plan.method}: {'; '.join(done) or 'nothing'} (`{name}`)")
    lines.append("\nLayers are those of the dense model. Each plan says what was decided and why.")
    return "\n".join(lines)


def _words(step: Any, plan: Plan) -> list[str]:
    """Return in words what a step does."""
    merged = [f"layers {g[0]} to {g[-1]} merged into one" for g in step.merged_groups]
    gone = [] if merged else sorted(step.removed)
    texts = [f"decoder layers removed: {', '.join(map(str, gone))}"] if gone else merged
    for part, layers in step.dropped_sublayers.items():
        if layers:
            texts.append(f"{part} dropped in layers {', '.join(map(str, sorted(layers)))}")
    try:
        return texts + step.nominal(plan)
    except (KeyError, TypeError):  # a plan by hand need not say how wide its model is
        return texts or [step.kind.replace("_", " ")]


def _how_to_load(config: Mapping[str, Any]) -> str:
    own_class = str(config.get("model_type", "")).startswith("prunelight_")
    remote = own_class and "auto_map" in config
    first = ["import prunelight  # its class: pip install prunelight"] if own_class else []
    lines = [
        *first,
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'name = "."  # this directory, or its name on the hub',
        "model = AutoModelForCausalLM.from_pretrained(name)",
        "tokenizer = AutoTokenizer.from_pretrained(name)",
    ]
    code = "```python\n" + "\n".join(lines) + "\n```"
    if not remote:
        return code
    return (
        f"{code}\n\nWithout prunelight: `from_pretrained(name, trust_remote_code=True)` runs the "
        "code that lies in this directory."
    )
