"""`prunelight plan MODEL --method NAME ...`: the plan of a method, made without a run.

`--budget 0.75` alone takes `BudgetPruning`, which finds what to remove.

`plan show FILE` says what a plan decides, and `plan diff A B` where two plans differ.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, TypeAlias

from jsonargparse import Namespace
from rich.console import Console
from rich.table import Table
from rich.text import Text

from prunelight.comparison.methods import known_methods, method_class
from prunelight.planner.counting import size_by_config
from prunelight.planner.making import (
    check_plan_file,
    make_method,
    plan_of_model,
    plan_of_scores,
    read_plan,
    write_plan,
)
from prunelight.planner.scores import is_scores
from prunelight.planner.settings import CalibrationSettings
from prunelight.planner.telling import difference_rows, plan_rows
from prunelight.verbs import VerbParser, add_offload, add_place, add_trust, run_verb

MethodClass: TypeAlias = type[Any]  # of a method

_OF_A_BUDGET = "BudgetPruning"  # what --budget takes without --method


def main(arguments: Sequence[str]) -> None:
    """Run the verb."""
    if [*arguments[:1]] == ["show"]:
        run_verb(_show_parser(), arguments[1:], _show)
        return
    if [*arguments[:1]] == ["diff"]:
        run_verb(_diff_parser(), arguments[1:], _diff)
        return
    given = flat_arguments(arguments)
    name = _method_name(given)
    method_type: MethodClass | None = None
    if name is not None:
        try:
            method_type = method_class(name)
        except ValueError as error:
            _parser(None).error(str(error))
    parser = _parser(method_type)
    if method_type is None:
        if not {"-h", "--help"} & {*given}:
            known = ", ".join(known_methods())
            parser.error(f"method is missing; name one of {known}, or give --budget alone")
        parser.parse_args(given)
        return
    run_verb(parser, given, partial(_plan, parser, method_type, given))


def flat_arguments(arguments: Sequence[str]) -> list[str]:
    """Return arguments of which those of the method have its own names: `--ratio 0.25`.

    They may be written as in a config too: `--method.init_args.ratio 0.25`.
    """
    prefix = re.compile(r"^--method\.(class_path(?=$|=)|init_args\.)?")
    return [
        prefix.sub(lambda match: "--method" if match[1] == "class_path" else "--", argument)
        for argument in arguments
    ]


def show_rows(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; the first column holds names."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table(title=title, title_justify="left", show_header=any(head))
    for position, name in enumerate(head):
        table.add_column(name, no_wrap=position == 0, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # a list in brackets is no markup
    console.print(table)


def show_decisions(title: str, rows: Mapping[str, str]) -> None:
    """Print what a plan decides: name of a row -> text."""
    show_rows(title, ("", ""), [*rows.items()])


def _plan(
    parser: VerbParser, method_type: MethodClass, arguments: Sequence[str], given: Namespace
) -> None:
    values = parser.instantiate(given)
    out, method = _checked(values, method_type)
    make = partial(_of_scores, arguments) if is_scores(values.model) else _of_model
    plan, size = make(values, method)
    write_plan(plan, out)
    show_decisions(f"Plan: {out}", {**plan_rows(plan), "parameters": str(size)})


def _of_model(values: Namespace, method: Any) -> tuple[Any, Any]:
    return plan_of_model(
        method,
        values.model,
        values.data,
        dtype=values.dtype,
        device=values.device,
        offload=values.offload,
        trust=values.trust_remote_code,
        attn_implementation=values.attn_implementation,
    )


# Options that say how a model is read and looked at.
_OF_THE_WEIGHTS = ("data", "dtype", "device", "offload", "attn_implementation")


def _of_scores(arguments: Sequence[str], values: Namespace, method: Any) -> tuple[Any, Any]:
    for option in (text.partition("=")[0].removeprefix("--") for text in arguments):
        if option.partition(".")[0] in _OF_THE_WEIGHTS:
            raise ValueError(
                f"{option} has no effect with scores, whose windows were read and whose model ran "
                "before; leave it out, or score again"
            )
    directory = Path(values.model).expanduser()
    return plan_of_scores(method, directory, trust=values.trust_remote_code)


def _checked(values: Namespace, method_type: MethodClass) -> tuple[Path, Any]:
    """Return the file of the plan and the method, both checked."""
    method = make_method(
        method_type, {name: values[name] for name in signature(method_type).parameters}
    )
    out = Path(values.out).expanduser()
    check_plan_file(out)
    return out, method


def _show(given: Namespace) -> None:
    plan = read_plan(Path(given.file).expanduser())
    show_decisions(f"Plan: {given.file}", {**plan_rows(plan), **_size_row(given, plan)})


def _diff(given: Namespace) -> None:
    files = (given.first, given.second)
    plans = [read_plan(Path(file).expanduser()) for file in files]
    rows = difference_rows(*plans)
    sizes = [_size_row(given, plan) for plan in plans]
    if sizes[0] != sizes[1]:
        rows["parameters"] = (sizes[0]["parameters"], sizes[1]["parameters"])
    if not rows:
        sys.stdout.write(f"{files[0]} and {files[1]} decide the same\n")
        return
    lines = [(name, *texts) for name, texts in rows.items()]
    show_rows("What differs", ("", *files), lines)


def _size_row(given: Namespace, plan: Any) -> dict[str, str]:
    if given.model is None:
        return {}
    return {"parameters": str(size_by_config(given.model, plan, trust=given.trust_remote_code))}


def _method_name(arguments: Sequence[str]) -> str | None:
    """Return the method that is asked for, before there is a parser of its arguments."""
    for argument, value in zip(arguments, [*arguments, ""][1:], strict=True):
        if argument == "--method" and value and not value.startswith("--"):
            return value
        if argument.startswith("--method="):
            return argument.partition("=")[2]
    asks_budget = any(argument.partition("=")[0] == "--budget" for argument in arguments)
    return _OF_A_BUDGET if asks_budget else None


def _parser(method_type: MethodClass | None) -> VerbParser:
    parser = VerbParser(
        prog="prunelight plan",
        description="Make the plan of a method for a model, without training. `plan show FILE` "
        "says what a plan decides, `plan diff A B` where two differ.",
    )
    add: Any = parser.add_argument
    add("model", type=str, help="The model, as for evaluate; or scores of prunelight score.")
    add(
        "--method",
        type=str,
        help=f"One of {', '.join(known_methods())}, or a class of yours; with --budget "
        "BudgetPruning.",
    )
    add("--out", type=str, default="plan.json", help="File of the plan; plan.json by default.")
    add_place(parser)
    add_offload(parser)
    add_trust(parser)
    parser.add_class_arguments(CalibrationSettings, "data")
    if method_type is not None:
        parser.add_class_arguments(method_type, None)
    return parser


def _show_parser() -> VerbParser:
    parser = VerbParser(prog="prunelight plan show", description="Say what a plan decides.")
    parser.add_argument("file", type=str, help="File of the plan.")
    _add_model(parser)
    return parser


def _diff_parser() -> VerbParser:
    parser = VerbParser(prog="prunelight plan diff", description="Say where two plans differ.")
    parser.add_argument("first", type=str, help="File of a plan.")
    parser.add_argument("second", type=str, help="File of another plan.")
    _add_model(parser)
    return parser


def _add_model(parser: VerbParser) -> None:
    add: Any = parser.add_argument
    help_text = "The model of the plan, to count parameters; no weight is read."
    add("--model", type=str | None, default=None, help=help_text)
    add_trust(parser)
