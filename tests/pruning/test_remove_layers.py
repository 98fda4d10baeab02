"""Removing decoder layers: what is left, its config, and what is refused."""

import logging

import pytest
import torch
from surgery import (
    check_equal,
    check_unchanged,
    layer_indices,
    plan_that_removes,
    reloaded,
    snapshot,
)
from tiny import NUM_LAYERS, tiny_model, token_windows
from tiny_families import tiny_family

import prunelight
from prunelight.models.families.architectures import ARCHITECTURES
from prunelight.models.families.layers import decoder_layers, layers_path
from prunelight.models.sizes import parameter_count
from prunelight.pruning.remove_layers import remove_layers

WINDOWS = token_windows()


@torch.no_grad()
def logits(model):
    return model(WINDOWS, use_cache=False).logits


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe"])
def test_removing_no_layers_changes_nothing(family):
    model = tiny_model(family)
    before = snapshot(model)
    remove_layers(model, [])
    check_unchanged(model, before)
    assert prunelight.apply(model, plan_that_removes(model, ())) is model
    check_unchanged(model, before)


def test_apply_is_in_place_and_logs_the_parameters(caplog):
    model = tiny_model()
    before = parameter_count(model)
    with caplog.at_level(logging.INFO, logger="prunelight.pruning.apply"):
        assert prunelight.apply(model, plan_that_removes(model, (1, 4))) is model
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
    prunelight.apply(once, plan_that_removes(once, (0, 3, 5)))
    prunelight.apply(stepwise, plan_that_removes(stepwise, (0,), (5,), (3,)))
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


def test_models_whose_layers_compute_with_their_index_are_refused():
    model = tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True)
    before = snapshot(model)
    with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx=True of gpt2 makes"):
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


@pytest.mark.parametrize(
    ("family", "sizes", "lists"),
    [
        ("xlm", {"emb_dim": 16, "n_layers": 3, "n_heads": 2}, "2 may .*attentions"),
        ("hrm_text", {"num_hidden_layers": 2, "hidden_size": 16}, "2 may .*layers"),
    ],
)
def test_layers_that_cannot_be_found_are_refused_with_what_was_looked_for(family, sizes, lists):
    model = tiny_family(family)
    for act in (layers_path, decoder_layers, lambda m: remove_layers(m, [0])):
        with pytest.raises(TypeError, match=f"exactly one ModuleList .*and {lists}.*add-a-family"):
            act(model)


@pytest.mark.parametrize(
    ("family", "path"),
    [
        ("gpt_oss", "model.layers"),
        ("bart", "model.decoder.layers"),  # num_hidden_layers counts the layers of the encoder
        ("granite_swa", "model.layers"),  # beside two rotary embeddings
        ("gemma4", "model.language_model.layers"),  # beside those of the vision tower
    ],
)
def test_a_family_outside_the_table_is_found_by_its_structure(family, path):
    assert family not in ARCHITECTURES
    assert layers_path(tiny_family(family)) == path
