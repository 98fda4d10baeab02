import copy
import logging
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from tiny import NUM_LAYERS, tiny_model, token_windows
from transformers import AutoConfig, AutoModelForCausalLM

import prunelight
from prunelight.models.families.architectures import ARCHITECTURES
from prunelight.models.families.config_fields import cut_config
from prunelight.models.families.layers import decoder_layers, layers_path, matrices
from prunelight.models.sizes import parameter_count
from prunelight.planning.fingerprints import describe_model
from prunelight.planning.plan import Plan, planned_sparsity
from prunelight.planning.steps import STEPS, RemoveLayers, Sparsify, Step
from prunelight.pruning.apply import KINDS
from prunelight.pruning.remove_layers import remove_layers
from prunelight.pruning.sparsity.sparsify import sparsify

WINDOWS = token_windows()


def plan_for(model, *steps):
    return Plan(
        method="by hand",
        arguments={},
        model=describe_model(model),
        steps=tuple(RemoveLayers(layers) for layers in steps),
    )


def snapshot(model):
    """Return what must not change: config, weights, indices and the layers themselves."""
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return model.config.to_dict(), weights, layer_indices(model), list(decoder_layers(model))


def check_unchanged(model, before):
    config, weights, indices, layers = before
    assert model.config.to_dict() == config
    assert list(model.state_dict()) == list(weights)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert layer_indices(model) == indices
    assert all(now is then for now, then in zip(decoder_layers(model), layers, strict=True))


def check_equal(model, other):
    assert model.config.to_dict() == other.config.to_dict()
    weights = other.state_dict()
    assert set(model.state_dict()) == set(weights)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert layer_indices(model) == layer_indices(other)


def layer_indices(model):
    """Return the set of indices that each layer's modules hold for the cache."""
    return [
        {
            getattr(module, name)
            for module in layer.modules()
            for name in ("layer_idx", "layer_id")
            if hasattr(module, name)
        }
        for layer in decoder_layers(model)
    ]


def reloaded(model, directory):
    model.save_pretrained(directory)
    return AutoModelForCausalLM.from_pretrained(directory)


@torch.no_grad()
def logits(model):
    return model(WINDOWS, use_cache=False).logits


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe"])
def test_removing_no_layers_changes_nothing(family):
    model = tiny_model(family)
    before = snapshot(model)
    remove_layers(model, [])
    check_unchanged(model, before)
    assert prunelight.apply(model, plan_for(model, ())) is model
    check_unchanged(model, before)


def test_apply_is_in_place_and_logs_the_parameters(caplog):
    model = tiny_model()
    before = parameter_count(model)
    with caplog.at_level(logging.INFO, logger="prunelight.pruning.apply"):
        assert prunelight.apply(model, plan_for(model, (1, 4))) is model
    after = parameter_count(model)
    assert after < before
    share = 100 * (after / before - 1)
    assert caplog.messages == [
        f"parameters {before / 1e6:.1f}M -> {after / 1e6:.1f}M ({share:+.1f} %)"
    ]


def test_the_kept_layers_are_the_same_objects_in_the_same_order():
    model = tiny_model()
    layers = list(decoder_layers(model))
    remove_layers(model, (4, 1))
    expected = [layers[i] for i in (0, 2, 3, 5)]
    assert all(a is b for a, b in zip(decoder_layers(model), expected, strict=True))
    assert model.config.num_hidden_layers == 4


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "mamba", "rwkv"])
def test_the_kept_layers_are_renumbered(family):
    model = tiny_model(family)
    assert layer_indices(model) == [{i} for i in range(NUM_LAYERS)]
    remove_layers(model, [0, 3])
    assert layer_indices(model) == [{i} for i in range(NUM_LAYERS - 2)]


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_moe", "rwkv"])
def test_removing_in_two_calls_equals_removing_in_one(family):
    once, twice = tiny_model(family), tiny_model(family)
    remove_layers(once, [0, 2, 4])
    remove_layers(twice, [0])
    remove_layers(twice, [1, 3])  # layers 2 and 4 of the dense model
    check_equal(twice, once)


def test_the_steps_of_a_plan_name_layers_of_the_dense_model():
    once, stepwise = tiny_model("gemma3_text"), tiny_model("gemma3_text")
    prunelight.apply(once, plan_for(once, (0, 3, 5)))
    prunelight.apply(stepwise, plan_for(stepwise, (0,), (5,), (3,)))
    check_equal(stepwise, once)


def test_an_rwkv_in_mid_evaluation_is_pruned_as_at_rest():
    at_rest, running = tiny_model("rwkv"), tiny_model("rwkv")
    logits(running)  # its first forward in eval mode halves weights by layer
    remove_layers(at_rest, [0, 2, 4])
    remove_layers(running, [0, 2, 4])
    check_equal(running, at_rest)
    assert torch.equal(logits(running), logits(at_rest))


def test_per_layer_lists_are_cut_to_the_kept_layers():
    layers, kept = [1, 4], [0, 2, 3, 5]
    for family, name in (
        ("qwen2", "layer_types"),
        ("gemma3_text", "layer_types"),
        ("smollm3", "layer_types"),
        ("smollm3", "no_rope_layers"),
    ):
        model = tiny_model(family)
        dense = list(getattr(model.config, name))
        assert len(dense) == NUM_LAYERS
        remove_layers(model, layers)
        assert list(getattr(model.config, name)) == [dense[i] for i in kept], (family, name)


@pytest.mark.parametrize(
    ("layers", "full"), [([0, 1], 1), ([4, 5], 3), ([0, 1, 2], 0), ([1, 2, 3, 4], 1)]
)
def test_max_window_layers_counts_the_kept_layers_without_window(layers, full, tmp_path):
    model = tiny_model("qwen2")
    assert model.config.max_window_layers == 3
    remove_layers(model, layers)
    config = reloaded(model, tmp_path).config
    assert config.max_window_layers == full
    assert config.layer_types.count("full_attention") == full


@pytest.mark.parametrize("name", ["first_k_dense_replace", "num_dense_layers"])
def test_fields_that_count_layers_from_the_start_are_translated(name):
    family = {"first_k_dense_replace": "deepseek_v3", "num_dense_layers": "lfm2_moe"}[name]
    config = AutoConfig.for_model(family, num_hidden_layers=6, **{name: 3})
    cut_config(config, [0, 2, 4, 5], 6)
    assert getattr(config, name) == 2
    assert config.num_hidden_layers == 4


def is_dense(layer):
    return not hasattr(layer.mlp, "experts")


@pytest.mark.parametrize("changes", [{}, {"mlp_only_layers": [1]}, {"decoder_sparse_step": 1}])
@pytest.mark.parametrize("layers", [[0], [1, 2], [2, 5]])
def test_mixture_and_dense_layers_stay_what_they_were(changes, layers, tmp_path):
    model = tiny_model("qwen3_moe", **changes)
    kinds = [is_dense(layer) for layer in decoder_layers(model)]
    remove_layers(model, layers)
    kept = [kind for i, kind in enumerate(kinds) if i not in layers]
    assert model.config.decoder_sparse_step == 1
    assert model.config.mlp_only_layers == [i for i, dense in enumerate(kept) if dense]
    copied = reloaded(model, tmp_path)
    assert [is_dense(layer) for layer in decoder_layers(copied)] == kept
    assert torch.equal(logits(copied), logits(model))


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [("llama", "eos_token_id", [2, 5]), ("mamba2", "time_step_limit", [0.0, 10.0])],
)
def test_lists_that_are_as_long_as_the_model_by_chance_are_kept(family, name, value, tmp_path):
    model = tiny_model(family, num_hidden_layers=2, **{name: value})
    remove_layers(model, [0])
    copied = reloaded(model, tmp_path)
    assert list(getattr(copied.config, name)) == value
    assert torch.equal(logits(copied), logits(model))


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [("gpt2", "scale_attn_by_inverse_layer_idx", True), ("llama", "num_kv_shared_layers", 2)],
)
def test_models_whose_layers_depend_on_their_index_are_refused(family, name, value):
    model = tiny_model(family, **{name: value})
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"{name}={value} of {family} makes layers depend"):
        remove_layers(model, [2])
    check_unchanged(model, before)
    remove_layers(model, [])
    check_unchanged(model, before)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([6], r"layers=\[6\] must lie in \[0, 5\]"),
        ([-1], r"layers=\[-1\] must lie in \[0, 5\]"),
        ([3, 3], "must not name a layer twice"),
        (range(6), "would remove all 6 layers; keep one"),
        ([1.0], "must be a list of whole numbers"),
    ],
)
def test_layers_that_cannot_be_removed_are_refused(layers, message):
    model = tiny_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        remove_layers(model, layers)
    check_unchanged(model, before)


@pytest.mark.parametrize("steps", [[(6,)], [(0,), (7,)], [(0,), (0,)], [(0, 1, 2), (3, 4, 5)]])
def test_a_plan_that_does_not_fit_leaves_the_model_unchanged(steps):
    model = tiny_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"steps\[{len(steps) - 1}\] \(remove_layers\)"):
        prunelight.apply(model, plan_for(model, *steps))
    check_unchanged(model, before)


def test_a_plan_for_another_model_is_refused_and_the_model_unchanged():
    model = tiny_model("llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match="another model: model_type is 'mistral' in the plan"):
        prunelight.apply(model, plan_for(tiny_model("mistral"), (1,)))
    check_unchanged(model, before)


def test_a_plan_applies_to_other_weights_only_if_not_strict():
    plan, tuned = plan_for(tiny_model(), (1, 2)), tiny_model(seed=1)
    before = snapshot(tuned)
    with pytest.raises(ValueError, match="fingerprint .* strict=False"):
        prunelight.apply(tuned, plan)
    check_unchanged(tuned, before)
    expected = copy.deepcopy(tuned)
    remove_layers(expected, [1, 2])
    check_equal(prunelight.apply(tuned, plan, strict=False), expected)


def test_a_plan_is_not_applied_twice():
    model = tiny_model()
    plan = plan_for(model, (1,))
    prunelight.apply(model, plan)
    with pytest.raises(ValueError, match="num_hidden_layers is 6 in the plan and 5 in"):
        prunelight.apply(model, plan)


def test_every_step_of_a_plan_has_an_entry_in_the_table_of_apply():
    assert [*KINDS] == [*STEPS.values()]


def test_a_step_without_an_entry_is_refused_before_the_others_are_carried_out():
    @dataclass(frozen=True)
    class Melt(Step):
        kind: ClassVar[str] = "melt"

    model = tiny_model()
    before = snapshot(model)
    steps = (RemoveLayers((1,)), Melt())
    plan = Plan(method="by hand", arguments={}, model=describe_model(model), steps=steps)
    with pytest.raises(TypeError, match="no surgery is known for the step .*Melt"):
        prunelight.apply(model, plan)
    check_unchanged(model, before)


def unknown_model(num_lists):
    if num_lists == 0:
        changes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 3}
        config = AutoConfig.for_model("bart", vocab_size=128, **changes)
    else:
        config = AutoConfig.for_model("xlm", vocab_size=128, emb_dim=16, n_layers=3, n_heads=2)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("num_lists", [0, 4])
def test_an_unknown_structure_is_refused_with_the_known_families(num_lists):
    model = unknown_model(num_lists)
    for act in (layers_path, decoder_layers, lambda m: remove_layers(m, [0])):
        with pytest.raises(TypeError, match=f"not a known family and {num_lists} module lists"):
            act(model)
    with pytest.raises(TypeError, match=", ".join(sorted(ARCHITECTURES))):
        prunelight.apply(model, plan_for(model, (0,)))


def test_an_unknown_family_is_found_by_its_structure():
    model = tiny_model("gpt_oss")
    assert "gpt_oss" not in ARCHITECTURES
    assert layers_path(model) == "model.layers"


# --- zeros and removals together --------------------------------------------------------------

REMOVED = (1, 4)


def combined(model, *steps):
    return Plan(method="by hand", arguments={}, model=describe_model(model), steps=steps)


def shares_of(model):
    """A share for each matrix that tells its layer."""
    path = f"{layers_path(model)}."
    indices = {n: int(n.removeprefix(path).partition(".")[0]) for n in matrices(model)}
    return {name: (1 + index) / 8 for name, index in indices.items()}


def zeros_of(model):
    return {n: (m.parameter == 0).double().mean().item() for n, m in matrices(model).items()}


@pytest.mark.parametrize("removed_first", [False, True])
@pytest.mark.parametrize("solver", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "rwkv"])
def test_a_combined_plan_counts_the_layers_of_the_dense_model(family, solver, removed_first):
    model, by_hand = tiny_model(family), tiny_model(family)
    steps = (Sparsify(shares_of(model), solver), RemoveLayers(REMOVED))
    plan, outcomes = combined(model, *(steps[::-1] if removed_first else steps)), []
    assert prunelight.apply(model, plan, WINDOWS, outcomes=outcomes) is model
    planned = planned_sparsity([plan], layers_path(model))
    assert sorted(set(planned.values())) == [
        (1 + i) / 8 for i in range(NUM_LAYERS) if i not in (1, 4)
    ]
    assert zeros_of(model) == pytest.approx(planned, abs=1e-9)
    (outcome,) = outcomes
    assert set(outcome) == {"sparsity", "layer_sparsity", "reconstruction_error", "notes"}
    assert len(outcome["layer_sparsity"]) == NUM_LAYERS - len(REMOVED) * removed_first
    # All matrices of a layer have the same planned share here, so the layer has it, too.
    assert sorted(outcome["layer_sparsity"]) == pytest.approx(
        sorted(set(planned.values() if removed_first else shares_of(by_hand).values())), abs=1e-9
    )
    assert outcome["sparsity"] == pytest.approx(
        planned if removed_first else shares_of(by_hand), abs=1e-9
    )
    if removed_first:
        remove_layers(by_hand, REMOVED)
        sparsify(by_hand, Sparsify(planned, solver), WINDOWS)
    else:
        sparsify(by_hand, Sparsify(shares_of(by_hand), solver), WINDOWS)
        remove_layers(by_hand, REMOVED)
    check_equal(model, by_hand)


def test_zeros_in_several_steps_and_plans_are_all_there():
    model, outcomes = tiny_model(), []
    up, down = "model.layers.{}.mlp.up_proj", "model.layers.{}.mlp.down_proj"
    first = combined(
        model,
        Sparsify({up.format(0): 0.5, up.format(3): 0.25}, "wanda"),
        RemoveLayers((2,)),
        Sparsify({down.format(3): 0.5, down.format(2): 0.5}, "magnitude"),  # 2 is gone by now
    )
    prunelight.apply(model, first, WINDOWS, outcomes=outcomes)
    second = combined(model, RemoveLayers((0,)), Sparsify({up.format(4): 0.75}, "sparsegpt"))
    prunelight.apply(model, second, WINDOWS, outcomes=outcomes)
    planned = planned_sparsity([first, second], "model.layers")
    assert planned == {up.format(1): 0.25, down.format(1): 0.5, up.format(3): 0.75}
    assert {name: share for name, share in zeros_of(model).items() if share} == planned
    assert [len(outcome["sparsity"]) for outcome in outcomes] == [2, 1, 1]
    assert [len(outcome["reconstruction_error"]) for outcome in outcomes] == [6, 0, 4]


@pytest.mark.parametrize(
    ("step", "windows", "message"),
    [
        (Sparsify({"lm_head": 0.5}, "wanda"), WINDOWS, "lm_head is no matrix of the decoder"),
        (Sparsify({}, "melt"), WINDOWS, "solver='melt' must be one of"),
        (Sparsify({}, "wanda"), None, "solver='wanda' needs calibration windows; pass them to"),
        (Sparsify({"x": 2}, "wanda"), WINDOWS, r"steps\[1\] \(sparsify\): sparsity=2 of x must"),
    ],
)
def test_a_faulty_sparsify_step_leaves_the_model_unchanged(step, windows, message):
    model = tiny_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        prunelight.apply(model, combined(model, RemoveLayers((1,)), step), windows)
    check_unchanged(model, before)


def test_zeros_survive_the_disk(tmp_path):
    model = tiny_model("mixtral")
    plan = combined(model, Sparsify(shares_of(model), "wanda"), RemoveLayers(REMOVED))
    prunelight.apply(model, plan, WINDOWS)
    assert zeros_of(reloaded(model, tmp_path)) == zeros_of(model)
