"""Measure what other programs make of our directories; write docs/loaders.md.

    python tests/engines/loaders.py                        # all engines whose Python is named
    python tests/engines/loaders.py --engines vLLM --models gemma3 SmolLM2
    python tests/engines/loaders.py --write                # only the page, from the figures

Each engine has an environment of its own (docs/loaders.md says how to make them), named by an
environment variable, see `PYTHONS`. The figures go to docs/results/loaders.json; those of engines
and models that a call does not name stay. The reference is transformers 5 in float32 on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import FAMILIES, VOCABULARY, family_model, removals, token_ids
from readers import read_transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import prunelight
from prunelight.callbacks import DLP, ShortGPT, SliceGPT, SlidingLayerMerging, WidthPruning
from prunelight.planning.steps import PruneWidth
from prunelight.pruning.prune_width import prune_width
from prunelight.pruning.remove_layers import remove_layers

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "docs" / "results" / "loaders.json"
# Engine -> environment variable that names its Python.
PYTHONS = {
    "transformers 4.57": "TRANSFORMERS4_PYTHON",
    "vLLM": "VLLM_PYTHON",
    "llama.cpp": "LLAMA_CPP_PYTHON",
    "CTranslate2": "CTRANSLATE2_PYTHON",
}
COLUMNS = (*PYTHONS, "peft", "lm-eval")  # the last two are read by this Python
# Difference of a log-probability beyond which a reading is wrong. llama.cpp takes GELU from a table
# in float16, and computes gpt_oss's experts so that even the dense model differs by 0.01. SmolLM2
# holds massive activations at its first token, where rounding in float32 alone makes 0.001.
TOLERANCE, ROUNDING = 1e-3, {"llama.cpp": 0.03, "SmolLM2": 2e-3}


@dataclass(frozen=True)
class State:
    """A model as it is saved: its name, how it is made, and what engines are told."""

    model: str
    state: str
    make: Callable[[], PreTrainedModel]
    options: dict[str, Any] = field(default_factory=dict)
    only: tuple[str, ...] = COLUMNS


def states() -> Iterator[State]:
    """Yield all models in all states."""
    for name in FAMILIES:
        for removal in removals(name):
            yield State(
                name,
                removal.state,
                partial(without, name, removal.layers),
                removal.options,
                ("llama.cpp",) if removal.options else COLUMNS,
            )
    code = {"trust_remote_code": True}
    for method, callback in {
        "layers merged": SlidingLayerMerging(num_layers=2),
        "half of the weights zero": DLP(0.5),
        "narrower heads and MLPs": WidthPruning(neuron_ratio=0.25, head_ratio=0.5),
        "sliced with one rotation": SliceGPT(0.25, rotation="shared"),
        "sliced": SliceGPT(0.25, embedding="full", export_remote_code=True),
        "attention dropped": ShortGPT(num_layers=2, granularity="attention"),
    }.items():
        yield State("llama", method, partial(pruned, callback), code)
    yield State("llama", "layers of different widths", uneven, code)
    yield State("SmolLM2", "dense", partial(smollm2, ()))
    yield State("SmolLM2", "4 of 30 layers removed", partial(smollm2, (10, 14, 18, 22)))


def without(name: str, layers: tuple[int, ...]) -> PreTrainedModel:
    """Return a family's model without some layers."""
    model = family_model(name)
    remove_layers(model, layers)
    return model


def pruned(callback: Any) -> PreTrainedModel:
    """Return the tiny Llama as a method leaves it."""
    model, windows = family_model("llama"), torch.tensor(token_ids(1024)).reshape(16, 64)
    return prunelight.apply(model, callback.plan(model, windows), windows)


def uneven() -> PreTrainedModel:
    """Return the tiny Llama with half of the heads and neurons in every second layer."""
    model = family_model("llama")
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


def tokenizer_of(state: State) -> tuple[Any, list[int]]:
    """Return the tokenizer to save, and ids of a text."""
    if state.model == "SmolLM2":
        tokenizer = prunelight.load_tokenizer("smollm2-135m")
        return tokenizer, tokenizer("The river rose in the night, and by morning the road")[
            "input_ids"
        ]
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(4, VOCABULARY))]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special), token_ids()


def save_all(
    chosen: list[State], folder: Path
) -> Iterator[tuple[State, dict[str, Any], np.ndarray]]:
    """Save each model with `prunelight.save`; yield it, a job for the readers, and the reference.

    What prunelight itself refuses to prune or to save is left out.
    """
    for number, state in enumerate(chosen):
        tokenizer, ids = tokenizer_of(state)
        directory = folder / str(number)
        try:
            model = state.make()
            own = model.config.model_type.startswith("prunelight_")
            prunelight.save(model, tokenizer, directory, export_remote_code=own)
        except (ValueError, TypeError, RuntimeError) as error:
            sys.stderr.write(f"{state.model}: {state.state}: {error}\n")
            continue
        job = {
            "directory": str(directory),
            "ids": ids,
            "vocabulary": model.config.vocab_size,
            "options": state.options,
        }
        sys.stderr.write(f"saved {state.model}: {state.state}\n")
        yield state, job, read_transformers(job)


def measure(chosen: list[State], engines: list[str]) -> list[dict[str, Any]]:
    """Return one figure for each engine and state: the largest difference, or the refusal."""
    figures = []
    with tempfile.TemporaryDirectory() as temporary:
        saved = list(save_all(chosen, Path(temporary)))
        for engine in engines:
            todo = [
                (state, job, reference) for state, job, reference in saved if engine in state.only
            ]
            jobs = [{**job, "output": f"{job['directory']}-{engine}.npy"} for _, job, _ in todo]
            file = Path(temporary) / f"{engine}.json"
            file.write_text(json.dumps(jobs))
            run_reader(engine, file)
            for (state, _, reference), job in zip(todo, jobs, strict=True):
                figure = {"model": state.model, "state": state.state, "engine": engine}
                output = Path(job["output"])
                refusal = output.with_suffix(".txt")
                if output.exists():
                    difference = np.abs(np.load(output) - reference).max()
                    figure["difference"] = float(f"{difference:.2g}")
                else:
                    figure["refused"] = refusal.read_text() if refusal.exists() else "it crashed"
                figures.append(figure)
                sys.stderr.write(f"{figure}\n")
    return figures


def run_reader(engine: str, jobs: Path) -> None:
    """Let an engine's own Python read all models; a crash is found by the missing answers."""
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": "1",
    }
    python = os.environ[PYTHONS[engine]] if engine in PYTHONS else sys.executable
    reader = ROOT / "tests" / "engines" / "readers.py"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    log = Path(tempfile.gettempdir()) / f"prunelight-{engine}.log"
    with log.open("w") as output:
        while True:  # a crash ends the process: go on with the jobs that have no answer
            before = unanswered(jobs)
            subprocess.run(
                [python, str(reader), engine, str(jobs)],
                env={**environment, **settings},
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            )
            after = unanswered(jobs)
            if not after:
                return
            if len(after) == len(before):
                after = after[1:]  # the first one crashes
            jobs.write_text(json.dumps(after))


def unanswered(jobs: Path) -> list[dict[str, Any]]:
    """Return the jobs without an output."""
    return [
        job
        for job in json.loads(jobs.read_text())
        if not any(Path(job["output"]).with_suffix(end).exists() for end in (".npy", ".txt"))
    ]


def verdict(figure: dict[str, Any]) -> str:
    """Return what an engine made of a model: right, wrong or refused."""
    if "refused" in figure:
        return "refused"
    allowed = [TOLERANCE, *(ROUNDING.get(figure[name], 0) for name in ("engine", "model"))]
    return "wrong" if figure["difference"] > max(allowed) else "right"


def cell(figure: dict[str, Any] | None) -> str | None:
    """Return a figure as the table shows it."""
    if figure is None or "refused" in figure:
        return figure and "refused"
    difference = figure["difference"]
    if verdict(figure) == "wrong":
        return f"**{difference:.2g}**"
    return f"{difference:.0e}" if difference else "0"


def checked_out_commit() -> str:
    """Return the short hash of the commit that is checked out."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.check_output(command, cwd=ROOT, text=True).strip()


def write(figures: list[dict[str, Any]]) -> None:
    """Write the figures, and the page's table of them."""
    order = [(state.model, state.state) for state in states()]
    by_place = {(f["model"], f["state"], f["engine"]): f for f in figures}
    rows = []
    for model, state in order:
        cells = [cell(by_place.get((model, state, engine))) for engine in COLUMNS]
        if any(cells):
            rows.append([f"{model}: {state}", *cells])
    table = {
        "title": "Largest difference of a log-probability from transformers 5, float32 on a CPU; "
        "bold: wrong, beyond 0.001",
        "commands": ["python tests/engines/loaders.py"],
        "date": date.today().isoformat(),
        "commit": checked_out_commit(),
        "columns": ["", *COLUMNS],
        "rows": rows,
        "figures": figures,
    }
    FIGURES.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    subprocess.run([sys.executable, str(ROOT / "docs" / "results" / "tables.py")], check=True)


def main() -> None:
    """Measure what the command line names, and write."""
    parser = argparse.ArgumentParser(description="Measure what other programs make of our files.")
    named = [engine for engine in COLUMNS if PYTHONS.get(engine, "PATH") in os.environ]
    parser.add_argument("--engines", nargs="+", choices=COLUMNS, default=named)
    parser.add_argument("--models", nargs="+", help="names of families, or SmolLM2; default all")
    parser.add_argument("--write", action="store_true", help="measure nothing")
    options = parser.parse_args()
    new = []
    if not options.write:
        chosen = [s for s in states() if options.models is None or s.model in options.models]
        new = measure(chosen, options.engines)
    figures = json.loads(FIGURES.read_text())["figures"] if FIGURES.exists() else []
    write([*{(f["model"], f["state"], f["engine"]): f for f in (*figures, *new)}.values()])


if __name__ == "__main__":
    main()
