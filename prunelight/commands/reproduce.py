"""`prunelight reproduce PAPER [--table T] [--quick]`: a paper's table, as a contest on any model.

The grids are configs of `prunelight compare` in configs/papers: they can be read and edited.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from prunelight.commands import compare
from prunelight.comparison.papers.catalog import PAPERS, QUICK, table_of

_MORE = "(prunelight reproduce --help says more)"


class _Parser(argparse.ArgumentParser):
    """argparse's parser; an error is one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with the error in one line."""
        self.exit(2, f"prunelight: error: {message} {_MORE}\n")


def main(arguments: Sequence[str]) -> None:
    """Run the verb."""
    parser = _parser()
    given, options = parser.parse_known_args([*arguments])
    try:
        name, table = table_of(given.paper, given.table)
    except ValueError as error:
        parser.error(str(error))
    out = f"runs/reproduce/{given.paper}-{name}{'-quick' if given.quick else ''}"
    configs = [table.config, *([QUICK] if given.quick else [])]
    first = [option for config in configs for option in ("--config", config)]
    sys.stderr.write(f"{PAPERS[given.paper].title}, {name}: {table.asks}\n")
    command = ["prunelight", "reproduce", *arguments]
    compare.main([*first, "--out", out, *options], command)


def _parser() -> _Parser:
    tables = "\n".join(
        f"  {paper} --table {name}\n      {table.asks}"
        for paper, of in PAPERS.items()
        for name, table in of.tables.items()
    )
    parser = _Parser(
        prog="prunelight reproduce",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        description="Repeat a table of a paper on a model, with the published figures beside it.",
        epilog=f"tables, the main one of each paper first:\n{tables}\n\nAll options of `prunelight "
        "compare` may follow, such as --model.name, --data.texts or --tasks_dir.",
    )
    parser.add_argument("paper", help=f"one of {', '.join(PAPERS)}")
    parser.add_argument("--table", help="name of a table; without it the main one")
    parser.add_argument(
        "--quick", action="store_true", help="SmolLM2-135M and bundled texts, for a laptop"
    )
    return parser
