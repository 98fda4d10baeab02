"""`prunelight compare --config compare_25.yaml`: a contest of methods at equal size."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import Namespace
from rich.console import Console
from rich.table import Table

from prunelight.comparison.contest import compare
from prunelight.comparison.settings import ComparisonSettings
from prunelight.comparison.telling.claim import claim_holds
from prunelight.comparison.telling.summary import Summary
from prunelight.comparison.telling.table import lines, short_head
from prunelight.comparison.telling.verdict import verdict
from prunelight.config_files import find_configs
from prunelight.runtime.origin import command_line
from prunelight.verbs import VerbParser, run_verb


def main(arguments: Sequence[str], command: Sequence[str] | None = None) -> None:
    """Run the verb.

    Args:
        arguments: that follow it.
        command: by which the contest was started; None for `prunelight compare` and the arguments.
    """
    command = ["prunelight", "compare", *arguments] if command is None else command
    parser = _parser()
    try:
        given = find_configs(arguments)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))

    def run(values: Namespace) -> None:
        made = parser.instantiate(values)
        names = ComparisonSettings.__dataclass_fields__
        settings = ComparisonSettings(**{name: made[name] for name in names})
        try:
            summary = compare(settings, command_line(command))
            show(summary)
            if not claim_holds(summary):
                sys.exit(1)
        except (KeyboardInterrupt, SystemExit) as stop:  # Lightning ends a fit by SystemExit
            if isinstance(stop, SystemExit) and not isinstance(stop.__context__, KeyboardInterrupt):
                raise
            out = Path(settings.out).expanduser()
            sys.stderr.write(
                f"prunelight: stopped; {out / 'comparison.md'} has what is done, and the same "
                "command goes on from there\n"
            )
            sys.exit(128 + signal.SIGINT)

    run_verb(parser, given, run)


def _parser() -> VerbParser:
    parser = VerbParser(
        prog="prunelight compare",
        description="Run a contest of methods at equal size, and draw one page to decide from. The "
        "same command goes on where it was stopped.",
    )
    parser.add_argument("--config", action="config", help="YAML file with any options.")
    parser.add_class_arguments(ComparisonSettings, None)
    return parser


def show(summary: Summary) -> None:
    """Print a table for each part, and the verdict; the files have the intervals too."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    columns = short_head(summary)
    for title, part in lines(summary, intervals=False):
        table = Table(title=title or "the dense model", title_justify="left")
        for position, name in enumerate(columns):
            table.add_column(
                name, justify="left" if position == 0 else "right", no_wrap=position == 0
            )
        for line in part:
            table.add_row(*line)
        console.print(table)
    for sentence in verdict(summary):
        console.print(sentence)
    console.print(f"Table and page: {Path(summary.settings.out).expanduser().resolve()}")
