"""LaCo: windows of a fixed size, merged where the model stays similar."""

import copy
import logging

import pytest
import torch
from lively_models import lively
from tiny import tiny_model, token_windows
from torch.nn.functional import cosine_similarity

import prunelight
from prunelight.callbacks import LaCo
from prunelight.planning.fingerprints import describe_model
from prunelight.planning.fixed_windows import most_removed, slide_fixed
from prunelight.planning.plan import Plan
from prunelight.planning.steps import MergeLayers

WINDOWS = token_windows(4, 16)


@pytest.fixture(scope="module")
def model():
    """Read-only: planning changes nothing."""
    return lively(tiny_model(num_hidden_layers=8))


@torch.no_grad()
def cosine_of(model, groups):
    """Mean cosine of the final hidden states, by merging a copy and running it whole."""
    other = copy.deepcopy(model)
    if groups:
        step = MergeLayers(tuple(groups), "difference_sum")
        other = prunelight.apply(other, Plan("by hand", {}, describe_model(model), (step,)))
    x, y = (m.model(WINDOWS).last_hidden_state for m in (model, other))
    return cosine_similarity(x, y, dim=-1).mean().item()


def test_a_pass_merges_what_a_plain_loop_over_whole_models_merges(model):
    threshold = cosine_of(model, [(5, 6, 7)]) - 1e-4  # a value that some windows do not reach
    groups, high = [], 7
    while high >= 2:
        group = (high - 2, high - 1, high)
        if cosine_of(model, [*groups, group]) >= threshold:
            groups.append(group)
            high -= 3
        else:
            high -= 1
    plan = LaCo(threshold=threshold, window=3).plan(model, WINDOWS)
    (step,) = plan.steps
    assert step == MergeLayers(tuple(groups), "difference_sum")
    assert plan.found["similarity"] == pytest.approx(cosine_of(model, groups), abs=1e-5)


@pytest.mark.parametrize("number", range(6))
def test_a_number_of_layers_is_met_by_full_windows_and_a_smaller_one(model, number):
    plan = LaCo(num_layers=number, window=3).plan(model, WINDOWS)
    sizes = [len(group) for group in plan.steps[0].groups]
    assert sum(size - 1 for size in sizes) == number
    assert all(2 <= size <= 3 for size in sizes)
    pruned = prunelight.apply(copy.deepcopy(model), plan)
    assert pruned.config.num_hidden_layers == 8 - number


def test_a_threshold_that_nothing_reaches_merges_nothing_and_says_so(model, caplog):
    with caplog.at_level(logging.WARNING):
        plan = LaCo(threshold=1.0).plan(model, WINDOWS)
    assert plan.steps[0].groups == ()
    assert "threshold=1.0 merges no layer of 8" in caplog.text


def test_windows_that_all_pass_cover_the_model_from_the_top_and_spare_protected_layers():
    everything = slide_fixed(lambda groups: 1.0, 10, 0.5, 4)
    assert everything.groups == ((6, 9), (2, 5))
    spared = slide_fixed(lambda groups: 1.0, 10, 0.5, 4, protected={7})
    assert spared.groups == ((3, 6),)
    assert most_removed(10, 4, ()) == 7  # 3 + 3, and a window of the two lowest layers
    assert most_removed(10, 2, ()) == 5


WRONG = {
    "nothing": (lambda: LaCo(), "give exactly one of the three"),
    "both": (lambda: LaCo(threshold=0.5, ratio=0.2), "give exactly one of the three"),
    "above 1": (lambda: LaCo(threshold=1.5), "threshold=1.5 must be at most 1, the dense"),
    "window of 1": (lambda: LaCo(threshold=0.5, window=1), "window=1 must be at least 2"),
    "ratio": (lambda: LaCo(ratio=1.0), "ratio=1.0 must lie in"),
}


@pytest.mark.parametrize("case", WRONG)
def test_arguments_out_of_range_are_named_with_the_rule(case):
    make, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        make()


def test_what_this_model_cannot_give_is_refused_before_any_forward(model):
    with pytest.raises(ValueError, match="window=9 must be at most 8, the decoder layers"):
        LaCo(threshold=0.5, window=9).check(model)
    with pytest.raises(ValueError, match="5 of 8 layers to remove, .* of 2 layers .* at most 4"):
        LaCo(num_layers=5, window=2).check(model)
