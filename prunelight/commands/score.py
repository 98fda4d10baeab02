"""`prunelight score MODEL --out DIR`: the scores that plans are made of, computed once and kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from prunelight.commands.plan import show_rows
from prunelight.planner.scoring import CHEAP, SCORERS, score_to_directory
from prunelight.planner.settings import CalibrationSettings
from prunelight.verbs import VerbParser, add_offload, add_place, add_trust, run_verb


def main(arguments: Sequence[str]) -> None:
    """Run the verb."""
    parser = _parser()
    run_verb(parser, arguments, lambda values: _score(parser.instantiate(values)))


def _score(values: Namespace) -> None:
    out = Path(values.out).expanduser()
    scores = score_to_directory(
        values.model,
        out,
        values.data,
        scores=values.scores,
        dtype=values.dtype,
        device=values.device,
        offload=values.offload,
        trust=values.trust_remote_code,
        attn_implementation=values.attn_implementation,
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
    add_place(parser)
    add_offload(parser)
    add_trust(parser)
    parser.add_class_arguments(CalibrationSettings, "data")
    return parser
