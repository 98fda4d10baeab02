"""Write a page for each paper: its rows, its tables on SmolLM2, and what was published.

    python docs/papers/pages.py           # write the pages
    python docs/papers/pages.py --check   # only say which pages are not what their sources give

Rows stand in rows.json, the test of each in tests.json, tables in prunelight/comparison/papers, and
what we measured in docs/results/reproduce_PAPER_TABLE.json. `docs/results/tables.py` fills those in
afterwards.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from prunelight.comparison.papers.catalog import PAPERS, Paper
from prunelight.comparison.papers.published import PublishedTable, notes_of, published_tables

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER.parent / "results"
MEASURED = re.compile(r"(<!-- table: [\w-]+ -->\n).*?(<!-- end of table -->)", re.DOTALL)


def page(name: str, paper: Paper) -> str:
    """Return the page of a paper, with empty places for what was measured."""
    rows = json.loads((FOLDER / "rows.json").read_text(encoding="utf-8"))[name]
    parts = [f"# {paper.title}", "## What of the paper is here", _table(["row", "by"], rows)]
    for table, of in paper.tables.items():
        quick = RESULTS / f"reproduce_{name}_{table}.json"
        parts += [
            f"## {of.asks}",
            f"`prunelight reproduce {name} --table {table} --model.name MODEL` runs "
            f"the config `{of.config}`; `--quick` runs it small, on "
            "SmolLM2-135M-Instruct (from a Q4_1 GGUF, de-quantized).",
            f"<!-- table: {quick.stem} -->\n<!-- end of table -->"
            if quick.is_file()
            else "The quick form was not measured.",
        ]
        for published in published_tables(f"{name}.{table}"):
            parts += [f"Published: {published.title}.", _published(published), _origin(published)]
    return "\n\n".join([*parts, notes_of(name)]) + "\n"


def _published(table: PublishedTable) -> str:
    rows = [
        [label, *["" if x is None else str(x) for x in row]] for label, row in table.rows.items()
    ]
    return _table(["method", *table.models], rows)


def _origin(table: PublishedTable) -> str:
    return f"{table.source}. Protocol: {table.protocol}."


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    )


def main() -> int:
    """Write or check the pages; return the exit status."""
    parser = argparse.ArgumentParser(description="Write the pages of the papers.")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    stale = []
    for name, paper in PAPERS.items():
        file, text = FOLDER / f"{name}.md", page(name, paper)
        there = file.read_text(encoding="utf-8") if file.is_file() else ""
        if MEASURED.sub(r"\1\2", there) != text:
            stale.append(file)
            if not options.check:
                file.write_text(text, encoding="utf-8")
    for file in stale if options.check else ():
        sys.stderr.write(f"{file.name} is not what its sources give\n")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
