"""Every family of transformers: each kind of pruning works, or refuses in one line at once.

    python -m pytest tests/families                       # a fixed sixteenth, by the family's name
    python -m pytest --dist load -m "" tests/families     # all families

cells.py names the outcomes; only "works" and "refused" may come. docs/families.md is the table of
all of them, and write_table.py writes it.
"""

import pytest
from cells import KINDS, run_cell
from selection import marked
from tiny_families import FAMILIES, NOT_BUILT, family_names
from write_table import row, versions, written_rows, written_with

# The dense model of transformers cannot give the reference of these.
UNTESTABLE: dict[tuple[str, str], str] = {}


def test_nearly_every_family_has_a_tiny_model():
    assert len(FAMILIES) >= 0.9 * len(family_names())
    assert set(NOT_BUILT) <= set(family_names())


def test_the_page_names_every_family():
    if versions() != written_with():
        pytest.skip(f"docs/families.md was written with {written_with()}")
    assert list(written_rows()) == FAMILIES


@pytest.mark.parametrize("family", marked(FAMILIES))
def test_each_kind_of_pruning_works_or_refuses_at_once(family):
    cells = {kind: run_cell(family, kind) for kind in KINDS}
    outcomes = {kind: (cell.outcome, cell.reason) for kind, cell in cells.items()}
    good = ("works", "refused")
    wrong = {kind: x for kind, x in outcomes.items() if x[0] not in good}
    assert {kind: x for kind, x in wrong.items() if (family, kind) not in UNTESTABLE} == {}
    if versions() == written_with():
        assert written_rows()[family] == row(family, outcomes)  # else run write_table.py
