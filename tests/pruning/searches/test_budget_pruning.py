"""Laws of the search for what to remove so that a model costs no more than a budget."""

import itertools
import json
import math

import pytest
import torch
from lively_models import lively_model
from tiny import tiny_model, token_windows
from tiny_families import tiny_family

import prunelight
from prunelight.callbacks import BudgetPruning
from prunelight.evaluation.serving.by_layer import (
    cache_bytes_by_layer,
    measure_latency_table,
    read_latency_table,
)
from prunelight.evaluation.serving.shape import shape_cost
from prunelight.models.families.layers import decoder_layers
from prunelight.models.sizes import parameter_bytes, parameter_count
from prunelight.planning.steps import PruneWidth
from prunelight.pruning.prune_width import prune_width
from prunelight.pruning.remove_layers import remove_layers
from prunelight.pruning.searches.budget_search import _unmet, least_cost, most_layers
from prunelight.pruning.searches.costs import LayerCosts, byte_costs, parameter_costs
from prunelight.pruning.searches.width_curves import best_widths, equal_widths, predicted

WINDOWS = token_windows(24, 16)
FAMILIES = ("llama", "gpt2", "qwen2", "gemma3_text", "mixtral")
COSTS = LayerCosts(100.0, (40.0,) * 4, (8,) * 4, (3.0,) * 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_costs_of_parameters_are_those_of_the_pruned_model(family):
    model = tiny_model(family)
    costs = parameter_costs(model)
    assert costs.total() == parameter_count(model)
    narrows = min(costs.neurons) > 0
    assert narrows == (family not in ("gpt2", "mixtral"))
    kept = {layer: 8 for layer in range(len(costs.layers)) if layer not in (1, 4)}
    if narrows:
        order = {str(i): tuple(range(kept.get(i, costs.neurons[i]))) for i in range(6)}
        prune_width(model, PruneWidth({}, order))
    remove_layers(model, [1, 4])
    assert costs.total([1, 4], kept if narrows else {}) == parameter_count(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_caches_of_the_layers_add_up_to_the_models(family):
    model = tiny_model(family)
    cache = cache_bytes_by_layer(model, 16)
    assert sum(cache) == shape_cost(model, prompt_tokens=16).cache_bytes
    assert byte_costs(model, cache).total() == parameter_bytes(model) + sum(cache)


def test_equal_widths_are_the_widest_that_meet_the_budget():
    kept = equal_widths(COSTS, [1], 200, 2)
    assert kept == dict.fromkeys((0, 2, 3), 4)  # 6 leave 202
    assert COSTS.total([1], kept) <= 200


def test_widths_by_layer_have_the_least_sum_of_kl_where_each_cut_costs_more_than_the_last():
    curves = [[(0, 0.0), (2, a), (4, a + b), (6, a + b + c)] for a, b, c in RISES]
    kept = best_widths(COSTS, curves, [], 230, 2)
    sums = {
        choice: predicted(curves, COSTS, dict(enumerate(choice)))
        for choice in itertools.product((8, 6, 4, 2), repeat=4)
        if COSTS.total([], dict(enumerate(choice))) <= 230
    }
    assert tuple(kept.values()) in sums
    assert sums[tuple(kept.values())] == pytest.approx(min(sums.values()))
    assert best_widths(COSTS, curves, [], 100 + 4 * (40 - 18) - 1, 2) is None  # nothing goes so far


@pytest.mark.parametrize("neurons", [8, 10, 11])
@pytest.mark.parametrize("budget", range(60, 181, 5))
def test_widths_by_layer_are_multiples_or_whole(neurons, budget):
    multiple = 4
    costs = LayerCosts(100.0, (40.0,) * 3, (neurons,) * 3, (3.0,) * 3)
    counts = [count for count in (8, 4) if count < neurons]
    curves = [[(0, 0.0), *((neurons - n, rise * (9 - n)) for n in counts)] for rise in (1, 2, 3)]
    kept = best_widths(costs, curves, [], 100 + budget, multiple)
    if kept is not None:
        assert all(n == neurons or n % multiple == 0 for n in kept.values())
        assert costs.total([], kept) <= 100 + budget


RISES = ((0.1, 0.2, 0.9), (0.5, 0.6, 0.7), (0.01, 0.3, 0.4), (0.2, 0.25, 0.3))


@pytest.fixture(scope="module")
def plans():
    return {
        allocation: BudgetPruning(0.75, allocation=allocation, multiple=4).plan(
            lively_model(), WINDOWS
        )
        for allocation in ("uniform", "by_layer", "none")
    }


@pytest.mark.parametrize("allocation", ["uniform", "by_layer", "none"])
def test_the_plan_meets_the_budget_and_takes_the_best_that_was_measured(plans, allocation):
    plan, model = plans[allocation], lively_model()
    before, candidates = parameter_count(model), plan.found["candidates"]
    assert plan.found["kl_of_search"] == min(each["kl"] for each in candidates)
    assert all(each["cost"] <= 0.75 for each in candidates)
    pruned = prunelight.apply(model, plan, WINDOWS)
    assert parameter_count(pruned) / before == pytest.approx(plan.found["cost_left"], abs=1e-9)
    assert plan.steps[-1].kind == "heal"


def test_depth_alone_and_width_alone_are_always_among_the_candidates(plans):
    for allocation in ("uniform", "by_layer"):
        words = [each["removes"] for each in plans[allocation].found["candidates"]]
        assert any(text.startswith("0 layers") for text in words)
        assert any("neurons" not in text for text in words)
    (alone,) = plans["none"].found["candidates"]
    assert alone in plans["uniform"].found["candidates"]


def test_more_freedom_is_never_judged_worse_than_depth_or_width_alone(plans):
    kl = {allocation: plan.found["kl_of_search"] for allocation, plan in plans.items()}
    assert max(kl["by_layer"], kl["uniform"]) <= kl["none"]
    (alone,) = (c for c in plans["uniform"].found["candidates"] if not c["layers"])
    assert alone in plans["by_layer"].found["candidates"]
    assert max(kl["by_layer"], kl["uniform"]) <= alone["kl"]


def test_the_model_is_unchanged_and_the_plan_goes_through_json(plans, tmp_path):
    model, same = lively_model(), lively_model()
    plan = BudgetPruning(0.75, multiple=4).plan(model, WINDOWS)
    for mine, other in zip(model.parameters(), same.parameters(), strict=True):
        assert torch.equal(mine, other)
    plan.save(tmp_path / "plan.json")
    assert prunelight.Plan.load(tmp_path / "plan.json").steps == plan.steps


def test_widths_that_a_multiple_forbids_are_not_tried():
    plan = BudgetPruning(0.75, multiple=64).plan(lively_model(), WINDOWS)  # of 64 neurons
    assert [step.kind for step in plan.steps] == ["remove_layers", "heal"]
    assert not any("neurons" in each["removes"] for each in plan.found["candidates"])


def test_protected_layers_stay():
    plan = BudgetPruning(0.6, protected=[0, 1, -1], multiple=4).plan(lively_model(), WINDOWS)
    assert not {0, 1, 5} & {layer for step in plan.steps for layer in step.removed}


def test_a_family_without_known_neurons_loses_layers_alone():
    plan = BudgetPruning(0.75, heal="none").plan(tiny_model("mixtral"), WINDOWS)
    assert [step.kind for step in plan.steps] == ["remove_layers"]


def test_a_budget_that_is_met_already_removes_nothing():
    costs = parameter_costs(lively_model())
    assert most_layers(costs, costs.total()) == 0
    assert most_layers(costs, costs.total() - 1) == 1


def uneven_model():
    """Layers 1 and 2 have a quarter of the MLP neurons: they are smaller, and change less."""
    kept = {str(i): tuple(range(16 if i in (1, 2) else 64)) for i in range(6)}
    model = lively_model()
    prune_width(model, PruneWidth({}, kept))
    return model


@pytest.mark.parametrize("budget", [0.85, 0.75, 0.6])
def test_layers_of_any_size_meet_a_budget_by_depth_alone(budget):
    model = uneven_model()
    plan = BudgetPruning(budget, allocation="none", heal="none").plan(model, WINDOWS)
    gone = [layer for step in plan.steps for layer in step.removed]
    costs = parameter_costs(model)
    assert costs.total(gone) <= budget * costs.total()
    fewer = plan.found["depth_order"][: len(gone) - 1]
    assert costs.total(fewer) > budget * costs.total()  # none went that need not


def test_layers_go_until_the_cheapest_of_them_meet_the_budget():
    costs = LayerCosts(100.0, (40.0, 10.0, 10.0, 40.0), (0,) * 4, (0.0,) * 4)
    assert [most_layers(costs, 200 - saved) for saved in (10, 11, 20, 21, 60, 61)] == [
        *(1, 2, 2, 3, 3, 3)
    ]
    assert most_layers(costs, 180, [1]) == 2
    assert most_layers(costs, 0, [0, 3]) == 2


@pytest.mark.parametrize("family", ["gemma2", "mixtral", "rwkv"])
def test_families_without_a_closed_form_are_judged_unhealed_and_trained_in_the_end(family):
    windows = token_windows(4, 16)
    plan = BudgetPruning(0.8, heal="layer", multiple=8).plan(tiny_model(family), windows)
    assert plan.steps[-1].kind == "heal"
    assert plan.steps[-1].mode == "layer"
    assert plan.found["cost_left"] <= 0.8


@pytest.mark.parametrize(("heal", "fewest"), [("none", 3), ("linear", 4)])
def test_the_fewest_windows_are_told_and_suffice(heal, fewest):
    method = BudgetPruning(0.75, heal=heal, multiple=4)
    with pytest.raises(ValueError, match=f"{fewest - 1} windows: .* calibrate on {fewest} or"):
        method.check_calibration(lively_model(), WINDOWS[: fewest - 1])
    method.plan(lively_model(), WINDOWS[:fewest])


@pytest.mark.parametrize("arguments", [{}, {"allocation": "none"}, {"protected": [0, 1, 2]}])
def test_a_budget_that_no_plan_reaches_names_the_nearest_that_one_does(arguments):
    model = lively_model()
    method = BudgetPruning(0.05, multiple=4, **arguments)
    with pytest.raises(ValueError, match=r"budget=0.05 of the parameters cannot be met") as error:
        method.check(model)
    nearest = float(str(error.value).split("take ")[1].split(" ")[0])
    BudgetPruning(nearest, multiple=4, **arguments).check(model)
    plan = BudgetPruning(nearest, multiple=4, **arguments).plan(model, WINDOWS)
    assert plan.found["cost_left"] <= nearest


def test_a_budget_where_nothing_may_go_is_told():
    method = BudgetPruning(0.8, allocation="none", protected=[*range(6)])
    with pytest.raises(ValueError, match=r"nothing may go with allocation='none' and protected="):
        method.check(lively_model())


def test_the_least_cost_is_that_of_one_narrow_layer():
    assert least_cost(COSTS, [], 2) == 100 + 40 - 6 * 3
    assert least_cost(COSTS, [1, 3], 2) == 100 + 2 * (40 - 6 * 3)


def test_a_latency_table_is_timed_and_read_again(tmp_path):
    model = lively_model()
    table = measure_latency_table(model)
    assert len(table.layers) == len(table.mlps) == 6
    assert all(0 < mlp < layer for mlp, layer in zip(table.mlps, table.layers, strict=True))
    plan = BudgetPruning(0.95, metric="latency", multiple=4).plan(model, WINDOWS)
    plan.save(tmp_path / "plan.json")
    again = read_latency_table(str(tmp_path / "plan.json"), model)
    assert again.to_dict() == plan.found["latency_table"]
    method = BudgetPruning(
        0.95, metric="latency", multiple=4, latency_table=str(tmp_path / "plan.json")
    )
    assert method.plan(model, WINDOWS).steps == plan.steps


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "another one"}, "was timed on 'another one', and this is"),
        ({"layers": [1.0]}, "has times of 1 layers, and the model has 6"),
        ({"rest": -1.0}, "the model has 6"),
        ({"more": 1}, "holds no table"),
        ({"rest": "1.0"}, "holds no table"),
        ({"rest": math.nan}, "holds no table"),
        (None, "holds no table"),
    ],
)
def test_a_latency_table_that_does_not_fit_is_refused(change, message, tmp_path):
    model, file = lively_model(), tmp_path / "table.json"
    table = measure_latency_table(model).to_dict()
    file.write_text("[" if change is None else json.dumps(table | change))
    method = BudgetPruning(0.7, metric="latency", latency_table=str(file))
    with pytest.raises(ValueError, match=message):
        method.check(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cache_tokens": 8}, "cache_tokens=8 has no effect with metric='parameters'"),
        ({"latency_table": "x.json"}, "latency_table=x.json has no effect"),
        ({"export_remote_code": True}, "has no effect with allocation='uniform'"),
    ],
)
def test_arguments_without_effect_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        BudgetPruning(0.7, **arguments)


def test_states_that_are_nan_in_every_candidate_are_told():
    model = tiny_model()
    with torch.no_grad():
        for name in ("up_proj", "down_proj"):
            decoder_layers(model)[5].mlp.get_submodule(name).weight.fill_(1e30)
    with pytest.raises(ValueError, match="NaN|Inf"):
        BudgetPruning(0.75, multiple=4).plan(model, WINDOWS)


def test_what_a_family_lets_go_bounds_the_budget():
    assert _unmet(COSTS, 100 + 2 * 40, [0, 1], None) == ""
    assert "with 2 layers removed, as many as" in _unmet(COSTS, 100 + 2 * 40 - 1, [0, 1], None)
    assert _unmet(COSTS, 100 + 2 * (40 - 6 * 3), [0, 1], 2) == ""
    assert "2 neurons in each MLP" in _unmet(COSTS, 100 + 2 * (40 - 6 * 3) - 1, [0, 1], 2)


def test_layers_that_a_family_needs_stay():
    """Of convolutions and of attentions one of each must stay."""
    model = tiny_family("lfm2")
    before = parameter_count(model)
    plan = BudgetPruning(0.6, heal="none", allocation="none").plan(model, WINDOWS % 100)
    pruned = prunelight.apply(model, plan, WINDOWS % 100)
    assert parameter_count(pruned) <= 0.6 * before
    assert {*pruned.config.layer_types} == {"conv", "full_attention"}
