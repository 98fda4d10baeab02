"""Laws of matrices before gaps: `heal="operator"`."""

import copy

import pytest
import tiny
import torch
from accelerate import dispatch_model
from own_models import own_model, with_operators
from tiny import tiny_model, token_windows
from transformers import AutoModelForImageTextToText, Gemma3Config

import prunelight
from prunelight.callbacks import (
    SLEB,
    DepthPruning,
    ShortenedLlama,
    ShortGPT,
    SliceGPT,
    WidthPruning,
)
from prunelight.evaluation.report.plan_facts import healing_lines
from prunelight.models.families.layers import decoder_layers
from prunelight.models.families.own_classes.dropped_sublayers import GapOperator
from prunelight.planning.plan import Plan
from prunelight.planning.steps import DropSublayers, Heal, PruneWidth, RemoveLayers
from prunelight.pruning.healing.gap_operator import check_operators

WINDOWS = token_windows(128, 64)  # 8 micro-batches
ALWAYS = ("llama", "gpt2", "gemma2", "olmo2", "opt", "qwen3_moe", "mamba")
FAMILIES = [
    family if family in ALWAYS else pytest.param(family, marks=pytest.mark.sweep)
    for family in {**tiny.FAMILIES, **tiny.UNKNOWN_FAMILIES}
]


def healed(heal, layers=(2, 3), family="llama", outcomes=None):
    """Return a tiny model without some layers, healed in a mode."""
    plan = ShortGPT(layers=[*layers], heal=heal).plan(tiny_model(family), WINDOWS)
    return prunelight.apply(tiny_model(family), plan, WINDOWS, outcomes=outcomes)


def operators(model):
    return [name for name, module in model.named_modules() if isinstance(module, GapOperator)]


def test_the_plan_names_the_layers_before_gaps_and_one_matrix_stands_behind_each():
    plan = ShortGPT(layers=[1, 3, 4], heal="operator").plan(tiny_model(), WINDOWS)
    assert plan.steps == (RemoveLayers((1, 3, 4)), Heal((0, 2), "operator"))
    model = prunelight.apply(tiny_model(), plan, WINDOWS)
    assert operators(model) == ["model.layers.0.gap_operator", "model.layers.1.gap_operator"]


def held_out_error(model, layer, dense, dense_layer):
    """Return the error of a layer's inputs on the windows that judge, as `HealOutcome` has it."""
    held_out = WINDOWS[3::4]
    targets = dense(held_out, output_hidden_states=True).hidden_states[dense_layer]
    states = model(held_out, output_hidden_states=True).hidden_states[layer]
    weights = 1 / targets.norm(dim=-1)
    error = ((states - targets).square().sum(-1) * weights).sum()
    return float(error / (targets.square().sum(-1) * weights).sum())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layer_before_the_gap_comes_closer_than_by_its_last_matrix_alone(family):
    outcomes = []
    model = healed("operator", family=family, outcomes=outcomes)
    operator = outcomes[-1]
    assert operator["error_after"][0] < operator["error_before"][0]
    assert any(name.endswith("gap_operator") for name in operator["healed"])
    (place,) = operators(model)
    assert model.get_submodule(place).weight.abs().max() > 0
    if family in ("llama", "gpt2", "opt"):  # whose layers can be healed by their last matrix
        linear = []
        healed("linear", family=family, outcomes=linear)
        assert operator["error_after"][0] <= linear[-1]["error_after"][0]


def test_what_is_told_is_what_the_healed_layer_does():
    """The state behind the gap is as near to the dense one as the outcome says."""
    dense, outcomes = tiny_model(), []
    model = healed("operator", outcomes=outcomes)
    share = held_out_error(model, 2, dense, 4)
    # The weights that are taken are fitted on the held-out windows too, so they are a bit better.
    assert 0.5 * outcomes[-1]["error_after"][0] < share <= outcomes[-1]["error_after"][0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_result_reloads_and_generates(family, tmp_path, tiny_tokenizer):
    model = healed("operator", family=family)
    prunelight.save(model, tiny_tokenizer, tmp_path / "saved")
    loaded, _ = prunelight.load(tmp_path / "saved", dtype="float32")
    ids = WINDOWS[:2, :8]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    # The cache of transformers' own RWKV gives other tokens, without any matrix.
    assert generates_alike(model, ids) or not generates_alike(tiny_model(family), ids)


def generates_alike(model, ids):
    """Return whether a model continues ids with its cache as without."""
    options = {"max_new_tokens": 6, "do_sample": False}
    cached = model.generate(ids, **options)
    return torch.equal(cached, model.generate(ids, **options, use_cache=False))


@pytest.mark.parametrize("method", [SLEB, ShortenedLlama, DepthPruning])
def test_methods_that_search_offer_it_too(method):
    method = method(num_layers=2, heal="operator", protected=[0, -1])
    plan = method.plan(tiny_model(), WINDOWS[:8])
    assert plan.steps[-1].mode == "operator"
    assert operators(prunelight.apply(tiny_model(), plan, WINDOWS[:8]))


def test_a_matrix_goes_with_its_layer_and_stays_with_it():
    model = healed("operator")  # behind layer 1 of 4
    weight = copy.deepcopy(model.model.layers[1].gap_operator.weight)
    first = ShortGPT(layers=[0]).plan(model, WINDOWS)
    shorter = prunelight.apply(copy.deepcopy(model), first, WINDOWS)
    assert operators(shorter) == ["model.layers.0.gap_operator"]
    assert torch.equal(shorter.model.layers[0].gap_operator.weight, weight)
    assert shorter.config.gap_operators == [True, False, False]
    own = ShortGPT(layers=[1]).plan(model, WINDOWS)
    assert not operators(prunelight.apply(model, own, WINDOWS))


def test_a_second_gap_behind_the_same_layer_is_healed_through_the_same_matrix():
    model, outcomes = healed("operator"), []
    before = copy.deepcopy(model)
    plan = ShortGPT(layers=[2], heal="operator").plan(model, WINDOWS)
    model = prunelight.apply(model, plan, WINDOWS, outcomes=outcomes)
    assert operators(model) == ["model.layers.1.gap_operator"]
    assert outcomes[-1]["error_after"][0] < outcomes[-1]["error_before"][0]
    assert held_out_error(model, 2, before, 3) <= outcomes[-1]["error_after"][0]


def test_a_fit_that_does_not_help_leaves_matrices_of_zeros():
    """Nothing is missing behind a layer that stands for one which hands on what it gets."""
    dense = tiny_model()
    gone = dense.model.layers[2]
    for weight in (gone.self_attn.o_proj.weight, gone.mlp.down_proj.weight):
        weight.data.zero_()
    plan, outcomes = ShortGPT(layers=[2], heal="operator").plan(dense, WINDOWS), []
    expected = dense(WINDOWS[:4]).logits
    model = prunelight.apply(dense, plan, WINDOWS, outcomes=outcomes)
    assert (outcomes[-1]["ridge"], outcomes[-1]["healed"]) == ([0.0], [])
    assert torch.equal(model(WINDOWS[:4]).logits, expected)


@pytest.mark.parametrize("layers", [(0,), (1, 4)])
def test_other_gaps_are_healed_in_closed_form_afterwards(layers):
    model, outcomes = with_operators(tiny_model(), layers), []
    plan = ShortGPT(layers=[3], heal="linear").plan(model, WINDOWS)
    prunelight.apply(model, plan, WINDOWS, outcomes=outcomes)
    assert outcomes[-1]["healed"] == ["model.layers.2.mlp.down_proj"]


def test_a_layer_with_a_matrix_behind_it_is_told_not_to_be_healed_without(caplog):
    model, outcomes = with_operators(tiny_model(), [2]), []
    plan = ShortGPT(layers=[3], heal="linear").plan(model, WINDOWS)
    prunelight.apply(model, plan, WINDOWS, outcomes=outcomes)
    assert outcomes[-1]["healed"] == []
    (told,) = outcomes[-1]["notes"]
    assert "layer 2 was not healed: an earlier run put a matrix behind it" in told


def test_a_matrix_can_stand_behind_a_layer_without_weights():
    steps = DropSublayers((2,), (2,)), RemoveLayers((3,)), Heal((2,), "operator")
    made = ShortGPT(layers=[3]).plan(tiny_model(), WINDOWS)
    plan = Plan(**{**vars(made), "steps": steps})
    model = prunelight.apply(tiny_model(), plan, WINDOWS)
    assert operators(model) == ["model.layers.2.gap_operator"]


def test_what_was_fitted_is_told_of_each_layer():
    plan, outcomes = ShortGPT(layers=[2, 3], heal="operator").plan(tiny_model(), WINDOWS), []
    prunelight.apply(tiny_model(), plan, WINDOWS, outcomes=outcomes)
    (line,) = healing_lines(plan.steps[-1], outcomes[-1])
    assert "down_proj, gap_operator)" in line


def test_zeros_stay_zeros():
    dense = tiny_model()
    weight = dense.model.layers[1].mlp.down_proj.weight
    weight.data[:, ::2] = 0
    plan = ShortGPT(layers=[2, 3], heal="operator").plan(dense, WINDOWS)
    model = prunelight.apply(dense, plan, WINDOWS)
    assert not model.model.layers[1].mlp.down_proj.weight[:, ::2].any()
    assert model.model.layers[1].gap_operator.weight.any()


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        (ShortGPT, {"ratio": 0.5, "granularity": "mlp"}, "matrices stand in for whole layers"),
        (ShortGPT, {"parameter_ratio": 0.2}, "heal='operator' adds matrices.*give num_layers"),
        (DepthPruning, {"parameter_ratio": 0.2}, "heal='operator' adds matrices"),
        (ShortGPT, {"ratio": 0.5, "loads_in": ["vLLM"]}, "a matrix behind them.*heal='linear'"),
    ],
)
def test_arguments_that_contradict_it_are_refused(method, arguments, message):
    with pytest.raises(ValueError, match=message):
        method(**arguments, heal="operator")


def sliced():
    plan = SliceGPT(0.25, embedding="full").plan(tiny_model(), WINDOWS)
    return prunelight.apply(tiny_model(), plan, WINDOWS)


def placed():
    """Return a model with the hooks of accelerate's device_map."""
    model = tiny_model()
    return dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)


def tiny_gemma3():
    widths = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    vision = {**widths, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    return Gemma3Config(text_config={**widths, **heads, "vocab_size": 64}, vision_config=vision)


REFUSED = {
    "sliced": (sliced, "its layers are sliced.*take heal='linear'"),
    "of different widths": (lambda: own_model("widths", "llama"), "of different widths"),
    "placed by accelerate": (placed, "accelerate placed it"),
    "of another table": (
        lambda: AutoModelForImageTextToText.from_config(tiny_gemma3()),
        "its text decoder is a part of a larger model",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_cannot_have_them_are_refused_before_scores(case):
    make, message = REFUSED[case]
    with pytest.raises(TypeError, match=message):
        check_operators(make())


def test_width_goes_before_them():
    model = with_operators(tiny_model(), [1])
    for allocation in ("uniform", "global"):
        with pytest.raises(TypeError, match="matrices stand at gaps.*prune its width first"):
            WidthPruning(0.25, 0.5, multiple=8, allocation=allocation).plan(model, WINDOWS)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((Heal((1,), "operator"),), "none of layers=.* lies before one"),
        (
            (
                RemoveLayers((2,)),
                PruneWidth(neurons={0: (0, 1), 1: (0, 1, 2), 3: (0, 1), 4: (0,), 5: (0,)}),
                Heal((1,), "operator"),
            ),
            "no class describes layers of different widths",
        ),
    ],
)
def test_plans_that_contradict_it_are_refused_before_the_model_changes(steps, message):
    model = tiny_model()
    made = ShortGPT(layers=[2]).plan(model, WINDOWS)
    plan = Plan.from_dict({**made.to_dict(), "steps": []})
    plan = Plan(**{**vars(plan), "steps": steps})
    before = [weight.clone() for weight in model.parameters()]
    with pytest.raises((TypeError, ValueError), match=message):
        prunelight.apply(model, plan, WINDOWS)
    assert all(map(torch.equal, before, model.parameters()))
    assert len(decoder_layers(model)) == 6
