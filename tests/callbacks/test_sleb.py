"""SLEB: the same removals as a plain greedy search, at a fraction of the cost."""

import math

import pytest
import reference_sliding as reference
from lively_models import lively, nll_without
from tiny import tiny_model, token_windows

from prunelight.callbacks import SLEB
from prunelight.scoring.remembered import Memory, remembering_scores
from prunelight.scoring.similarity import CRITERIA

WINDOWS = token_windows(4, 16)


@pytest.fixture(scope="module")
def model():
    """Read-only: planning changes nothing."""
    return lively(tiny_model(num_hidden_layers=8))


def test_sleb_removes_what_a_plain_greedy_search_removes(model):
    removed = []
    for _ in range(4):
        free = [i for i in range(1, 7) if i not in removed]
        removed.append(min(free, key=lambda i: nll_without(model, [*removed, i], WINDOWS)))
    plan = SLEB(num_layers=4).plan(model, WINDOWS)
    assert plan.found["order"] == removed
    dense = nll_without(model, [], WINDOWS)
    found = math.exp(dense - nll_without(model, removed, WINDOWS))
    assert plan.found["similarity"] == pytest.approx(found, abs=1e-5)


def test_sleb_needs_fewer_layers_than_whole_forwards(model):
    plan = SLEB(num_layers=3).plan(model, WINDOWS)
    naive = 8 + 6 * 7 + 5 * 6 + 4 * 5  # the deeper the model, the nearer to half
    assert 1.5 * plan.found["layer_forwards"] < naive


@pytest.mark.parametrize("criterion", CRITERIA)
def test_sleb_follows_its_criterion(model, criterion):
    scores = {}
    for index in range(1, 7):
        other = reference.merged_model(model, [(index, index + 1)], "top")
        scores[index] = reference.similarity(model, other, WINDOWS, criterion)
    plan = SLEB(num_layers=1, criterion=criterion).plan(model, WINDOWS)
    assert plan.found["order"] == [max(scores, key=scores.get)]
    assert plan.scores["similarity_without"][1:7] == pytest.approx(list(scores.values()), abs=2e-6)


def test_a_layer_whose_removal_overflows_stays():
    model = tiny_model(num_hidden_layers=8, mlp_bias=True)
    for index, value in ((2, 60000), (3, -60000), (4, 60000), (5, -60000)):
        model.model.layers[index].mlp.down_proj.bias.data[0] = value
    model.half()
    plan = SLEB(num_layers=1, protected=[0]).plan(model, WINDOWS)
    assert plan.scores["similarity_without"][3] is None
    assert plan.steps[0].layers != (3,)
    with pytest.raises(ValueError, match="no 1. layer can be removed: .* NaN"):
        SLEB(num_layers=1, protected=[0, 1, 2, 4, 5, 6, 7]).plan(model, WINDOWS)


def test_an_amount_more_goes_on_from_the_layers_that_an_amount_less_removed(model):
    alone = SLEB(num_layers=4).plan(model, WINDOWS)
    with remembering_scores(Memory()) as memory:
        first = SLEB(num_layers=2).plan(model, WINDOWS)
        second = SLEB(num_layers=4).plan(model, WINDOWS)
        again = SLEB(num_layers=4).plan(model, WINDOWS)
    assert (second.steps, second.scores) == (alone.steps, alone.scores)
    assert second.found["order"] == alone.found["order"]
    assert second.found["similarity"] == alone.found["similarity"]
    forwards = [plan.found["layer_forwards"] for plan in (alone, first, second, again)]
    assert forwards[1] + forwards[2] < forwards[0] + 2 * 8  # the dense model, and the shorter one
    assert forwards[3] == 0
    assert memory.seconds_spared > 0
