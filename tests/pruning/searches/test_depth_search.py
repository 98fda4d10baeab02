"""Laws of the search for layers that are healed once they are gone."""

import json
from contextlib import contextmanager

import pytest
import torch
from lively_models import lively_model, plain_divergence
from tiny import tiny_model, token_windows

import prunelight
from prunelight.calibration.windows import split_windows
from prunelight.callbacks import BudgetPruning, DepthPruning
from prunelight.models.families.layers import decoder_layers
from prunelight.planning.steps import RemoveLayers
from prunelight.pruning.remove_layers import remove_layers
from prunelight.pruning.searches.depth_search import search_depth, search_windows
from prunelight.pruning.searches.healed_variants import HealedVariants
from prunelight.scoring.model_variants import VariantReplay

WINDOWS = token_windows(24, 16)


def any_layers(layers):
    return True


def test_windows_that_judge_are_not_fitted_on_and_both_are_spread():
    fitted, judging = (
        split_windows(each)[0] for each in search_windows(torch.arange(64 * 4).reshape(64, 4))
    )
    assert (len(fitted), len(judging)) == (12, 4)
    rows = [int(window[0]) // 4 for window in (*fitted, *judging)]
    assert len({*rows}) == 16
    for half in (range(32), range(32, 64)):
        assert sum(int(window[0]) // 4 in half for window in judging) == 2


def test_too_few_windows_are_refused():
    with pytest.raises(ValueError, match="2 windows: 2 of them judge"):
        DepthPruning(num_layers=1).plan(tiny_model(), WINDOWS[:2])


def test_without_healing_each_choice_is_that_of_a_plain_greedy_search():
    model = tiny_model()
    found = search_depth(model, WINDOWS, 3, may_go=any_layers, heals=False, look_back=False)
    judging = split_windows(search_windows(WINDOWS)[1])[0]
    removed = []
    for _ in range(3):
        divergences = {}
        for layer in [i for i in range(6) if i not in removed]:
            other = tiny_model()
            remove_layers(other, [*removed, layer])
            divergences[layer] = plain_divergence(model, other, judging)
        removed.append(min(divergences, key=divergences.get))
    assert found.removed == removed
    assert found.divergence == pytest.approx(min(divergences.values()), rel=1e-3, abs=1e-6)


def test_the_model_is_unchanged_afterwards_on_errors_too():
    model, same = tiny_model(), tiny_model()
    search_depth(model, WINDOWS, 3, may_go=any_layers)
    with pytest.raises(ValueError, match="no 2. layer can be removed"):
        search_depth(model, WINDOWS, 3, may_go=lambda layers: len(layers) < 2)
    for mine, other in zip(model.parameters(), same.parameters(), strict=True):
        assert torch.equal(mine, other)


@contextmanager
def variants(model):
    fitted, judging = search_windows(WINDOWS)
    with (
        VariantReplay(model, judging, "kl") as judges,
        HealedVariants(model, fitted, judges, heals=True) as healed,
    ):
        yield healed


def test_a_candidate_is_judged_as_the_variant_that_it_becomes():
    with variants(lively_model()) as search:
        for layer in (3, 4, 1):
            expected = search.divergence_without(layer)
            above = any(other > layer for other in search.removed)
            search.remove(layer)
            # Gaps above are fitted anew once a layer below them has gone.
            assert search.divergence == pytest.approx(expected, rel=0.2 if above else 1e-4)


def test_a_variant_does_not_depend_on_the_way_to_it():
    with variants(lively_model()) as search:
        for layer in (2, 3, 5):
            search.remove(layer)
        there = search.divergence
        search.restore([3, 5])
        search.restore([3])
        search.restore([3, 1])
        search.restore([5, 3, 2])
        assert search.divergence == pytest.approx(there, rel=1e-5)


def test_a_look_back_never_ends_further_away():
    for seed in range(3):
        found = [
            search_depth(
                lively_model(seed=seed), WINDOWS, 3, may_go=any_layers, look_back=look_back
            ).divergence
            for look_back in (False, True)
        ]
        assert found[1] <= found[0] + 1e-9


def test_the_plan_removes_heals_and_tells_what_it_cost():
    model = tiny_model()
    plan = DepthPruning(num_layers=2, protected=[0, -1]).plan(model, WINDOWS)
    assert [step.kind for step in plan.steps] == ["remove_layers", "heal"]
    assert not {0, 5} & {*plan.steps[0].removed}
    assert sorted(plan.found["order"]) == [*plan.steps[0].removed]
    assert plan.found["search_forwards"] > 0
    assert [score is None for score in plan.scores["kl_without"]] == [True, *[False] * 4, True]
    prunelight.apply(model, plan, WINDOWS)
    assert len(decoder_layers(model)) == 4


def test_no_layer_is_removed_where_none_is_asked_for():
    plan = DepthPruning(num_layers=0).plan(tiny_model(), WINDOWS)
    assert plan.steps == (RemoveLayers(()),)


def test_a_share_of_all_parameters_is_the_nearest_number_of_layers():
    model = tiny_model()
    plan = DepthPruning(parameter_ratio=0.3, heal="none").plan(model, WINDOWS)
    layers = sum(p.numel() for p in decoder_layers(model)[0].parameters())
    total = sum(p.numel() for p in model.parameters())
    assert abs(len(plan.steps[0].removed) * layers / total - 0.3) <= layers / total / 2


def test_states_that_are_nan_are_told():
    model = tiny_model()
    with torch.no_grad():
        for name in ("up_proj", "down_proj"):
            decoder_layers(model)[5].mlp.get_submodule(name).weight.fill_(1e30)
    with pytest.raises(ValueError, match="NaN|Inf"):
        DepthPruning(num_layers=1).plan(model, WINDOWS)


@pytest.mark.parametrize(
    "method", [DepthPruning(1, heal="none"), BudgetPruning(0.9, multiple=8, heal="none")]
)
def test_a_choice_that_overflows_is_none_in_the_plan(method):
    model = tiny_model("gpt2", dtype=torch.float16)
    with torch.no_grad():
        for layer, shift in enumerate((-40000, 40000, 40000, -40000)):
            decoder_layers(model)[layer].mlp.c_proj.bias[0] = shift
    plan = method.plan(model, token_windows(4, 8))
    assert plan.scores["kl_without"][0] is None
    json.dumps(plan.to_dict(), allow_nan=False)


@torch.no_grad()
def test_zeros_of_the_model_stay_in_what_is_judged():
    model = lively_model()
    for layer in decoder_layers(model):
        layer.mlp.down_proj.weight[:, ::2] = 0
    with variants(model) as search:
        search.remove(3)
        assert not decoder_layers(model)[2].mlp.down_proj.weight[:, ::2].any()
