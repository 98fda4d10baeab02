"""Zeros survive NF4 and FP4, and quantized weights are not pruned."""

import pytest
import torch
from tiny import tiny_model, token_windows
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import prunelight
from prunelight.callbacks import DLP, ShortenedLlama, ShortGPT, SlidingLayerMerging, WidthPruning
from prunelight.models.families.layers import decoder_layers
from prunelight.models.families.matrices import matrices
from prunelight.models.sizes import parameter_bytes, stored_bytes
from prunelight.recovery.quantization import BitsAndBytes, quantize

bitsandbytes = pytest.importorskip(
    "bitsandbytes", reason="bitsandbytes is missing: pip install 'prunelight[quantization]'"
)
WINDOWS = token_windows()


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """A tiny llama with 2:4 zeros whose widths are multiples of 64, and its directory."""
    from runs import write_model

    name = write_model(
        tmp_path_factory.mktemp("quantization") / "dense", hidden_size=64, intermediate_size=128
    )
    model, tokenizer = prunelight.load(name)
    windows = WINDOWS % len(tokenizer)
    plan = DLP(pattern="2:4", solver="sparsegpt").plan(model, windows)
    prunelight.apply(model, plan, windows)
    directory = tmp_path_factory.mktemp("quantization") / "sparse"
    prunelight.save(model, tokenizer, directory, plan=plan)
    return model, directory


def load_in_4bit(directory, kind):
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=torch.float32
    )
    return AutoModelForCausalLM.from_pretrained(directory, quantization_config=config)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_pruned_model_loaded_in_4_bit_keeps_every_zero(sparse, kind):
    model, directory = sparse
    quantized = load_in_4bit(directory, kind)
    for name, matrix in matrices(model).items():
        weight = quantized.get_submodule(name).weight
        restored = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        assert (matrix.parameter == 0).any()
        assert (restored[matrix.parameter == 0] == 0).all(), name
    assert torch.isfinite(quantized(WINDOWS % 64).logits).all()


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_quantizing_in_memory_gives_what_transformers_loads(sparse, kind):
    _, directory = sparse
    loaded = (
        load_in_4bit(directory, kind)
        if kind != "int8"
        else AutoModelForCausalLM.from_pretrained(
            directory, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
        )
    )
    model, _ = prunelight.load(directory)
    quantize(
        model, kind, BitsAndBytes(use_double_quant=False) if kind != "int8" else BitsAndBytes()
    )
    assert {n: type(m) for n, m in model.named_modules()} == {
        n: type(m) for n, m in loaded.named_modules()
    }
    for module in loaded.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # ours computes without that kernel
            module.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        assert torch.equal(model(WINDOWS % 64).logits, loaded(WINDOWS % 64).logits)
    on_disk = sum(f.stat().st_size for f in directory.glob("*.safetensors"))
    assert stored_bytes(model) < 0.7 * on_disk


def test_bytes_of_a_model_in_full_precision_are_those_of_its_parameters(sparse):
    model, _ = sparse
    assert stored_bytes(model) == parameter_bytes(model)


def test_a_model_in_4_bit_is_refused_with_the_remedy(sparse):
    quantized = load_in_4bit(sparse[1], "nf4")
    with pytest.raises(TypeError, match="q_proj is a quantized Linear4bit .*prune first, save"):
        DLP(sparsity=0.5).check(quantized)
    for method in (
        SlidingLayerMerging(num_layers=1),
        ShortenedLlama(num_layers=1, score="magnitude", protected=[]),
        ShortGPT(num_layers=1, granularity="mlp"),
        WidthPruning(head_ratio=0.5),
    ):
        with pytest.raises(TypeError, match="quantized Linear4bit .*prune first, save"):
            method.check(quantized)
    assert len(decoder_layers(quantized)) == 6


def test_8_bit_weights_follow_a_model_that_is_moved():
    """A parent module moves a parameter's data, and neither its scales nor what is beside it."""
    model = tiny_model(num_hidden_layers=1)
    names = list(matrices(model))
    quantize(model, "int8", BitsAndBytes())
    expected = model(WINDOWS).logits
    again = tiny_model(num_hidden_layers=1)
    quantize(again, "int8", BitsAndBytes())
    for name in names:
        again.get_submodule(name).weight.CB = torch.empty(1, device="meta")  # left elsewhere
    torch.testing.assert_close(again(WINDOWS).logits, expected)
    for name in names:
        layer = again.get_submodule(name)
        assert layer.state.CB.data_ptr() == layer.weight.data_ptr(), "once in memory"
