"""Write docs/reliability.md from the results of the scripts beside this one.

python tests/reliability/kills.py --kills 100     # each script measures and keeps its rows
python tests/reliability/write_page.py            # then the page
"""

from __future__ import annotations

import json
from pathlib import Path

from rows import RESULTS, ROOT

PAGE = ROOT / "docs" / "reliability.md"
INTRODUCTION = """# Reliability

<!-- Written by `python tests/reliability/write_page.py`; do not edit. -->

What was tried to make a run end wrong, and how often it ended right or said so in one line. All of
it ran on CPUs, with gloo where there are two processes. Each table stands under its command.
"""


def table(result: Path) -> str:
    """The rows of one script as a Markdown table under its command."""
    kept = json.loads(result.read_text(encoding="utf-8"))
    lines = [
        f"`{kept['command']}`",
        "",
        "| tried | times | right | |",
        "| --- | ---: | ---: | --- |",
    ]
    for row in kept["rows"]:
        lines.append(f"| {row['what']} | {row['tried']} | {row['passed']} | {row['note']} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """The whole page."""
    return "\n".join([INTRODUCTION, *(table(result) for result in sorted(RESULTS.glob("*.json")))])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
