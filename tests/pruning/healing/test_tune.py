"""Laws of training a layer to the dense states: `heal="layer"`."""

from dataclasses import replace

import pytest
import torch
from tiny import tiny_model, token_windows

import prunelight
from prunelight.callbacks import ShortGPT, SliceGPT, WeightPruning
from prunelight.models.families.layers import decoder_layers
from prunelight.models.families.matrices import matrices
from prunelight.planning.steps import Heal

WINDOWS = token_windows(128, 64)  # 8 micro-batches


def healed(model, method, windows=WINDOWS, **places):
    """Prune and heal a model; return it and what the heal step did."""
    outcomes = []
    model = prunelight.apply(
        model, method.plan(model, windows), windows, outcomes=outcomes, **places
    )
    return model, outcomes[-1]


@pytest.mark.parametrize(
    "make",
    [
        lambda heal: ShortGPT(layers=[2, 3], heal=heal),
        lambda heal: WeightPruning(0.7, heal=heal),
        lambda heal: SliceGPT(0.25, heal=heal),
    ],
    ids=["depth", "zeros", "slicing"],
)
def test_training_goes_further_than_the_closed_form(make):
    with torch.no_grad():
        target = tiny_model()(WINDOWS).logits
    errors = {}
    for heal in ("linear", "layer"):
        model, _ = healed(tiny_model(), make(heal))
        with torch.no_grad():
            errors[heal] = (model(WINDOWS).logits - target).square().mean().item()
    assert errors["layer"] < errors["linear"]


@pytest.mark.parametrize("family", ["gemma2", "olmo2", "mixtral", "glm4"])
def test_layers_whose_last_matrix_does_not_add_to_the_states_are_trained(family):
    _, outcome = healed(tiny_model(family), ShortGPT(layers=[2, 3], heal="layer"))
    assert outcome["ridge"] == [0.0]
    assert outcome["epochs"][0] > 0
    assert outcome["error_after"][0] < outcome["error_before"][0]


def test_only_the_layer_before_the_gap_is_trained_and_keeps_its_dtype():
    dense = tiny_model(dtype=torch.bfloat16)
    model, outcome = healed(tiny_model(dtype=torch.bfloat16), ShortGPT(layers=[2, 3], heal="layer"))
    left = [layer for i, layer in enumerate(decoder_layers(dense)) if i not in (2, 3)]
    changed = [
        not all(map(torch.equal, mine.parameters(), old.parameters()))
        for mine, old in zip(decoder_layers(model), left, strict=True)
    ]
    assert outcome["epochs"][0] > 0
    assert changed == [False, True, False, False]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("settings", [{"sparsity": 0.7}, {"pattern": "2:4"}])
def test_zeros_stay_zeros(settings):
    plain = tiny_model()
    prunelight.apply(plain, WeightPruning(**settings).plan(plain, WINDOWS), WINDOWS)
    model, outcome = healed(tiny_model(), WeightPruning(**settings, heal="layer"))
    assert all(epochs > 0 for epochs in outcome["epochs"])
    before = matrices(plain)
    for name, matrix in matrices(model).items():
        if matrix.name.startswith("model.layers.0."):  # a later layer's zeros depend on its inputs
            assert not bool(((before[name].parameter == 0) & (matrix.parameter != 0)).any()), name
        assert int((matrix.parameter == 0).sum()) >= int((before[name].parameter == 0).sum()), name


def test_a_layer_with_nothing_to_gain_keeps_its_weights():
    # Nothing is missing before the heal step: no training can lower an error of zero.
    model, dense = tiny_model(), tiny_model()
    plan = ShortGPT(layers=[2], heal="layer").plan(model, WINDOWS)
    outcomes = []
    plan = replace(plan, steps=(Heal((1, 3), "layer"),))
    prunelight.apply(model, plan, WINDOWS, outcomes=outcomes)
    assert outcomes[0]["epochs"] == [0, 0]
    for mine, old in zip(model.parameters(), dense.parameters(), strict=True):
        assert torch.equal(mine, old)


def test_training_is_the_same_again_and_with_states_kept_elsewhere():
    method = ShortGPT(layers=[2, 3], heal="layer")
    long = token_windows(40, 100)  # several micro-batches
    first, _ = healed(tiny_model(), method, long)
    again, _ = healed(tiny_model(), method, long, offload=True)
    for mine, other in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_more_epochs_are_a_matter_of_the_plan():
    plan = ShortGPT(layers=[2], heal="layer").plan(tiny_model(), WINDOWS)
    assert plan.steps[1] == Heal((1,), "layer")
    assert prunelight.Plan.from_dict(plan.to_dict()).steps == plan.steps
