"""`prunelight score MODEL --out DIR`: the scores that plans are made of, computed once and kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from prunelight.commands.plan import show_rows
from prunelight.commands.running import VerbParser, run_verb
from prunelight.planner.scoring import CHEAP, SCORERS, score_to_directory
from prunelight.planner.settings import CalibrationSettings


def main(arguments: Sequence[str]) -> None:
    """Run the verb."""
    parser = _parser()
    run_verb(parser, arguments, lambda given: _score(parser.instantiate(given)))


def _score(given: Namespace) -> None:
    out = Path(given.out).expanduser()
    scores = score_to_directory(
        given.model,
        out,
        given.data,
        scores=given.scores,
        dtype=given.dtype,
        device=given.device,
        trust=given.trust_remote_code,
    )
    rows = [(name, f"{seconds:.1f} s") for name, seconds in scores.seconds.items()]
    rows += [(name, f"left out: {reason}") for name, reason in scores.left_out.items()]
    show_rows(f"Scores: {out}", ("", ""), rows)


def _parser() -> VerbParser:
    parser = VerbParser(
        prog="prunelight score",
        description="Compute the scores that plans are made of, once. `prunelight plan DIR` then "
        "makes plans in seconds, without the weights.",
    )
    add: Any = parser.add_argument
    add("model", type=str, help="Hub id, directory, GGUF file or bundled name of the model.")
    add("--out", type=str, required=True, help="New directory of the scores.")
    add(
        "--scores",
        nargs="+",
        type=str,
        default=CHEAP,
        help=f"Which: {', '.join(SCORERS)}; by default all but taylor, which needs gradients.",
    )
    add("--dtype", type=str, default="auto", help="auto, float32, bfloat16 or float16.")
    add("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N.")
    add(
        "--trust_remote_code",
        type=bool,
        default=False,
        help="Run Python code that comes with the model; only of authors whom you trust.",
    )
    parser.add_class_arguments(CalibrationSettings, "data")
    return parser
