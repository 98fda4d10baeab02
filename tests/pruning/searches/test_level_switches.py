"""Laws of variants with fewer neurons, and of the search that switches neurons between layers."""

from contextlib import contextmanager

import pytest
import torch
from lively_models import lively_model, plain_divergence
from tiny import token_windows

import prunelight
from prunelight.calibration.windows import split_windows
from prunelight.callbacks import BudgetPruning
from prunelight.models.families.layers import decoder_layers, first_tensor
from prunelight.pruning.searches.costs import LayerCosts, parameter_costs
from prunelight.pruning.searches.depth_search import search_windows
from prunelight.pruning.searches.healed_variants import HealedVariants
from prunelight.pruning.searches.level_switches import switched_widths
from prunelight.pruning.searches.width_curves import width_curves
from prunelight.scoring.model_variants import VariantReplay
from prunelight.scoring.width_scores import width_scores

WINDOWS = token_windows(24, 16)
CURVES = [[(0, 0.0), (64, 1.0)]] * 6


def order_of(model):
    scores = width_scores(model, WINDOWS, "wanda", ["neurons"])["neurons"]
    return [score.argsort(descending=True).tolist() for score in scores]


@contextmanager
def variants(model, **options):
    fitted, judging = search_windows(WINDOWS)
    order = order_of(model)
    with (
        VariantReplay(model, judging, "kl") as judges,
        HealedVariants(model, fitted, judges, order=order, **{"heals": True, **options}) as healed,
    ):
        yield healed


def plainly_narrowed(model, layer, kept, windows):
    """Fit the neurons that a layer keeps to the states that it hands on, in place."""
    module = decoder_layers(model)[layer]
    inputs, states = [], []
    handles = [
        module.mlp.down_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0])),
        module.register_forward_hook(lambda _, args, output: states.append(first_tensor(output))),
    ]
    model(windows)
    for handle in handles:
        handle.remove()
    x, target = (each[0].flatten(0, 1).double() for each in (inputs, states))
    gone = [i for i in range(x.shape[1]) if i not in kept]
    weight = module.mlp.down_proj.weight
    root = target.norm(dim=-1).rsqrt()[:, None]
    lost = x[:, gone] @ weight[:, gone].double().T
    gram = (root * x[:, kept]).T @ (root * x[:, kept])
    ridge = gram.diagonal().median() * torch.eye(len(kept))
    weight[:, kept] += torch.linalg.solve(gram + ridge, (root * x[:, kept]).T @ (root * lost)).T
    weight[:, gone] = 0


@torch.no_grad()
def test_a_point_of_a_curve_is_the_kl_of_a_layer_that_is_plainly_narrowed():
    fitted, judging = (split_windows(each)[0] for each in search_windows(WINDOWS))
    model, order = lively_model(), order_of(lively_model())
    with variants(model) as search:
        curves = width_curves(search, [64] * 6, 4)
    assert [[gone for gone, _ in curve] for curve in curves] == [[0, 16, 32, 48, 56]] * 6
    for layer, point in ((0, 2), (3, 4), (5, 3)):
        gone, kl = curves[layer][point]
        narrow = lively_model()
        plainly_narrowed(narrow, layer, sorted(order[layer][: 64 - gone]), fitted)
        plain = plain_divergence(model, narrow, judging)
        assert kl == pytest.approx(plain, rel=1e-2, abs=1e-6)


@pytest.mark.parametrize("heals", [True, False])
def test_a_layer_is_judged_with_fewer_neurons_as_the_variant_that_it_becomes(heals):
    with variants(lively_model(), heals=heals) as search:
        search.restore([2], {0: 48, 4: 32})
        for layer, count in ((5, 16), (4, 48), (4, 64), (5, 64)):
            (expected,) = search.divergences_with(layer, [count])
            # No layer above is fitted, so that nothing else changes.
            kept = {**search.kept, layer: count}
            above = [i for i in search.kept if i > layer]
            search.restore([2], kept)
            assert search.divergence == pytest.approx(expected, rel=0.2 if above else 1e-5)


def test_a_variant_with_fewer_neurons_does_not_depend_on_the_way_to_it():
    with variants(lively_model()) as search:
        search.restore([3], {0: 32, 4: 16, 5: 48})
        there = search.divergence
        search.restore([3, 1], {0: 32, 2: 8})
        search.restore([], {5: 8})
        search.restore([3], {5: 48, 4: 16, 0: 32})
        assert search.divergence == pytest.approx(there, rel=1e-5)
        search.restore([], {})
        assert search.divergence == pytest.approx(0, abs=1e-5)


def test_a_neuron_that_goes_has_zeros_and_the_model_is_unchanged_afterwards():
    model, same = lively_model(), lively_model()
    order = order_of(model)
    with variants(model) as search:
        search.restore([2], {4: 16})
        columns = decoder_layers(model)[4].mlp.down_proj.weight.abs().amax(0)
        assert {*columns.nonzero().flatten().tolist()} == {*order[4][:16]}
    for mine, other in zip(model.parameters(), same.parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("multiple", [4, 16])
@pytest.mark.parametrize("seed", range(3))
def test_switches_lower_the_kl_within_the_budget(seed, multiple):
    model = lively_model(seed=seed)
    costs, kept = parameter_costs(model), {i: 32 for i in range(6) if i != 3}
    budget = costs.total([3], kept)
    with variants(model) as search:
        search.restore([3], kept)
        before = search.divergence
        switched = switched_widths(search, kept, CURVES, costs, budget, multiple)
        assert switched != kept
        assert search.divergence < before
        search.restore([3], switched)  # the variant is that of the widths that were returned
        after = search.divergence
        search.restore([], {})
        search.restore([3], switched)
        assert search.divergence == pytest.approx(after, rel=1e-5)
    assert costs.total([3], switched) <= budget
    assert all(0 < count <= 64 and count % multiple == 0 for count in switched.values())


def test_layers_of_other_costs_switch_within_the_budget_too():
    model = lively_model()
    real = parameter_costs(model)
    neuron = tuple(cost * (1 + 2 * (i % 2)) for i, cost in enumerate(real.neuron))
    costs, kept = (
        LayerCosts(real.rest, real.layers, real.neurons, neuron),
        dict.fromkeys(range(6), 32),
    )
    budget = costs.total([], kept)
    with variants(model) as search:
        assert costs.total([], switched_widths(search, kept, CURVES, costs, budget, 4)) <= budget


@pytest.mark.parametrize("room", [4, 16, 40])
def test_neurons_that_the_budget_has_room_for_are_given_to_layers(room):
    model = lively_model()
    costs, kept = parameter_costs(model), dict.fromkeys(range(6), 32)
    budget = costs.total([], kept) + room * costs.neuron[0]
    with variants(model) as search:
        search.restore([], kept)
        before = search.divergence
        switched = switched_widths(search, kept, CURVES, costs, budget, 4)
        assert search.divergence < before
    assert costs.total([], kept) < costs.total([], switched) <= budget


CLOSED_FORM = ("llama", "phi3", "qwen3")


@pytest.mark.parametrize(
    ("family", "heal"),
    [
        *((family, "linear") for family in CLOSED_FORM),
        *((family, "none") for family in (*CLOSED_FORM, "gemma2")),  # norms its MLP
    ],
)
def test_families_with_widths_by_layer_switch_them(family, heal):
    method = BudgetPruning(0.7, allocation="by_layer", multiple=4, heal=heal)
    model = lively_model(family)
    plan = method.plan(model, WINDOWS)
    candidates = plan.found["candidates"]
    switched = [each for each in candidates if each["removes"].endswith("switched")]
    assert switched or "neurons" not in candidates[0]["removes"]
    assert all(each["cost"] <= 0.7 for each in candidates)
    assert plan.found["kl_of_search"] == min(each["kl"] for each in candidates)
    corrections = [step.correction for step in plan.steps if step.kind == "prune_width"]
    assert {*corrections} <= {heal == "none"}  # healing fits the same matrices
    prunelight.apply(model, plan, WINDOWS)
