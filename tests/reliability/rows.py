"""One line of docs/reliability.md, and the command line that every measuring script here shares."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"  # one JSON file a script, read by write_page.py


@dataclass(frozen=True)
class Row:
    """What was tried, how often, and what came of it."""

    what: str  # "kills of a gradual schedule"
    tried: int
    passed: int
    note: str = ""  # the kinds that were tried, or what the numbers leave out


def run(script: str, measure: Callable[[argparse.Namespace], list[Row]], **options: int) -> None:
    """Parse `--option N` for each option, measure, and keep the rows in results/<script>.json."""
    parser = argparse.ArgumentParser()
    for name, default in options.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    rows = measure(parser.parse_args())
    RESULTS.mkdir(exist_ok=True)
    command = " ".join(["python", f"tests/reliability/{script}.py", *sys.argv[1:]])
    revision = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(revision, capture_output=True, text=True, check=True).stdout.strip()
    measured = f"{date.today().isoformat()} ({commit})"
    kept = {"command": command, "measured": measured, "rows": [asdict(row) for row in rows]}
    (RESULTS / f"{script}.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        print(f"{row.passed} of {row.tried}  {row.what}  {row.note}")
    if any(row.passed != row.tried for row in rows):
        raise SystemExit(1)
