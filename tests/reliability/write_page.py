"""Write docs/reliability.md from the results of the scripts beside this one.

python tests/reliability/kills.py --kills 100     # each script measures and keeps its rows
python tests/reliability/write_page.py            # then the page
"""

from __future__ import annotations

import ast
import json
from pathlib import Path

from rows import RESULTS, ROOT

PAGE = ROOT / "docs" / "reliability.md"
INTRODUCTION = """# Reliability

<!-- Written by `python tests/reliability/write_page.py`; do not edit. -->

What was tried to make a run end wrong, and how often it ended right or said so in one line. All of
it ran on CPUs, with gloo where there are two processes, on tiny random models; only the run of
`quickstart.yaml` is of SmolLM2-135M-Instruct, from a Q4_1 GGUF and de-quantized.
"""
HEADINGS = {
    "kills": "Kills",
    "damage": "Damaged files",
    "identity": "Other settings on resume",
    "inputs": "Wrong input",
    "malicious": "Files that hold code",
    "strategies": "One process, DDP and FSDP2",
    "cost_table": "Where the time goes",
}


def section(script: str) -> str:
    """The rows of one script as a Markdown table, with what the script does and its command."""
    kept = json.loads((RESULTS / f"{script}.json").read_text(encoding="utf-8"))
    source = Path(__file__).with_name(f"{script}.py").read_text(encoding="utf-8")
    summary = str(ast.get_docstring(ast.parse(source))).partition("\n\n")[0]
    rows = [
        f"| {row['what']} | {row['tried']} | {row['passed']} | {row['note']} |"
        for row in kept["rows"]
    ]
    lines = [
        f"## {HEADINGS[script]}",
        "",
        " ".join(summary.split()),
        "",
        "| tried | times | right | |",
        "| --- | ---: | ---: | --- |",
        *rows,
        "",
        f"Measured {kept['measured']} by `{kept['command']}`.",
    ]
    return "\n".join(lines) + "\n"


def page() -> str:
    """The whole page."""
    return "\n".join([INTRODUCTION, *map(section, HEADINGS)])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
