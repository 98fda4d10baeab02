"""Laws of healing: what is fitted, what stays, and what is refused."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny import FAMILIES, tiny_model, token_windows

import prunelight
from prunelight.calibration.layer_walk import LayerWalk
from prunelight.callbacks import (
    DLP,
    SLEB,
    DynamicSlicing,
    LaCo,
    ShortenedLlama,
    ShortGPT,
    SliceGPT,
    SlidingLayerMerging,
    WeightPruning,
    WidthPruning,
)
from prunelight.models.families.layers import decoder_layers
from prunelight.models.families.matrices import matrices
from prunelight.planning.steps import Heal, MergeLayers, PruneWidth, RemoveLayers, Sparsify
from prunelight.pruning.healing.ends import dense_ends, layers_to_heal
from prunelight.pruning.healing.writers import writer_of
from prunelight.recovery.zeros.gradual_zeros import Schedule

HEALED_FAMILIES = ("llama", "qwen2", "phi3", "granite", "gpt2", "opt", "falcon", "cohere", "mamba")
NOT_HEALED = ("gemma2", "gemma3_text", "olmo2", "glm4", "mixtral", "rwkv")
WINDOWS = token_windows(12, 16)


def logits_of(model, windows):
    with torch.no_grad():
        return model(windows).logits


def test_layers_stand_for_the_gaps_after_them():
    assert dense_ends([RemoveLayers((2, 3))], 6) == {0: 0, 1: 3, 4: 4, 5: 5}
    assert layers_to_heal([RemoveLayers((2, 3))], 6, "model.layers") == [1]
    assert layers_to_heal([RemoveLayers((0, 5))], 6, "model.layers") == [4]
    assert layers_to_heal([RemoveLayers((0, 1))], 6, "model.layers") == []


def test_a_window_that_keeps_its_highest_layer_is_a_gap_and_a_mixed_one_heals_itself():
    top, mixed = MergeLayers(((2, 3, 4),)), MergeLayers(((2, 3, 4),), "mean")
    assert dense_ends([top], 6) == {0: 0, 1: 3, 4: 4, 5: 5}
    assert layers_to_heal([top], 6, "model.layers") == [1]
    assert dense_ends([mixed], 6) == {0: 0, 1: 1, 4: 4, 5: 5}
    assert layers_to_heal([mixed], 6, "model.layers") == [4]
    two = MergeLayers(((1, 2), (3, 4)), "mean")
    assert layers_to_heal([two], 6, "model.layers") == [2, 4]


def test_layers_whose_weights_changed_are_healed():
    width = PruneWidth(neurons={str(i): (0, 1) for i in range(6)})
    assert layers_to_heal([width], 6, "model.layers") == [*range(6)]
    zeros = Sparsify({"model.layers.3.mlp.up_proj": 0.5}, "wanda")
    assert layers_to_heal([RemoveLayers((4,)), zeros], 6, "model.layers") == [3]


@pytest.mark.parametrize("family", HEALED_FAMILIES)
def test_the_writer_is_a_matrix_that_adds_to_the_states(family):
    model = tiny_model(family)
    with LayerWalk(model, WINDOWS) as walk:
        for index, _ in walk.layers():
            writer = writer_of(walk, index)
            assert writer is not None, f"layer {index} of {family}"
            before = walk.forward(0)
            with writer.watching() as inputs:
                walk.forward(0)
            weight = writer.weight.clone()
            change = 0.1 * torch.randn_like(weight)
            writer.put(weight + change)
            expected = before + writer.scale * inputs[0].reshape(*before.shape[:2], -1) @ change.T
            torch.testing.assert_close(walk.forward(0), expected, rtol=1e-3, atol=1e-4)
            writer.put(weight)
            walk.advance()


@pytest.mark.parametrize("family", NOT_HEALED)
def test_a_family_without_a_writer_is_refused_before_anything_is_scored(family):
    model = tiny_model(family)
    with pytest.raises(TypeError, match=f"layers of {family} cannot be healed in closed form"):
        ShortGPT(num_layers=1, heal="linear").plan(model, WINDOWS)


def test_one_window_cannot_be_healed_on():
    with pytest.raises(ValueError, match="holds windows out .* 1 window is given"):
        ShortGPT(num_layers=1, heal="linear").plan(tiny_model(), WINDOWS[:1])


def test_healing_has_no_effect_with_a_schedule():
    with pytest.raises(ValueError, match="heal='linear' has no effect with a schedule"):
        DLP(0.5, schedule=Schedule(1, 5, every=2), heal="linear")


def plain_fit(model, dense, layer, end, ridge, windows):
    """The change of a Llama's down_proj, token by token from whole forwards in float64."""
    kept = {}

    def keep(name, value):
        kept[name] = value.double().reshape(-1, value.shape[-1])

    own, of_dense = decoder_layers(model)[layer], decoder_layers(dense)[end]
    handles = [
        own.register_forward_hook(lambda m, a, output: keep("output", output)),
        own.mlp.down_proj.register_forward_pre_hook(lambda m, args: keep("inputs", args[0])),
        of_dense.register_forward_hook(lambda m, a, output: keep("target", output)),
    ]
    with torch.no_grad():
        model(windows), dense(windows)
    for handle in handles:
        handle.remove()
    x, missing = kept["inputs"], kept["target"] - kept["output"]
    w = kept["target"].norm(dim=-1).reciprocal()
    gram = x.T @ (x * w[:, None])
    gram += ridge * gram.diagonal().median() * torch.eye(len(gram), dtype=torch.float64)
    return torch.linalg.solve(gram, (missing * w[:, None]).T @ x, left=False)


def test_one_gap_is_healed_as_a_plain_computation_heals_it():
    model, dense = tiny_model(), tiny_model()
    plan = ShortGPT(layers=[2, 3], heal="linear").plan(model, WINDOWS)
    step = plan.steps[1]
    assert isinstance(step, Heal)
    assert step.layers == (1,)
    outcomes = []
    prunelight.apply(model, plan, WINDOWS, outcomes=outcomes)
    ridge = outcomes[0]["ridge"][0]
    assert ridge in step.ridges
    unhealed = tiny_model()
    prunelight.apply(unhealed, ShortGPT(layers=[2, 3]).plan(unhealed, WINDOWS))
    expected = plain_fit(unhealed, dense, 1, 3, ridge, WINDOWS)
    change = (
        decoder_layers(model)[1].mlp.down_proj.weight - dense.model.layers[1].mlp.down_proj.weight
    )
    torch.testing.assert_close(change.double(), expected, rtol=1e-3, atol=1e-6)


METHODS = {
    "ShortGPT": lambda heal: ShortGPT(layers=[2, 3], heal=heal),
    "SLEB": lambda heal: SLEB(num_layers=2, heal=heal),
    "ShortenedLlama": lambda heal: ShortenedLlama(num_layers=2, protected=[0], heal=heal),
    "SLM": lambda heal: SlidingLayerMerging(num_layers=2, merge="mean", heal=heal),
    "LaCo": lambda heal: LaCo(num_layers=2, window=3, heal=heal),
    "width": lambda heal: WidthPruning(0.5, multiple=8, correction=False, heal=heal),
    "attention dropped": lambda heal: ShortGPT(num_layers=2, granularity="attention", heal=heal),
    "MLPs dropped": lambda heal: ShortGPT(num_layers=2, granularity="mlp", heal=heal),
    "SliceGPT": lambda heal: SliceGPT(0.25, heal=heal),
    "SliceGPT, one rotation": lambda heal: SliceGPT(0.25, rotation="shared", heal=heal),
    "DynamicSlicing": lambda heal: DynamicSlicing(0.3, 0.1, round_to=2, heal=heal),
    "Wanda": lambda heal: WeightPruning(0.7, heal=heal),
    "2:4": lambda heal: WeightPruning(pattern="2:4", heal=heal),
}


@pytest.mark.parametrize("name", METHODS)
def test_healing_brings_the_logits_nearer_to_the_dense_models(name):
    dense, windows = tiny_model(), token_windows(64, 16)
    target = logits_of(dense, windows)
    errors = {}
    for heal in ("none", "linear"):
        model = tiny_model()
        prunelight.apply(model, METHODS[name](heal).plan(model, windows), windows)
        errors[heal] = (logits_of(model, windows) - target).square().mean().item()
    assert errors["linear"] < 0.97 * errors["none"]


@pytest.mark.parametrize("name", METHODS)
def test_what_is_not_a_writer_keeps_its_numbers(name):
    plain, healed = tiny_model(), tiny_model()
    prunelight.apply(plain, METHODS[name]("none").plan(plain, WINDOWS), WINDOWS)
    outcomes = []
    plan = METHODS[name]("linear").plan(healed, WINDOWS)
    prunelight.apply(healed, plan, WINDOWS, outcomes=outcomes)
    fitted = set(outcomes[-1]["healed"])
    assert fitted, "nothing was healed"
    others = dict(healed.named_parameters())
    for parameter, value in plain.named_parameters():
        if parameter.removesuffix(".weight") not in fitted and name not in ("Wanda", "2:4"):
            torch.testing.assert_close(others[parameter], value, rtol=0, atol=0)


@pytest.mark.parametrize(
    "settings", [{"sparsity": 0.7}, {"sparsity": 0.005, "solver": "magnitude"}, {"pattern": "2:4"}]
)
def test_zeros_stay_zeros_and_the_model_before_the_plan_is_the_target(settings):
    plain, healed = tiny_model(), tiny_model()
    prunelight.apply(plain, WeightPruning(**settings).plan(plain, WINDOWS), WINDOWS)
    plan = WeightPruning(**settings, heal="linear").plan(healed, WINDOWS)
    prunelight.apply(healed, plan, WINDOWS)
    for name, matrix in matrices(healed).items():
        before = matrices(plain)[name].parameter
        assert not bool(((before == 0) & (matrix.parameter != 0)).any()), name


@pytest.mark.sweep
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "make",
    [
        lambda heal: ShortGPT(layers=[2, 3], heal=heal),
        lambda heal: WidthPruning(0.5, multiple=8, correction=False, heal=heal),
        lambda heal: SliceGPT(0.25, heal=heal),
    ],
    ids=["depth", "width", "slicing"],
)
def test_every_family_that_a_method_can_prune_is_healed_or_refused_in_one_line(family, make):
    dense, windows, errors = tiny_model(family), token_windows(64, 16), {}
    try:
        make("none").plan(dense, windows)
    except TypeError:
        pytest.skip("the method cannot prune this family")
    target = logits_of(dense, windows)
    if family in NOT_HEALED:
        with pytest.raises(TypeError, match="cannot be healed"):
            make("linear").plan(dense, windows)
        return
    for heal in ("none", "linear"):
        model = tiny_model(family)
        model = prunelight.apply(model, make(heal).plan(model, windows), windows)
        errors[heal] = (logits_of(model, windows) - target).square().mean().item()
    assert errors["linear"] <= errors["none"]


def test_a_plan_that_heals_does_not_say_that_calibration_is_unused():
    plans = {
        heal: ShortGPT(layers=[2], heal=heal).plan(tiny_model(), WINDOWS)
        for heal in ("none", "linear")
    }
    assert plans["none"].found["calibration_used"] is False
    assert "calibration_used" not in plans["linear"].found


def test_a_gap_that_no_layer_precedes_is_told(caplog):
    plan = ShortGPT(layers=[0, 1], heal="linear").plan(tiny_model(), WINDOWS)
    assert len(plan.steps) == 1
    assert "heal='linear' has nothing to fit" in caplog.text


def test_states_that_are_nan_are_told_and_not_fitted():
    model = tiny_model()
    plan = ShortGPT(layers=[3], heal="linear").plan(model, WINDOWS)
    with torch.no_grad():
        for name in ("up_proj", "down_proj"):
            decoder_layers(model)[1].mlp.get_submodule(name).weight.fill_(1e30)
    with pytest.raises(ValueError, match="in the hidden states after decoder layer 3"):
        prunelight.apply(model, plan, WINDOWS, strict=False)


def test_a_fit_that_does_not_help_held_out_windows_is_discarded():
    # Nothing is missing before the heal step: no fit can lower an error of zero.
    model, dense = tiny_model(), tiny_model()
    plan = ShortGPT(layers=[2], heal="linear").plan(model, WINDOWS)
    plan = replace(plan, steps=(Heal((1, 3)),))
    outcomes = []
    prunelight.apply(model, plan, WINDOWS, outcomes=outcomes)
    assert outcomes == [
        {
            "healed": [],
            "ridge": [0.0, 0.0],
            "error_before": [0.0, 0.0],
            "error_after": [0.0, 0.0],
            "notes": outcomes[0]["notes"],
            "epochs": [],
            "fitted": [],
        }
    ]
    for mine, other in zip(model.parameters(), dense.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_few_tokens_are_told():
    model = tiny_model()
    outcomes = []
    few = token_windows(4, 8)
    plan = ShortGPT(layers=[2], heal="linear").plan(model, few)
    prunelight.apply(model, plan, few, outcomes=outcomes)
    assert "fewer than its 64 inputs" in outcomes[0]["notes"][0]


def test_healing_does_not_depend_on_micro_batches_or_where_states_are_kept():
    long = token_windows(40, 100)  # two micro-batches
    plain, offloaded = tiny_model(), tiny_model()
    plan = ShortGPT(layers=[2, 3], heal="linear").plan(plain, long)
    prunelight.apply(plain, plan, long)
    prunelight.apply(offloaded, copy.deepcopy(plan), long, offload=True)
    for mine, other in zip(plain.parameters(), offloaded.parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Heal((2,)), "layers=.2. are gone after an earlier step"),
        (Heal((1,), ridges=(0.0,)), "ridges=.0.0. must be numbers above 0"),
        (Heal((1,), ridges=()), "ridges=.. must be numbers above 0"),
        (Heal((1,), mode="matrix"), "mode='matrix'"),
        (Heal((1,), mode="layer", epochs=0), "epochs=0 must be a whole number above 0"),
        (Heal((9,)), "layers=.9. must lie in"),
    ],
)
def test_a_step_that_cannot_be_carried_out_is_refused(step, message):
    model = tiny_model()
    plan = ShortGPT(layers=[2]).plan(model, WINDOWS)
    plan = replace(plan, steps=(*plan.steps, step))
    with pytest.raises(ValueError, match=message):
        prunelight.apply(model, plan, WINDOWS)
    assert len(decoder_layers(model)) == 6


def test_a_heal_step_needs_windows():
    model = tiny_model()
    plan = ShortGPT(layers=[2], heal="linear").plan(model, WINDOWS)
    with pytest.raises(ValueError, match="heal needs calibration windows"):
        prunelight.apply(model, plan)


def test_the_plan_says_what_is_healed_and_returns_from_json():
    plan = ShortGPT(layers=[2], heal="linear").plan(tiny_model(), WINDOWS)
    again = prunelight.Plan.from_dict(plan.to_dict())
    assert again.steps == plan.steps
    assert again.steps[1] == Heal((1,))


def test_windows_of_padding_that_are_to_judge_are_refused_before_any_fit():
    ids = token_windows(8, 16)
    mask = torch.ones_like(ids)
    mask[[3, 7]] = 0
    windows = {"input_ids": ids, "attention_mask": mask}
    with pytest.raises(ValueError, match="these hold padding alone; leave windows without text"):
        ShortGPT(num_layers=2, heal="linear").plan(tiny_model(), windows)
    mask[7, :2] = 1
    ShortGPT(num_layers=2, heal="linear").plan(tiny_model(), windows)
