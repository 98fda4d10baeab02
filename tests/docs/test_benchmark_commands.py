"""The commands beside figures in docs still exist: their scripts import, and take their options."""

import json
import os
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


# One process for all, since each of them imports torch and lightning.
ASK_ALL = """
import contextlib, io, json, runpy, sys, traceback
for script in sys.argv[1:]:
    text = open(script, encoding="utf-8").read()
    asked = "__main__" in text and ("argparse" in text or "parser(" in text)
    said, sys.argv = io.StringIO(), [script, "--help"]
    try:
        with contextlib.redirect_stdout(said):
            runpy.run_path(script, run_name="__main__" if asked else "imported")
        fault = "--help did not end it" if asked else ""
    except SystemExit as end:
        fault = "" if end.code == 0 else f"ended with {end.code}"
    except BaseException:
        fault = traceback.format_exc()
    print(json.dumps({"script": script, "fault": fault, "said": said.getvalue()}))
"""


@pytest.fixture(scope="module")
def answers():
    done = subprocess.run(
        [sys.executable, "-c", ASK_ALL, *map(str, SCRIPTS)],
        cwd=SCRIPTS[0].parent,
        env={**os.environ, "PYTHONPATH": f"{SCRIPTS[0].parent}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {row["script"]: row for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_imports_and_tells_the_options_that_pages_give(script, answers):
    answer = answers[str(script)]
    assert not answer["fault"]
    given = [rest for name, rest in COMMANDS if ROOT / name == script]
    for option in {option for rest in given for option in re.findall(r" (--[\w-]+)", rest)}:
        assert option in answer["said"]
