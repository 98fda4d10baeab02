"""Turns the record of one run into report.json, report.md, pictures and a console table.

What is reported is what travels between machines: changes against the dense model, time in units
of F (one forward of the calibration set through the dense model), memory in units of the
checkpoint and of one decoder layer. Measuring is not done here (see evaluation.py): this module
needs neither torch nor lightning and can render a report.json that another machine wrote.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

FORMAT = 1


@dataclass(frozen=True)
class Stage:
    """One measured state of the model; accuracy is next-token accuracy in [0, 1]."""

    name: str  # "dense" | "pruned" | "recovered"; the others are compared with "dense"
    num_layers: int
    parameters: int
    size_bytes: int  # of the weights on disk
    perplexity: float
    accuracy: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float


@dataclass(frozen=True)
class Cost:
    """What one phase of the run cost; peak memory is process RSS on CPU, allocated on CUDA."""

    name: str
    seconds: float
    forwards: float  # seconds in units of F
    peak_bytes: int
    reused: bool = False  # taken from an earlier run with the same fingerprint


@dataclass
class RunRecord:
    """All that a report says about one run; `plans` holds `Plan.to_dict()` of each callback."""

    model: str
    device: str
    dtype: str
    fingerprint: str  # of the pruned base
    plans: list[dict[str, Any]]
    stages: list[Stage]
    costs: list[Cost]
    checkpoint_bytes: int  # of the dense model
    layer_bytes: int  # of one dense decoder layer
    recovery: dict[str, Any]
    evaluation: dict[str, Any]
    verification: dict[str, str]  # directory -> how it was verified; the last one is the result
    versions: dict[str, str]
    warnings: list[str]
    forward_seconds: float = math.nan  # F on this device

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON data: NaN and infinities become "NaN", "Infinity" and "-Infinity".

        JSON has no such numbers and null would hide which it was; `float()` reads these strings.
        """
        text = json.dumps({"format": FORMAT, **asdict(self)}, default=str)
        return json.loads(text, parse_constant=str)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RunRecord:
        """The inverse of `to_dict`; raises ValueError for a record of another format."""
        if data.get("format") != FORMAT:
            raise ValueError(
                f"report format={data.get('format')!r} must be {FORMAT}; read it with the version "
                "of prunelight that wrote it"
            )
        text = re.sub(r'"(NaN|-?Infinity)"(?!:)', r"\1", json.dumps(data))
        values = {key: value for key, value in json.loads(text).items() if key != "format"}
        values["stages"] = [Stage(**stage) for stage in values["stages"]]
        values["costs"] = [Cost(**cost) for cost in values["costs"]]
        return cls(**values)


def summary_table(record: RunRecord) -> Table:
    """The before and after table for a console: one column a stage, costs in the caption."""
    costs = ["{}: {} F, peak {} checkpoints".format(*row) for row in _cost_rows(record)]
    table = Table(
        title=escape(f"{_methods(record)}: {record.model}"),
        caption=escape("\n".join(costs)),
        caption_justify="left",
    )
    for index, name in enumerate(["", *(stage.name for stage in record.stages)]):
        table.add_column(escape(name), justify="right" if index else "left")
    for row in _stage_rows(record):
        table.add_row(*map(escape, row))
    return table


def write_report(directory: Path, record: RunRecord) -> list[Path]:
    """Write report.json, layers.png (layers-2.png, ...) and report.md; returns their paths.

    Each file appears by a rename. The record is safe before anything is drawn, and report.md comes
    last, so it never names a picture that is not there. Paths in `record.verification` are
    relative to `directory`, which is created if needed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    names = ["report.json"]
    with _replacing(directory / names[0]) as temporary:
        text = json.dumps(record.to_dict(), indent=2, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")
    sections: list[str] = []
    for plan in record.plans:
        picture = f"layers-{len(names)}.png" if len(names) > 1 else "layers.png"
        if drawable := bool(_score_lists(plan)):
            plot_layers(plan, directory / picture)
            names.append(picture)
        sections += _plan_section(plan, picture if drawable else None)
    with _replacing(directory / "report.md") as temporary:
        temporary.write_text(_markdown(record, sections), encoding="utf-8")
    return [directory / name for name in (*names, "report.md")]


def plot_layers(plan: dict[str, Any], path: Path) -> None:
    """Draw the scores of a plan over the decoder layers, with the removed layers marked.

    Drawn is the first list of scores with one entry a layer, else the first list (the angular
    distance has one entry a window, at the window's first layer). The scale is logarithmic if all
    scores are positive and span more than a factor of 20. Raises ValueError without such a list.
    """
    from matplotlib.figure import Figure  # the object API: no pyplot, no global state

    lists, num_layers = _score_lists(plan), plan["model"]["num_hidden_layers"]
    if not lists:
        raise ValueError(
            f"scores={plan.get('scores')} of the {plan['method']} plan must hold a list of "
            "numbers to be drawn; skip the picture for this plan"
        )
    name = next((key for key in lists if len(lists[key]) == num_layers), next(iter(lists)))
    figure = Figure((min(max(7.0, 2.5 + 0.16 * num_layers), 13.0), 4.0), 150, layout="constrained")
    axes = figure.add_subplot()
    _draw_bars(axes, name, lists[name], removed=_removed(plan), num_layers=num_layers)
    model = plan["model"]["name"]
    model = model if len(model) <= 60 else f"...{model[-57:]}"
    axes.set_title(f"{plan['method']}: {model}\n{_nominal(plan)}", loc="left", fontsize=10)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    with _replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lstrip(".") or "png")


def _draw_bars(
    axes: Any, name: str, scores: list[float], *, removed: list[int], num_layers: int
) -> None:
    marked, labels, place = removed, ("kept", f"removed ({len(removed)})"), "decoder layer"
    if len(scores) < num_layers:
        marked, labels = removed[:1], ("score of a window", "first window taken")
        place = "decoder layer (a window's score stands at its first; removed layers shaded)"
    elif len(scores) > num_layers:
        marked, labels, removed, place = [], ("score", ""), [], f"entry of {name}"
    marked = [index for index in marked if index < len(scores)]
    plain = sorted(set(range(len(scores))) - set(marked))
    finite = [score for score in scores if math.isfinite(score)]
    heights = [score if math.isfinite(score) else math.nan for score in scores]  # inf breaks axes
    style = {"color": "#d55e00", "hatch": "////", "edgecolor": "white", "linewidth": 0}
    axes.bar(plain, [heights[index] for index in plain], label=labels[0], color="#0072b2")
    if marked:
        axes.bar(marked, [heights[index] for index in marked], label=labels[1], **style)
    for layer in removed:
        axes.axvspan(layer - 0.5, layer + 0.5, color="#faeadf", linewidth=0, zorder=0)
    unit = "nats" if {"nll", "kl"} & set(name.split("_")) else "dimensionless"
    if finite and min(finite) > 0 and max(finite) > 20 * min(finite):
        axes.set_yscale("log")
        axes.set_ylim(bottom=min(finite) / 2)  # so that the shortest bar is seen
        unit += ", log scale"
    axes.set_ylabel(f"{name.replace('_', ' ')} ({unit})")
    axes.set_xlabel(place)
    axes.set_xlim(-0.8, max(num_layers, len(scores)) - 0.2)
    axes.locator_params(axis="x", nbins=20, integer=True)
    axes.spines[["top", "right"]].set_visible(False)


def _fates(plan: dict[str, Any]) -> dict[int, str]:
    """What happened to each decoder layer that did not stay whole."""
    fates: dict[int, str] = {}
    for step in plan["steps"]:
        fates |= dict.fromkeys(step.get("layers", ()), "removed")
        for group in step.get("groups", ()):
            kept = group[-1] if step.get("merge") == "top" else group[0]
            fates |= {layer: f"merged into {kept}" for layer in group if layer != kept}
        for part in ("attention", "mlp"):
            for layer in step.get(part, ()):
                fates[layer] = f"{fates[layer]}, no {part}" if layer in fates else f"no {part}"
    return fates


def _removed(plan: dict[str, Any]) -> list[int]:
    return sorted(layer for layer, fate in _fates(plan).items() if not fate.startswith("no "))


def _score_lists(plan: dict[str, Any]) -> dict[str, list[float]]:
    lists = {name: x for name, x in (plan.get("scores") or {}).items() if isinstance(x, list) and x}
    return {
        name: [math.nan if score is None else float(score) for score in scores]
        for name, scores in lists.items()
        if all(isinstance(score, int | float | None) for score in scores)
    }


def _nominal(plan: dict[str, Any]) -> str:
    """The ratio in the method's own terms: of decoder layers, of width or of weights."""
    removed, num_layers = len(_removed(plan)), plan["model"]["num_hidden_layers"]
    if removed:
        share = f"{100 * removed / num_layers:.1f} %"
        return f"{removed} of {num_layers} decoder layers removed ({share})"
    named = [key for key in ("ratio", "slice_ratio", "sparsity") if key in plan["arguments"]]
    return ", ".join(f"{key} {plan['arguments'][key]}" for key in named) or "no layer removed"


def _plan_section(plan: dict[str, Any], picture: str | None) -> list[str]:
    """What one plan did and why; the long table of layers is folded away."""
    parts = [f"## {plan['method']}: {_nominal(plan)}"]
    for step in plan["steps"]:
        details = {key: value for key, value in step.items() if key != "kind"}
        parts.append(f"Step `{step['kind']}`:\n{_bullets(details)}")
        if step["kind"] == "sparsify":
            parts.append("The zeros are stored: the model is neither smaller nor faster for them.")
    calibration = {f"calibration {k}": v for k, v in (plan.get("calibration") or {}).items()}
    parts.append(f"Decided with:\n{_bullets({**plan['arguments'], **calibration})}")
    if picture:
        parts.append(f"![scores of the decoder layers]({picture})")
    fates, num_layers = _fates(plan), plan["model"]["num_hidden_layers"]
    lists = {name: x for name, x in _score_lists(plan).items() if len(x) <= num_layers}
    rows = []
    for layer in range(num_layers):
        scores = [f"{x[layer]:.4g}" if layer < len(x) else "" for x in lists.values()]
        bold = "**" if layer in fates else ""
        rows.append([f"{bold}{layer}{bold}", *scores, f"{bold}{fates.get(layer, 'kept')}{bold}"])
    names = [name + ("" if len(x) == num_layers else " from here") for name, x in lists.items()]
    table = _table(["layer", *(name.replace("_", " ") for name in names), "fate"], rows)
    title = f"<details><summary>All {num_layers} decoder layers</summary>"
    return [*parts, title, table, "</details>"] if lists or fates else parts


def _markdown(record: RunRecord, plan_sections: list[str]) -> str:
    parts = [f"# Pruning report: {record.model}", _result(record)]
    if record.warnings:
        parts.append("\n".join(["> [!WARNING]", *(f"> - {text}" for text in record.warnings)]))
    stages = [stage.name for stage in record.stages]
    parts += [_table(["", *stages], _stage_rows(record)), *plan_sections]
    if record.costs:
        head = ["phase", "time in F", "peak memory in checkpoints", "in decoder layers", "seconds"]
        parts += ["## Cost", _table(head, _cost_rows(record))]
        unit = record.forward_seconds
        parts.append(
            "F is one forward of the calibration set through the dense model"
            f"{f' ({unit:.3g} s here)' if math.isfinite(unit) else ''}. Peak memory is that of the "
            "whole process on a CPU, what torch allocated on CUDA."
        )
    where = {"device": record.device, "dtype": record.dtype, "fingerprint": record.fingerprint}
    for title, values, otherwise in (
        ("Recovery", record.recovery, "None: the weights were not trained after pruning."),
        ("Evaluation data", record.evaluation, "Not recorded."),
        ("Verification", record.verification, "No model was saved."),
        ("Versions", {**where, **record.versions}, ""),
    ):
        parts += [f"## {title}", _bullets(values) or otherwise]
    if record.verification:
        parts += ["## How to load the result", _loading(list(record.verification)[-1])]
    return "\n\n".join(parts) + "\n"


def _loading(name: str) -> str:
    return (
        "In the directory of this report:\n\n```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({json.dumps(name)})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(name)})\n```"
    )


def _count(value: float) -> str:
    power = min(int(math.log10(max(value, 1)) // 3), 4)
    return f"{value / 1000**power:.1f}{' KMBT'[power]}" if power else str(value)


def _decimal(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= value < 1e6 else f"{value:.4g}"


_FIGURES: tuple[
    tuple[str, str, Callable[[Any], str]], ...
] = (  # label, field of Stage, how a number is shown
    ("layers", "num_layers", str),
    ("parameters", "parameters", _count),
    ("size (MB)", "size_bytes", lambda value: f"{value / 1e6:,.1f}"),
    ("perplexity", "perplexity", _decimal),
    ("next-token accuracy", "accuracy", "{:.4f}".format),
    ("prefill tokens/s", "prefill_tokens_per_second", _decimal),
    ("decode tokens/s", "decode_tokens_per_second", _decimal),
)
_HEADLINE = ("layers", "parameters", "perplexity", "decode tokens/s")


def _result(record: RunRecord) -> str:
    """The run in one sentence, and the true share removed beside the nominal ratios."""
    if not record.stages:
        return "Nothing was measured."
    dense, last = _dense(record), record.stages[-1]
    told = [row for row in _stage_rows(record) if row[0] in _HEADLINE]
    if dense is None or dense is last:
        return f"The {last.name} model: {', '.join(f'{row[0]} {row[-1]}' for row in told)}."
    column = 1 + record.stages.index(dense)
    arrows = ", ".join(f"{row[0]} {row[column]} -> {row[-1]}" for row in told)
    true = 100 * (1 - last.parameters / max(dense.parameters, 1))
    nominal = " + ".join(_nominal(plan) for plan in record.plans) or "nothing pruned"
    return (
        f"{_methods(record)}, {dense.name} -> {last.name}: {arrows}.\n\n"
        f"- Nominal ratio: {nominal}\n- True share of all parameters removed: {true:.1f} %"
    )


def _stage_rows(record: RunRecord) -> list[list[str]]:
    """One row a figure, one cell a stage, with the change against the dense stage."""
    rows = [[label] for label, _, _ in _FIGURES]
    dense = _dense(record)
    for stage in record.stages:
        for row, (_, name, show) in zip(rows, _FIGURES, strict=True):
            value = getattr(stage, name)
            base = math.nan if dense in (None, stage) else getattr(dense, name)
            change = _change(value, base, factor=name.endswith("per_second"))
            row.append(show(value) + (f" ({change})" if change else ""))
    return rows


def _change(value: float, base: float, *, factor: bool) -> str:
    if not (math.isfinite(value) and math.isfinite(base) and base > 0):
        return ""
    if factor or value > 10 * base:
        return f"\u00d7{value / base:.3g}"
    return f"{round(100 * (value / base - 1), 1) + 0.0:+.1f} %"  # + 0.0: never "-0.0 %"


def _cost_rows(record: RunRecord) -> list[list[str]]:
    units = [max(record.checkpoint_bytes, 1), max(record.layer_bytes, 1)]
    rows = []
    for cost in record.costs:
        name = f"{cost.name} (reused)" if cost.reused else cost.name
        peaks = [f"{cost.peak_bytes / unit:.3g}" for unit in units]
        forwards = f"{cost.forwards:.3g}" if math.isfinite(cost.forwards) else "?"
        rows.append([name, forwards, *peaks, f"{cost.seconds:.3g}"])
    return rows


def _dense(record: RunRecord) -> Stage | None:
    return next((stage for stage in record.stages if stage.name == "dense"), None)


def _methods(record: RunRecord) -> str:
    return " + ".join(plan["method"] for plan in record.plans) or "No pruning"


def _bullets(values: dict[str, Any]) -> str:
    """One line an entry; what would be pages of numbers is left to report.json."""
    lines = [f"- {name.replace('_', ' ')}: {value}" for name, value in values.items()]
    return "\n".join(x if len(x) < 600 else f"{x[:80]} ... (in report.json)" for x in lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that takes its place on success and is gone on an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
