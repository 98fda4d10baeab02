"""`prunelight estimate MODEL`: what pruning and a recovery keep in memory, by the config alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from prunelight.commands.plan import show_rows
from prunelight.planner.memory import estimate
from prunelight.runtime.files.atomic_files import check_writable, write_text
from prunelight.verbs import VerbParser, run_verb

_TITLES = {
    "whole": "pruning: the model on the device",
    "streamed": "pruning: one layer there at a time",
    "weights": "recovery: weights",
    "gradients": "recovery: gradients",
    "optimizer": "recovery: states of AdamW",
    "gathered": "recovery: layers that FSDP2 gathers",
    "activations": "recovery: activations until the backward",
    "loss": "recovery: loss",
    "total": "recovery: together",
}


def main(arguments: Sequence[str]) -> None:
    """Run the verb."""
    parser = _parser()
    run_verb(parser, arguments, lambda values: _estimate(parser.instantiate(values)))


def _estimate(values: Namespace) -> None:
    given = vars(values)
    name = given.pop("out")
    out = None if name is None else Path(name).expanduser()
    if out is not None:
        _check_file(out)
    parts = estimate(**given)
    rows = [(_TITLES[name], f"{count / 1e9:.2f}") for name, count in parts.items()]
    show_rows(f"{values.model}, on each device", ("", "GB"), rows)
    if out is not None:
        write_text(out, json.dumps(parts, indent=2) + "\n")


def _check_file(out: Path) -> None:
    """Check that an estimate may be written to a file: a new one, or one that holds an estimate.

    Raises:
        FileExistsError: if the file holds something else, or is a directory.
        OSError: if nothing can be written there.
    """
    check_writable(out.parent)
    try:
        earlier = json.loads(out.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except (ValueError, OSError):
        earlier = None
    if not isinstance(earlier, dict) or not {*earlier} <= {*_TITLES}:
        raise FileExistsError(f"out={out} exists and holds no estimate; choose another name")


def _parser() -> VerbParser:
    parser = VerbParser(
        prog="prunelight estimate",
        description="Tell what a model takes in memory while it is pruned and recovered. No weight "
        "is read; what kernels and the allocator take comes on top.",
    )
    add: Any = parser.add_argument
    add("model", type=str, help="Hub id, directory, GGUF file, bundled name or model type.")
    add("--out", type=str | None, default=None, help="File for the bytes as JSON.")
    parser.add_function_arguments(estimate, None, skip={"model"})
    return parser
