"""Sliced models as others see them: round trips, adapters, 4 bits, processes, remote code."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from sliced_models import (
    CUT,
    EACH,
    FULL,
    FULL_CUT_VARIED,
    VARIED,
    WINDOWS,
    dense_model,
    logits,
    plan_of,
    sliced,
)
from tiny import token_windows
from transformers import AutoModelForCausalLM

import prunelight
from prunelight.callbacks import DLP, ShortGPT, SliceGPT, SlidingLayerMerging, WidthPruning
from prunelight.models.families.matrices import layer_matrices, lora_targets
from prunelight.models.families.own_classes.sliced import CLASSES, SHORTCUTS, Shortcut
from prunelight.models.forward import greedy_tokens
from prunelight.models.saving import verify
from prunelight.models.sizes import parameter_count
from prunelight.planning.steps import RemoveLayers
from prunelight.recovery.lora import LoRA, attach_lora, merge_lora


@EACH
@FULL_CUT_VARIED
def test_a_sliced_model_reloads_bit_for_bit_and_generates_with_the_cache(
    family, tied, dims, tmp_path, tiny_tokenizer
):
    model = sliced(family, tied, dims)
    prunelight.save(model, tiny_tokenizer, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again) is CLASSES[family] is type(model)
    assert torch.equal(logits(again), logits(model))
    cached = greedy_tokens(again, WINDOWS[:2], 6)
    again.generation_config.eos_token_id = None
    uncached = again.generate(WINDOWS[:2], do_sample=False, max_new_tokens=6, use_cache=False)
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dims", [FULL, CUT], ids=["full", "cut"])
def test_the_file_holds_the_parameters_and_nothing_else(dims, dtype, tmp_path, tiny_tokenizer):
    model = sliced("llama", True, dims).to(dtype)
    saved = prunelight.save(model, tiny_tokenizer, tmp_path / "out")
    size = parameter_count(model) * dtype.itemsize
    assert size < saved.size_bytes < size + 16_000  # names and shapes
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["residual_dims"] == list(dims)
    assert config["tie_word_embeddings"] is (dims is FULL)
    assert (config["hidden_size"], config["head_dim"]) == (32, 8)


def test_a_sliced_model_is_sliced_loaded_and_pruned_in_bfloat16(tmp_path):
    model = copy.deepcopy(dense_model()).to(torch.bfloat16)
    plan = SliceGPT(0.25).plan(model, WINDOWS)
    model = prunelight.apply(model, plan, WINDOWS)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    wide = sliced("llama", True, plan.steps[0].residual_dims)
    assert (logits(model).float() - logits(wide)).abs().mean() < 0.05


def test_slicing_keeps_the_mode_and_gradients_on():
    model = copy.deepcopy(dense_model()).train()
    prunelight.apply(model, SliceGPT(0.25).plan(model, WINDOWS), WINDOWS)
    assert all(module.training for module in model.modules())
    model(WINDOWS, labels=WINDOWS).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@EACH
def test_lora_adapts_all_projections_and_the_shortcuts_and_merges(family, tmp_path, tiny_tokenizer):
    model = sliced(family, True, CUT)
    assert set(SHORTCUTS) < set(lora_targets(model)[0])
    wrapped = attach_lora(model, LoRA(dropout=0.0))
    adapted = {name.rpartition(".lora_A")[0] for name, _ in wrapped.named_parameters()}
    assert sum("shortcut" in name for name in adapted) == 12
    optimizer = torch.optim.Adam([p for p in wrapped.parameters() if p.requires_grad], 1e-2)
    wrapped.train()
    losses = []
    for _ in range(4):
        loss = wrapped(WINDOWS, labels=WINDOWS).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    wrapped.eval()
    expected = logits(wrapped)
    merged = merge_lora(wrapped)
    assert isinstance(
        merged.get_submodule("model.decoder" if family == "opt" else "model")
        .layers[0]
        .attn_shortcut,
        Shortcut,
    )
    assert (logits(merged) - expected).abs().max() < 1e-3
    prunelight.save(merged, tiny_tokenizer, tmp_path / "out")


def test_without_the_option_no_code_is_written(tmp_path, tiny_tokenizer):
    prunelight.save(sliced("llama", True, FULL), tiny_tokenizer, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_stock_models_have_no_code_to_export(tmp_path, tiny_tokenizer):
    with pytest.raises(TypeError, match="export_remote_code=True: LlamaForCausalLM is a class of"):
        prunelight.save(dense_model(), tiny_tokenizer, tmp_path / "out", export_remote_code=True)
    assert not (tmp_path / "out").exists()


def test_a_changed_width_on_disk_fails_the_verification(tmp_path, tiny_tokenizer):
    model = sliced("llama", True, FULL)
    prunelight.save(model, tiny_tokenizer, tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    config["residual_dims"][3] = 16
    file.write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="failed its verification"):
        verify(model, tmp_path / "out")


@pytest.mark.parametrize("double", [False, True])
def test_in_4_bits_shortcuts_and_head_stay_in_full_precision(double, tmp_path, tiny_tokenizer):
    pytest.importorskip(
        "bitsandbytes", reason="bitsandbytes is missing: pip install 'prunelight[quantization]'"
    )
    from tiny import tiny_model
    from transformers import BitsAndBytesConfig

    model = tiny_model(hidden_size=192, intermediate_size=256, head_dim=32)
    dims = (192, *[128] * 11, 192)
    model = prunelight.apply(model, plan_of(model, dims), token_windows(16, 16))
    prunelight.save(model, tiny_tokenizer, tmp_path / "out")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=config)
    layer = again.model.layers[1]
    assert type(layer.self_attn.q_proj).__name__ == "Linear4bit"
    for whole in (layer.attn_shortcut, layer.mlp_shortcut, again.lm_head):
        assert whole.weight.dtype == torch.float32
    assert torch.equal(layer.attn_shortcut.weight, model.model.layers[1].attn_shortcut.weight)
    # Rounding to 4 bits changes a random model by a sixth of its logits, a wrong scale by more.
    assert (logits(again) - logits(model)).abs().mean() < 0.3 * logits(model).abs().mean()
    wrapped = attach_lora(again, LoRA(dropout=0.0)).train()
    wrapped(WINDOWS, labels=WINDOWS).loss.backward()
    trained = [p for n, p in wrapped.named_parameters() if "lora_B" in n and "shortcut" in n]
    assert len(trained) == 12
    assert all(p.grad.abs().sum() > 0 for p in trained)
    with pytest.raises(TypeError, match="quantized Linear4bit|sliced already"):
        SliceGPT(0.25).check(again)


def test_a_model_without_some_sublayers_is_not_sliced():
    model = copy.deepcopy(dense_model())
    plan = ShortGPT(num_layers=1, granularity="mlp").plan(model, WINDOWS)
    model = prunelight.apply(model, plan, WINDOWS)
    with pytest.raises(TypeError, match="prunelight_llama has no sliced class"):
        SliceGPT(0.25).check(model)


def test_layers_share_the_config_of_the_model():
    model = sliced("llama", True, FULL)
    assert all(layer.self_attn.config is model.config for layer in model.model.layers)


def test_what_cannot_follow_slicing_is_refused_with_the_order_that_works():
    model = sliced("llama", True, FULL)
    with pytest.raises(TypeError, match="prunelight_sliced_llama is sliced already"):
        SliceGPT(0.25).plan(model, WINDOWS)
    for method in (ShortGPT(num_layers=1), SlidingLayerMerging(num_layers=1)):
        with pytest.raises(ValueError, match="is sliced: .* remove or merge layers first, then"):
            method.plan(model, WINDOWS)
    with pytest.raises(TypeError, match="its sublayers cannot be dropped"):
        ShortGPT(num_layers=1, granularity="mlp").plan(model, WINDOWS)


def test_a_plan_that_removes_after_slicing_leaves_the_model_as_it_was():
    model = copy.deepcopy(dense_model())
    plan = plan_of(model, FULL)
    plan = replace(plan, steps=(*plan.steps, RemoveLayers((2,))))
    with pytest.raises(ValueError, match="remove_layers must not come after slice_hidden"):
        prunelight.apply(model, plan, WINDOWS)
    assert torch.equal(logits(model), logits(dense_model()))


def test_one_rotation_needs_a_width_that_the_config_class_accepts():
    model = copy.deepcopy(dense_model())
    with pytest.raises(ValueError, match="LlamaConfig does not accept hidden_size=22"):
        prunelight.apply(model, plan_of(model, (22,) * 13, rotation="shared"), WINDOWS)
    opt = copy.deepcopy(dense_model("opt"))
    with pytest.raises(TypeError, match="leaves no stock opt"):
        prunelight.apply(opt, plan_of(opt, (24,) * 13, rotation="shared"), WINDOWS)
    assert torch.equal(logits(opt), logits(dense_model("opt")))


@EACH
def test_a_model_built_from_its_config_is_tied_as_the_saved_one(family):
    for dims in (FULL, CUT):
        model = sliced(family, True, dims)
        again = AutoModelForCausalLM.from_config(model.config)
        tied = dims is FULL
        assert (again.lm_head.weight is again.get_input_embeddings().weight) is tied
        assert parameter_count(again) == parameter_count(model)
        assert set(again._no_split_modules) == set(model._no_split_modules)


@pytest.mark.parametrize("dims", [FULL[:-1], (24, *FULL[1:])], ids=["too few", "tied and cut"])
def test_a_config_with_widths_that_do_not_fit_is_refused(dims):
    config = copy.deepcopy(sliced("llama", True, FULL).config)
    config.residual_dims = list(dims)
    with pytest.raises(
        ValueError, match=f"residual_dims has {len(dims)} widths, the first {dims[0]}"
    ):
        AutoModelForCausalLM.from_config(config)


def test_a_model_that_accelerate_placed_is_refused():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = copy.deepcopy(dense_model())
    add_hook_to_module(model.model.layers[1], AlignDevicesHook("cpu"))
    with pytest.raises(TypeError, match=r"accelerate placed this model \(device_map\)"):
        SliceGPT(0.25).plan(model, WINDOWS)


def test_bases_of_sliced_models_are_not_compared():
    with pytest.raises(TypeError, match="is sliced: .* analyze the dense one"):
        prunelight.analyze(sliced("llama", True, FULL), WINDOWS)


AFTER = {
    "zeros": lambda: DLP(0.5),
    "width": lambda: WidthPruning(neuron_ratio=0.25, head_ratio=0.5, multiple=8),
}


@pytest.mark.parametrize("method", AFTER)
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_zeros_and_width_may_follow_slicing(method, family, tmp_path, tiny_tokenizer):
    model = sliced(family, False, VARIED)
    plan = AFTER[method]().plan(model, WINDOWS)
    model = prunelight.apply(model, plan, WINDOWS)
    prunelight.save(model, tiny_tokenizer, tmp_path / "out", plan=plan)
    shortcuts = [getattr(layer, name) for layer in model.model.layers for name in SHORTCUTS]
    assert all((shortcut.weight != 0).all() for shortcut in shortcuts)
    assert not any("shortcut" in m.name for m in layer_matrices(model, 0))
