"""`prunelight apply MODEL plan.json --out DIR`: a plan carried out, and the result saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from prunelight.commands.plan import show_decisions
from prunelight.planner.applying import apply_to_saved, calibration_for
from prunelight.planner.making import read_plan
from prunelight.planner.settings import CalibrationSettings
from prunelight.planner.telling import plan_rows
from prunelight.verbs import VerbParser, add_offload, add_place, add_trust, run_verb


def main(arguments: Sequence[str]) -> None:
    """Run the verb."""
    parser = _parser()
    given = given_settings(arguments)

    def verb(values: Namespace) -> None:
        _apply(parser.instantiate(values), given)

    run_verb(parser, arguments, verb)


def given_settings(arguments: Sequence[str]) -> set[str]:
    """Return the names of the data settings on a command line; of a whole `--data`, all."""
    options = {text.partition("=")[0].removesuffix("+") for text in arguments}
    if "--data" in options:
        return {field.name for field in fields(CalibrationSettings)}
    prefix = "--data."
    return {option.removeprefix(prefix) for option in options if option.startswith(prefix)}


def _apply(values: Namespace, given: set[str]) -> None:
    plan, out = read_plan(Path(values.plan).expanduser()), Path(values.out).expanduser()
    if given and "calibration" not in given:
        raise ValueError(
            f"data.{min(given)} says how windows are drawn, and no text is given; add "
            "--data.calibration, such as sample:calibration"
        )
    decided = plan_rows(plan)
    saved, size = apply_to_saved(
        values.model,
        plan,
        out,
        calibration_for(plan, values.data, given) if given else None,
        dtype=values.dtype,
        device=values.device,
        offload=values.offload,
        strict=values.strict,
        trust_remote_code=values.trust_remote_code,
        attn_implementation=values.attn_implementation,
    )
    rows = {"parameters": str(size), "saved": saved.directory, "verified": saved.verification}
    show_decisions(f"Applied: {values.plan}", {**decided, **rows})


def _parser() -> VerbParser:
    parser = VerbParser(
        prog="prunelight apply",
        description="Carry out a plan on the model that it was made for, and save the result with "
        "the plan beside it. Nothing is trained.",
    )
    add: Any = parser.add_argument
    add("model", type=str, help="Hub id, directory, GGUF file or bundled name of the model.")
    add("plan", type=str, help="File of the plan.")
    add("--out", type=str, required=True, help="New directory of the pruned model.")
    add_place(parser)
    add_offload(parser)
    add(
        "--strict",
        type=bool,
        default=True,
        help="Require the very weights that the plan was made for; false takes a fine-tuned model "
        "of the same shape too.",
    )
    add_trust(parser)
    parser.add_class_arguments(CalibrationSettings, "data")
    return parser
