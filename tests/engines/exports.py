"""Export models to other programs' formats and let these read them back; write docs/exporting.md.

    python tests/engines/exports.py                        # all formats whose program is here
    python tests/engines/exports.py --formats 'GGUF f32' --models gemma3 SmolLM2
    python tests/engines/exports.py --write                # only the page, from the figures

`.ci/engines FOLDER` makes an environment for each program, and prints the variables that name them.
The figures go to docs/results/exports.json, the reasons of refusals to export_reasons.json beside
it; those of formats and models that a call does not name stay. The reference is transformers in
float32 on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from functools import cache, partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "support")]

import torch  # noqa: E402
from cases import FAMILIES, family_model, removals  # noqa: E402
from loaders import checked_out_commit  # noqa: E402
from text_tokenizers import make_tokenizer  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402

import prunelight  # noqa: E402
from prunelight.callbacks import DLP, SliceGPT, SlidingLayerMerging, WidthPruning  # noqa: E402
from prunelight.export.exporting import export  # noqa: E402
from prunelight.planning.steps import PruneWidth  # noqa: E402
from prunelight.pruning.drop_sublayers import drop_sublayers  # noqa: E402
from prunelight.pruning.prune_width import prune_width  # noqa: E402
from prunelight.pruning.remove_layers import remove_layers  # noqa: E402

FIGURES = ROOT / "docs" / "results" / "exports.json"
REASONS = ROOT / "docs" / "results" / "export_reasons.json"


@dataclass(frozen=True)
class Format:
    """A column of the table.

    Attributes:
        to: the target.
        options: of `export`.
        variable: of the environment, which names the Python of the program; None for this one.
        measure: the field of the proof that the table shows.
        models: the models that are exported so; None for all.
    """

    to: str
    options: dict[str, Any]
    variable: str | None = None
    measure: str = "largest_difference"
    models: tuple[str, ...] | None = None


_FEW = ("llama", "gemma3", "SmolLM2")
FORMATS = {
    "GGUF f32": Format("gguf", {"dtype": "f32"}, "LLAMA_CPP_PYTHON"),
    **{
        f"GGUF {kind} (KL)": Format("gguf", options, "LLAMA_CPP_PYTHON", "mean_kl", _FEW)
        for kind, options in {
            "f16": {"dtype": "f16"},
            "bf16": {"dtype": "bf16"},
            "q8_0": {"dtype": "q8_0"},
            "q4_k_m": {"quantize": "q4_k_m"},
        }.items()
    },
    "CTranslate2 f32": Format("ctranslate2", {"dtype": "f32"}),
    **{
        f"CTranslate2 {kind} (KL)": Format("ctranslate2", {"dtype": kind}, None, "mean_kl", _FEW)
        for kind in ("f16", "bf16", "int8")
    },
    "DeciLM f32": Format("decilm", {"dtype": "f32"}, "VLLM_PYTHON", models=("llama",)),
}


@dataclass(frozen=True)
class State:
    """A row of the table: a model, what was done to it, and how it is made."""

    model: str
    state: str
    make: Callable[[], PreTrainedModel]


def states() -> Iterator[State]:
    """Yield all models in all states."""
    for name in FAMILIES:
        for removal in removals(name):
            if not removal.options:
                yield State(name, removal.state, partial(without, name, removal.layers))
    for method, callback in {
        "layers merged": SlidingLayerMerging(num_layers=2),
        "half of the weights zero": DLP(0.5),
        "narrower heads and MLPs": WidthPruning(neuron_ratio=0.25, head_ratio=0.5),
        "sliced with one rotation": SliceGPT(0.25, rotation="shared"),
        "sliced": SliceGPT(0.25, embedding="full"),
    }.items():
        yield State("llama", method, partial(pruned, callback))
    yield State("llama", "attention dropped in 2 layers", partial(dropped, (2, 5), ()))
    yield State("llama", "MLP dropped in 2 layers", partial(dropped, (), (3, 6)))
    yield State("llama", "attention and MLPs dropped", partial(dropped, (2, 5), (2, 3)))
    yield State("llama", "layers of different widths", uneven)
    yield State("SmolLM2", "6 of 30 layers removed", partial(smollm2, (10, 12, 14, 16, 18, 20)))


@cache
def tokens() -> dict[str, int]:
    """Return the size of the vocabulary of the trained tokenizer, and its special ids."""
    tokenizer = make_tokenizer(bos_token="<s>")
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return {"vocab_size": len(tokenizer), "pad_token_id": ids["eos_token_id"], **ids}


def without(name: str, layers: tuple[int, ...]) -> PreTrainedModel:
    """Return a family's model without some layers."""
    model = family_model(name, **tokens())
    remove_layers(model, layers)
    return model


def pruned(callback: Any) -> PreTrainedModel:
    """Return the tiny Llama as a method leaves it."""
    generator = torch.Generator().manual_seed(1)
    windows = torch.randint(5, tokens()["vocab_size"], (16, 64), generator=generator)
    model = family_model("llama", **tokens())
    return prunelight.apply(model, callback.plan(model, windows), windows)


def dropped(attention: tuple[int, ...], mlp: tuple[int, ...]) -> PreTrainedModel:
    """Return the tiny Llama without some sublayers."""
    return drop_sublayers(family_model("llama", **tokens()), attention, mlp)


def uneven() -> PreTrainedModel:
    """Return the tiny Llama with half of the heads and neurons in every second layer."""
    model = family_model("llama", **tokens())
    layers = range(model.config.num_hidden_layers)
    heads = {str(i): [0] if i % 2 else [0, 1] for i in layers}
    neurons = {str(i): list(range(256 if i % 2 else 512)) for i in layers}
    prune_width(model, PruneWidth(heads=heads, neurons=neurons))
    return model


def smollm2(layers: tuple[int, ...]) -> PreTrainedModel:
    """Return SmolLM2-135M-Instruct, de-quantized from a GGUF in Q4_1, without some layers."""
    model, _ = prunelight.load("smollm2-135m", dtype="float32")
    remove_layers(model, layers)
    return model


def measure(chosen: list[State], formats: list[str]) -> Iterator[dict[str, Any]]:
    """Yield one figure for each state and format: how far the export is, or why there is none."""
    for state in chosen:
        todo = [name for name in formats if state.model in (FORMATS[name].models or [state.model])]
        if not todo:
            continue
        with tempfile.TemporaryDirectory() as temporary:
            directory = Path(temporary) / "model"
            smol = state.model == "SmolLM2"
            tokenizer = prunelight.load_tokenizer("smollm2-135m") if smol else make_tokenizer("<s>")
            try:
                prunelight.save(state.make(), tokenizer, directory)
            except (ValueError, TypeError) as error:  # what prunelight itself refuses to prune
                sys.stderr.write(f"{state.model}: {state.state}: {error}\n")
                continue
            for name in todo:
                figure = {"model": state.model, "state": state.state, "format": name}
                figure |= exported(directory, FORMATS[name])
                sys.stderr.write(f"{figure}\n")
                yield figure


def exported(directory: Path, kind: Format) -> dict[str, Any]:
    """Export a model; return what the proof says, or the reason why there is no export."""
    python = os.environ[kind.variable] if kind.variable else None
    try:
        result = export(directory, kind.to, engine_python=python, **kind.options)
    except (ValueError, TypeError, RuntimeError) as error:
        reason = str(error).replace(str(directory), "DIR")
        return {"refused": " ".join(reason.split())}
    assert result.proof is not None
    return {
        "engine": f"{result.proof.engine} {result.proof.version}",
        **{
            name: float(f"{getattr(result.proof, name):.2g}")
            for name in ("largest_difference", "mean_kl", "same_top")
        },
    }


def cell(figure: dict[str, Any] | None) -> str | None:
    """Return a figure as the table shows it."""
    if figure is None or "refused" in figure:
        return figure and "refused"
    return f"{figure[FORMATS[figure['format']].measure]:.1g}"


def write(figures: list[dict[str, Any]]) -> None:
    """Write the figures, and the page's tables of them."""
    by_place = {(f["model"], f["state"], f["format"]): f for f in figures}
    rows = []
    for state in states():
        cells = [cell(by_place.get((state.model, state.state, name))) for name in FORMATS]
        if any(cells):
            rows.append([f"{state.model}: {state.state}", *cells])
    facts = {
        "commands": ["python tests/engines/exports.py"],
        "date": date.today().isoformat(),
        "commit": checked_out_commit(),
    }
    table = {
        "title": "What the program computes from the export, against transformers in float32 on a "
        "CPU: largest difference of a log-probability, or mean KL divergence in nats",
        **facts,
        "columns": ["", *FORMATS],
        "rows": rows,
        "figures": figures,
    }
    FIGURES.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    reasons: dict[tuple[str, str], list[str]] = {}
    for figure in figures:
        if "refused" in figure:
            to = FORMATS[figure["format"]].to
            state = f"{figure['model']}: {figure['state']}"
            reason = figure["refused"].partition("; written are")[0]
            reasons.setdefault((to, reason), []).append(state)
    told = {
        "title": "Why there is no export",
        **facts,
        "columns": ["", "models", "reason"],
        "rows": [
            [to, "; ".join(dict.fromkeys(names)), reason.replace("|", "or")]
            for (to, reason), names in reasons.items()
        ],
    }
    REASONS.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    subprocess.run([sys.executable, str(ROOT / "docs" / "results" / "tables.py")], check=True)


def main() -> None:
    """Measure what the command line names, and write."""
    parser = argparse.ArgumentParser(description="Measure what other programs make of exports.")
    here = [name for name, kind in FORMATS.items() if (kind.variable or "PATH") in os.environ]
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=here)
    parser.add_argument("--models", nargs="+", help="names of families, or SmolLM2; default all")
    parser.add_argument("--write", action="store_true", help="measure nothing")
    options = parser.parse_args()
    new = []
    if not options.write:
        chosen = [s for s in states() if options.models is None or s.model in options.models]
        new = list(measure(chosen, options.formats))
    figures = json.loads(FIGURES.read_text())["figures"] if FIGURES.exists() else []
    write([*{(f["model"], f["state"], f["format"]): f for f in (*figures, *new)}.values()])


if __name__ == "__main__":
    main()
