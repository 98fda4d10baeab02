"""One process, DDP and FSDP2 in two: the same best weights, dtypes and gradual zeros."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "reliability"))

import strategies


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return the fast cases, each fitted under every strategy."""
    return strategies.launch(tmp_path_factory.mktemp("strategies"), list(strategies.FAST))


@pytest.mark.parametrize("title", strategies.FAST)
def test_strategies_agree(title, results):
    assert not strategies.fault(title, results[title])


@pytest.mark.slow
@pytest.mark.sweep
def test_strategies_agree_in_all_kinds_of_run(tmp_path):
    titles = list(strategies.CASES)
    results = strategies.launch(tmp_path, titles, limit=3600)
    assert not [text for title in titles if (text := strategies.fault(title, results[title]))]
