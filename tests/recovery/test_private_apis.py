"""Private names of torch, peft and bitsandbytes that recovery/ uses: a release may rename them.

The module docstrings of compiled_layers.py, quantization.py, lora.py and masked_lora.py name them.
"""

import inspect

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import layer as peft_layers
from torch import nn

from prunelight.recovery.lora import LeanLora
from prunelight.recovery.zeros.masked_lora import MaskedLora, QuantizedMaskedLora


def test_torch_has_the_limits_of_dynamo_and_the_compiled_call_of_a_module():
    assert torch._dynamo.config.recompile_limit > 0
    assert torch._dynamo.config.accumulated_recompile_limit > 0
    layer = nn.Linear(2, 2)
    assert layer._compiled_call_impl is None
    layer.compile(backend="eager")
    assert layer._compiled_call_impl is not None


@pytest.mark.parametrize("name", ["forward", "merge_safe", "merge_unsafe", "unmerge"])
def test_variants_of_peft_take_the_arguments_that_ours_take(name):
    expected = [*inspect.signature(getattr(peft_layers.LoraVariant, name)).parameters]
    for variant in (LeanLora, MaskedLora):
        assert [*inspect.signature(getattr(variant, name)).parameters] == expected


def test_the_variant_of_quantized_weights_overrides_a_method_of_peft():
    for name in ("forward", "supports_lora_conversion"):
        assert getattr(QuantizedMaskedLora, name) is not getattr(peft_layers.LoraVariant, name)


def test_layers_of_peft_hold_a_variant_per_adapter():
    model = nn.Sequential(nn.Linear(4, 4))
    adapted = get_peft_model(model, LoraConfig(target_modules=["0"], r=2))
    layer = adapted.base_model.model[0]
    assert isinstance(layer, peft_layers.Linear)
    assert isinstance(layer, peft_layers.LoraLayer)
    assert not layer.lora_variant
    assert layer.cast_input_dtype_enabled
    assert set(layer.lora_A) == set(layer.lora_B) == set(layer.scaling) == {"default"}


@pytest.mark.parametrize(
    "name",
    [
        "_activate_lora",
        "_remove_parametrizations",
        "get_delta_factors",
        "get_delta_weight",
        "get_param",
    ],
)
def test_the_wrapper_of_fused_weights_has_the_methods_that_ours_replaces_or_calls(name):
    assert callable(getattr(peft_layers.ParamWrapper, name))


def test_bitsandbytes_keeps_codes_and_scales_of_8_bits_under_these_names():
    layers = pytest.importorskip("bitsandbytes").nn
    layer = layers.Linear8bitLt(64, 64, has_fp16_weights=False)
    layer.weight = layers.Int8Params(torch.randn(64, 64), requires_grad=False)
    for holder in (layer.weight, layer.state):
        assert hasattr(holder, "CB")
        assert hasattr(holder, "SCB")


def test_bitsandbytes_chooses_its_kernel_for_4_bits_on_cpus_by_this_flag():
    layers = pytest.importorskip("bitsandbytes").nn
    assert hasattr(layers.Linear4bit(64, 64), "support_avx512bf16_for_cpu")
