"""A model quantized by GPTQ: saved packed, loaded by transformers, its zeros and layers."""

import copy

import pytest
import torch
from own_models import own_model
from runs import write_model
from safetensors.torch import load_file
from tiny import tiny_model, token_windows
from transformers import AutoModelForCausalLM

import prunelight
from prunelight.callbacks import ShortGPT, WeightPruning
from prunelight.models.families.matrices import matrices
from prunelight.models.packed.grids import (
    WeightGrid,
    has_grids,
    linears_on_grids,
    packed_state,
    set_grid,
)
from prunelight.models.sizes import linear_sparsity, parameter_count, stored_bytes
from prunelight.pruning.remove_layers import remove_layers
from prunelight.pruning.rounding.gptq import GPTQ, grid_scale
from prunelight.pruning.rounding.quantize import quantize_gptq

pytest.importorskip("compressed_tensors", reason="pip install 'prunelight[gptq]'")
WINDOWS = token_windows(4, 16)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("source") / "model", num_hidden_layers=3)


def logits(model):
    with torch.no_grad():
        return model(WINDOWS).logits


def saved(model, tokenizer, directory):
    prunelight.save(model, tokenizer, directory)
    return prunelight.load(directory)[0]


@pytest.mark.parametrize(
    "settings",
    [
        GPTQ(),
        GPTQ(8),
        GPTQ(group_size=-1),
        GPTQ(group_size=16),
        GPTQ(8, group_size=-1, act_order=False),
    ],
    ids=str,
)
def test_a_quantized_model_is_packed_on_disk_and_computes_the_same(source, settings, tmp_path):
    model, tokenizer = prunelight.load(source)
    dense = logits(model)
    done = quantize_gptq(model, WINDOWS, settings)
    assert 0 < (logits(model) - dense).abs().max() < 0.5
    prunelight.save(model, tokenizer, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(plain), logits(model))
    again, _ = prunelight.load(tmp_path / "out")
    torch.testing.assert_close(logits(again), logits(model))
    assert done.share == pytest.approx(
        sum(m.parameter.numel() for m in matrices(tiny_of(source)).values())
        / parameter_count(tiny_of(source))
    )
    on_disk = load_file(tmp_path / "out" / "model.safetensors")
    packed = on_disk["model.layers.0.self_attn.q_proj.weight_packed"]
    assert packed.numel() * 32 == 32 * 32 * settings.bits  # a value takes no more than its bits
    total = sum(tensor.numel() * tensor.element_size() for tensor in on_disk.values())
    assert stored_bytes(again) == pytest.approx(total, rel=0.01)


def tiny_of(source):
    return prunelight.load(source)[0]


def test_the_same_model_is_saved_twice_without_loss(source, tmp_path):
    model, tokenizer = prunelight.load(source, dtype="bfloat16")
    quantize_gptq(model, WINDOWS)
    first = saved(model, tokenizer, tmp_path / "first")
    second = saved(first, tokenizer, tmp_path / "second")
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("first", "second")]
    assert {*files[0]} == {*files[1]}
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    torch.testing.assert_close(logits(second), logits(model))


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_the_zeros_of_a_sparse_model_stay_zeros_on_disk(pattern, source, tmp_path):
    model, tokenizer = prunelight.load(source)
    amount = {"pattern": pattern} if pattern else {"sparsity": 0.5}
    plan = WeightPruning(**amount).plan(model, WINDOWS)
    model = prunelight.apply(model, plan, WINDOWS)
    zeros = {name: matrix.parameter == 0 for name, matrix in matrices(model).items()}
    done = quantize_gptq(model, WINDOWS)
    assert done.zeros == sum(int(of.sum()) for of in zeros.values()) > 0
    again = saved(model, tokenizer, tmp_path / "out")
    for name, of in zeros.items():
        assert not again.get_submodule(name).weight[of].any()


@pytest.mark.parametrize(
    "family", ["qwen3", "gemma2", "phi3", "opt", "gpt_neox", "mamba", "olmo2", "cohere"]
)
def test_families_are_packed_and_verified(family, tmp_path, tiny_tokenizer):
    model = tiny_model(family)
    quantize_gptq(model, WINDOWS)
    done = prunelight.save(model, tiny_tokenizer, tmp_path / "out")
    assert done.verification.startswith("reloaded with AutoModelForCausalLM: equal weights")


@pytest.mark.parametrize("kind", ["sliced", "dropped", "gaps", "widths"])
def test_our_own_classes_are_packed_where_prunelight_is_imported(kind, tmp_path, tiny_tokenizer):
    model = own_model(kind, "llama")
    quantize_gptq(model, WINDOWS)
    done = prunelight.save(model, tiny_tokenizer, tmp_path / "out")
    assert done.verification.startswith("reloaded with AutoModelForCausalLM: equal weights")


def test_layers_are_scored_and_removed_after_the_quantization(source, tmp_path):
    model, tokenizer = prunelight.load(source)
    quantize_gptq(model, WINDOWS)
    loaded = saved(model, tokenizer, tmp_path / "quantized")
    plans = [ShortGPT(num_layers=1).plan(each, WINDOWS) for each in (loaded, model)]
    first, second = (plan.scores["block_influence"] for plan in plans)
    assert first == pytest.approx(second)
    shorter = copy.deepcopy(loaded)
    remove_layers(shorter, [1])
    again = saved(shorter, tokenizer, tmp_path / "out")
    assert again.config.num_hidden_layers == 2
    assert has_grids(again)
    torch.testing.assert_close(logits(again), logits(shorter))


def test_grids_of_two_kinds_stand_in_one_model(source, tmp_path):
    model, tokenizer = prunelight.load(source)
    quantize_gptq(model, WINDOWS, GPTQ(group_size=32))
    other = model.get_submodule("model.layers.1.mlp.down_proj")
    grid = WeightGrid(8, 16)
    set_grid(other, grid, grid_scale(other.weight, grid))
    with torch.no_grad():
        steps = other.weight_scale.repeat_interleave(16, dim=1)
        other.weight.copy_((other.weight / steps).round().clamp(-128, 127) * steps)
    again = saved(model, tokenizer, tmp_path / "out")
    assert {grid for _, _, grid in linears_on_grids(again)} == {grid, WeightGrid(4, 32)}
    torch.testing.assert_close(logits(again), logits(model))


def test_a_weight_that_left_its_grid_is_not_saved(source, tmp_path):
    model, tokenizer = prunelight.load(source)
    quantize_gptq(model, WINDOWS)
    with torch.no_grad():
        model.get_submodule("model.layers.2.mlp.up_proj").weight.mul_(1.01)
    with pytest.raises(ValueError, match=r"layers.2.mlp.up_proj.weight was quantized and has chan"):
        prunelight.save(model, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_scales_of_bfloat16_pack_the_values_that_were_rounded(source):
    model, _ = prunelight.load(source)
    quantize_gptq(model, WINDOWS, dtype=torch.bfloat16)
    exact = packed_state(model)
    narrow = packed_state(model.to(torch.bfloat16))
    codes = [name for name in exact if name.endswith("weight_packed")]
    assert codes
    assert all(torch.equal(exact[name], narrow[name]) for name in codes)


def test_methods_that_change_weights_are_refused(source):
    model, _ = prunelight.load(source)
    quantize_gptq(model, WINDOWS)
    with pytest.raises(TypeError, match=r"q_proj is a quantized Linear \(GPTQ\): prune first"):
        WeightPruning(0.5).plan(model, WINDOWS)
    assert linear_sparsity(model) == 0.0


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("gpt2", "c_attn of gpt2 is Conv1D, and GPTQ stores linear modules only"),
        ("mixtral", "gate_up_proj of mixtral is experts in one tensor"),
        ("falcon", "query_key_value of falcon is FalconLinear"),
        ("rwkv", r"rwkv divides its weights itself \(rescale_every=\d\)"),
    ],
)
def test_families_without_plain_linear_modules_are_refused(family, words):
    with pytest.raises(TypeError, match=words):
        quantize_gptq(tiny_model(family), WINDOWS)


def test_what_cannot_be_quantized_is_refused_before_anything_changes(source):
    model, _ = prunelight.load(source)
    with pytest.raises(ValueError, match="group_size=48 must divide the 32 inputs of .*q_proj"):
        quantize_gptq(model, WINDOWS, GPTQ(group_size=48))
    assert not has_grids(model)
    quantize_gptq(model, WINDOWS)
    with pytest.raises(TypeError, match="is quantized already; give the one in full precision"):
        quantize_gptq(model, WINDOWS)
