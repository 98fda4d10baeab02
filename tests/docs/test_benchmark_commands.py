"""The commands beside figures in docs still exist: their scripts import, and take their options."""

import json
import re
import subprocess
import sys

import pytest
from source_tree import ROOT

SCRIPTS = sorted((ROOT / "tests" / "benchmarks").glob("*.py"))
COMMAND = re.compile(r"python (tests/benchmarks/\w+\.py)([^`\n]*)")
TOLD = [
    *(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").rglob("*.md"))),
    *(
        "\n".join(json.loads(file.read_text(encoding="utf-8")).get("commands", []))
        for file in sorted((ROOT / "docs" / "results").glob("*.json"))
    ),
]
COMMANDS = {match for text in TOLD for match in COMMAND.findall(text)}


def test_pages_name_scripts_that_are_there():
    assert {ROOT / script for script, _ in COMMANDS} <= {*SCRIPTS}


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_imports_and_tells_the_options_that_pages_give(script):
    if "argparse" not in (text := script.read_text(encoding="utf-8")) and "parser(" not in text:
        code = f"import runpy; runpy.run_path({str(script)!r}, run_name='imported')"
        told = [sys.executable, "-c", code]
    else:
        told = [sys.executable, str(script), "--help"]
    place = {"cwd": script.parent, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(told, **place)
    assert done.returncode == 0, done.stderr[-2000:]
    given = [rest for name, rest in COMMANDS if ROOT / name == script]
    for option in {option for rest in given for option in re.findall(r" (--[\w-]+)", rest)}:
        assert option in done.stdout
