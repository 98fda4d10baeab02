"""Write the tables of README and docs from the JSON files in this folder.

    python docs/results/tables.py                # write all tables
    python docs/results/tables.py --check        # only say which tables are not what the JSON gives
    python docs/results/tables.py --record REPORT NAME --command 'prunelight fit --config X.yaml'
                                  # take the figures of a run's report.json, or of a contest's
                                  # comparison.json; then write all tables

A table stands between two comments: `<!-- table: NAME -->` and `<!-- end of table -->`. The file
NAME.json holds its title with the conditions of the figures, its columns and rows, the commands
that gave the figures, the date, and a commit. `--record` sets the date to today, the commit to the
one that is checked out, and the commands to those of `--command`; without `--command` they stay.
The script needs no package.

A cell is a number, a list of numbers (one a text), a string, or null for "not measured". Where a
file has "best", the lowest number of each column, or row, is bold: perplexities.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]

TABLE = re.compile(r"<!-- table: ([\w-]+) -->\n(.*?)<!-- end of table -->", re.DOTALL)


def pages() -> list[Path]:
    """Return the files that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def load(name: str) -> dict[str, Any]:
    """Read NAME.json."""
    table: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return table


def numbers(cell: Any) -> list[float]:
    """Return the numbers of a cell; a string has none."""
    values = cell if isinstance(cell, list) else [cell]
    return [x for x in values if isinstance(x, (int, float))]


def lowest(cells: list[Any]) -> list[float]:
    """Return the lowest number at each position of several cells."""
    positions = max((len(numbers(cell)) for cell in cells), default=0)
    return [min(numbers(c)[i] for c in cells if len(numbers(c)) > i) for i in range(positions)]


def text_of(number: float) -> str:
    """Return a number as it is printed."""
    if isinstance(number, int):
        return f"{number:,}"
    return f"{number:.1e}".replace("e+0", "e") if number >= 1e6 else f"{number:,.2f}"


def cell_text(cell: Any, best: list[float]) -> str:
    """Return a cell as Markdown; numbers that equal `best` at their position are bold."""
    if cell is None:
        return ""
    if isinstance(cell, str):
        return cell
    texts = []
    for position, number in enumerate(numbers(cell)):
        bold = position < len(best) and number == best[position]
        texts.append(f"**{text_of(number)}**" if bold else text_of(number))
    return ", ".join(texts)


def render(table: dict[str, Any]) -> str:
    """Return the Markdown of a table, with what gave its figures below it."""
    rows, columns = table["rows"], table["columns"]
    best: list[list[list[float]]] = [[[]] * len(row) for row in rows]
    if table.get("best") == "column":
        of_columns = [lowest([row[i] for row in rows]) for i in range(len(columns))]
        best = [of_columns for _ in rows]
    if table.get("best") == "row":
        best = [[lowest(row[1:])] * len(row) for row in rows]
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)]]
    lines += [
        [cell_text(cell, of) for cell, of in zip(row, bests, strict=True)]
        for row, bests in zip(rows, best, strict=True)
    ]
    body = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    commands = ", ".join(f"`{command}`" for command in table["commands"])
    return f"{body}\nMeasured {table['date']} ({table['commit']}) by {commands}.\n"


def titled(table: dict[str, Any]) -> str:
    """Return the Markdown of a table, with its title above it."""
    return f"{table['title']}.\n\n{render(table)}"


def written(text: str) -> str:
    """Return a page with all its tables as the JSON files give them."""
    return TABLE.sub(
        lambda m: f"<!-- table: {m[1]} -->\n{titled(load(m[1]))}<!-- end of table -->", text
    )


def stage_rows(report: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Return columns and rows for the stages of a report.json: dense, pruned, recovered."""
    stages = report["stages"]
    dense = stages[0]["parameters"]

    def parameters(stage: dict[str, Any]) -> str:
        change = 100 * (stage["parameters"] / dense - 1)
        return f"{stage['parameters'] / 1e6:.1f}M" + (f" ({change:+.1f} %)" if change else "")

    rows = [
        ["layers", *[stage["num_layers"] for stage in stages]],
        ["parameters", *[parameters(stage) for stage in stages]],
        ["perplexity", *[round(stage["perplexity"], 2) for stage in stages]],
        ["next-token accuracy", *[f"{stage['accuracy']:.3f}" for stage in stages]],
    ]
    return ["", *[stage["name"] for stage in stages]], rows


def checked_out_commit() -> str:
    """Return the short hash of the commit that is checked out."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()


def record(report: Path, name: str, commands: list[str] | None = None) -> None:
    """Take the figures of a run or a contest into NAME.json, which is there already.

    Args:
        report: the run's report.json, or the contest's comparison.json.
        name: of the table.
        commands: that gave the figures; None keeps those of the file.
    """
    table = load(name)
    run = json.loads(report.read_text(encoding="utf-8"))
    if "table" in run:  # of a contest
        table["columns"], table["rows"] = run["table"]["columns"], run["table"]["rows"]
    else:
        table["columns"], table["rows"] = stage_rows(run)
    table["date"], table["commit"] = date.today().isoformat(), checked_out_commit()
    table["commands"] = commands or table["commands"]
    text = json.dumps(table, indent=1, ensure_ascii=False) + "\n"
    (FOLDER / f"{name}.json").write_text(text, encoding="utf-8")


def main() -> int:
    """Write or check all tables; return the exit status."""
    parser = argparse.ArgumentParser(description="Write the tables of README and docs.")
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument(
        "--record", nargs=2, metavar=("REPORT", "NAME"), help="take a run's figures"
    )
    parser.add_argument(
        "--command", action="append", help="that gave the figures of --record; may be repeated"
    )
    options = parser.parse_args()
    if options.command and not options.record:
        parser.error("--command belongs to --record, which is missing")
    if options.record:
        record(Path(options.record[0]), options.record[1], options.command)
    stale = [
        page for page in pages() if written(page.read_text("utf-8")) != page.read_text("utf-8")
    ]
    for page in stale:
        if options.check:
            sys.stderr.write(f"{page.relative_to(ROOT)}: a table is not what its JSON file gives\n")
        else:
            page.write_text(written(page.read_text("utf-8")), encoding="utf-8")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
