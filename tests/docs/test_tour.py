"""The tour names files and functions that are there, few enough to open them all."""

import ast
import re

import pytest
from source_tree import ROOT

TOUR = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
STOPS = dict(re.findall(r"^### \d+\. `([\w/.]+)`\n\n(.*?)(?=^##|\Z)", TOUR, re.DOTALL | re.M))
FILES = sorted(set(re.findall(r"`((?:prunelight|callbacks)/[\w/]+\.py)`", TOUR)))


def names_in(path):
    """Names that a file defines, methods and constants too."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    nodes = [*ast.walk(tree)]
    defined = {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    return defined | {n.id for n in nodes if isinstance(n, ast.Name)}


def test_a_fit_is_followed_by_opening_at_most_a_dozen_files():
    numbers = [int(n) for n in re.findall(r"^### (\d+)\. ", TOUR, re.M)]
    assert numbers == [*range(1, len(STOPS) + 1)]
    assert len(STOPS) <= 12


@pytest.mark.parametrize("path", FILES)
def test_each_file_of_the_tour_is_there(path):
    assert (ROOT / path).is_file()


@pytest.mark.parametrize("path", STOPS)
def test_each_function_of_a_stop_is_in_its_file(path):
    named = set(re.findall(r"`(?:[A-Z]\w+\.)?(\w+)`", STOPS[path]))
    elsewhere = {"fit", "yaml", "Plan", "AutoModelForCausalLM", "Run"}
    classes = {"Trainer", "RecoveryModule", "TextDataModule"}  # made here, defined elsewhere
    assert named - elsewhere - classes <= names_in(path)
