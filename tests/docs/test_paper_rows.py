"""Each row of a paper that is not missing has a test, and what it names is there."""

import ast
import inspect
import json
import re

import pytest
from source_tree import ROOT

import prunelight.callbacks
from prunelight.comparison.papers.catalog import table_of

FOLDER = ROOT / "docs" / "papers"
ROWS = json.loads((FOLDER / "rows.json").read_text(encoding="utf-8"))
TESTS = json.loads((FOLDER / "tests.json").read_text(encoding="utf-8"))
GIVEN = [
    pytest.param(paper, row, by, id=f"{paper}: {row}")
    for paper, rows in ROWS.items()
    for row, by, *_ in rows
    if not by.startswith("missing")
]


def functions_of(file):
    """Return the names of the test functions of a file."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(("paper", "row", "by"), GIVEN)
def test_a_row_names_a_test_that_is_there(paper, row, by):
    assert row in TESTS[paper], f"docs/papers/tests.json lacks the row {row!r}"
    file, _, name = TESTS[paper][row].partition("::")
    assert name.startswith("test_")
    assert name in functions_of(file)


def test_no_test_is_told_for_a_row_that_is_gone():
    given = {(case.values[0], case.values[1]) for case in GIVEN}
    assert {(paper, row) for paper, rows in TESTS.items() for row in rows} == given


@pytest.mark.parametrize(("paper", "row", "by"), GIVEN)
def test_what_gives_a_row_is_there(paper, row, by):
    spans = re.findall(r"`([^`]+)`", by)
    assert spans, "a row is given by code"
    configs = {path.name for path in (ROOT / "configs").rglob("*.yaml")}
    for span in spans:
        if re.fullmatch(r"\w+\.yaml", span):
            assert span in configs
        elif command := re.match(r"prunelight compare --config (\S+\.yaml)", span):
            assert command[1] in configs
        elif command := re.match(r"prunelight reproduce (\w+)(?: .*?--table (\w+))?", span):
            assert table_of(command[1], command[2])
        elif call := re.fullmatch(r"([A-Z]\w+)(?:\((.*)\))?", span):
            arguments = inspect.signature(getattr(prunelight.callbacks, call[1])).parameters
            assert {*re.findall(r"(\w+)=", call[2] or "")} <= {*arguments}
