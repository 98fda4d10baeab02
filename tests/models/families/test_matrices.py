"""Which weights of decoder layers can be sparsified: held against the products of a forward."""

import pytest
import torch
from tiny import tiny_model, token_windows
from tiny_families import tiny_family
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from prunelight.callbacks import WeightPruning
from prunelight.models.families.layers import decoder_layers
from prunelight.models.families.matrices import (
    GATE,
    PICKS_EXPERTS,
    decoder_weights,
    dense_weights,
    layer_weights,
    lora_targets,
    matrices,
)
from prunelight.recovery.lora import LoRA, attach_lora, merge_lora

WINDOWS = token_windows(2, 12)
PRODUCTS = (linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, torch.addmm)

# Families of each form of experts: marked stacks, transposed ones, ones that transformers does not
# mark, two-dimensional ones; with shared experts, zero experts, a router of several layers.
MIXTURES = (
    "olmoe",
    "qwen2_moe",
    "gpt_oss",
    "llama4_text",
    "jetmoe",
    "dbrx",
    "longcat_flash",
    "zaya",
)

# family -> weights that pick experts or mix streams, by their place in a layer.
ROUTERS = {
    "llama4_text": {"feed_forward.router.weight"},
    "afmoe": {"mlp.router.gate.weight"},
    "jetmoe": {"mlp.router.layer.weight", "self_attention.experts.router.layer.weight"},
    "phimoe": {"mlp.router.weight"},
    "dbrx": {"ffn.router.layer.weight"},
    "hunyuan_v1_moe": {"mlp.gate.wg.weight"},
    "qwen2_moe": {"mlp.gate.weight", "mlp.shared_expert_gate.weight"},
    "longcat_flash": {"mlp.router.classifier.weight"},
    "zaya": {
        "mlp.gate.down_proj.weight",
        "mlp.gate.router_mlp.fc1.weight",
        "mlp.gate.router_mlp.fc2.weight",
        "mlp.gate.router_mlp.out_proj.weight",
    },
}


class Factors(TorchFunctionMode):
    """Collects the addresses of all factors of products."""

    def __init__(self):
        super().__init__()
        self.addresses = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in PRODUCTS:
            self.addresses += [x.data_ptr() for x in args if isinstance(x, Tensor)]
        return func(*args, **(kwargs or {}))


def places(names):
    """The names of weights inside their layers."""
    return {name.split("layers.", 1)[-1].partition(".")[2] for name in names}


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_of_every_form_are_decoder_weights(family):
    model = tiny_family(family)
    found = sum(matrix.parameter.numel() for matrix in matrices(model).values())
    everything = sum({id(w): w.numel() for w in decoder_weights(model)}.values())
    dense = sum(model.get_parameter(name).numel() for name in dense_weights(model))
    assert found + dense == everything
    assert found > 0.9 * everything  # routers and gates are small


@pytest.mark.parametrize("family", [*MIXTURES, "llama", "gpt2", "mamba", "gemma3n_text"])
def test_every_matrix_multiplies_hidden_states_in_a_forward(family):
    model = tiny_family(family)
    model.config._experts_implementation = "eager"
    with torch.no_grad(), Factors() as factors:
        model(WINDOWS, use_cache=False)
    for matrix in matrices(model).values():
        start = matrix.parameter.data_ptr()
        size = matrix.parameter.numel() * matrix.parameter.element_size()
        assert any(0 <= address - start < size for address in factors.addresses), matrix.name


@pytest.mark.parametrize("family", MIXTURES)
def test_views_have_the_width_of_what_they_multiply(family):
    """Inputs of the first projections are hidden states, outputs of the last ones too."""
    model = tiny_family(family)
    hidden = model.config.hidden_size
    for index in range(len(decoder_layers(model))):
        for matrix in layer_weights(model, index).matrices:
            if matrix.fused:
                shapes = {tuple(view.shape) for view in matrix.views()}
                assert len(shapes) == 1
                assert hidden in next(iter(shapes))
                first = any(part in matrix.name for part in ("gate", "up", "w1", "v1", "input"))
                assert next(iter(shapes))[1 if first else 0] == hidden, matrix.name


@pytest.mark.parametrize("family", ROUTERS)
def test_routers_stay_dense_and_the_plan_names_them(family):
    model = tiny_family(family)
    reasons = dense_weights(model)
    picking = {name for name, reason in reasons.items() if reason == PICKS_EXPERTS}
    found = {place.partition(".")[2] if place[0].isdigit() else place for place in picking}
    assert ROUTERS[family] == {place.split(".", 3)[-1] for place in found} or places(picking)
    plan = WeightPruning(0.5, solver="magnitude").plan(model, WINDOWS)
    assert set(plan.found["stays_dense"][PICKS_EXPERTS]) == ROUTERS[family]
    assert 0.5 < plan.found["share_of_decoder_weights"] < 1
    assert not set(plan.steps[0].sparsity) & {name.removesuffix(".weight") for name in picking}


def test_what_mixes_streams_or_scales_heads_stays_dense():
    for family, place in (("gemma3n_text", "altup.modality_router"), ("doge", "self_attn.dt_proj")):
        reasons = dense_weights(tiny_family(family))
        assert any(place in name and why == GATE for name, why in reasons.items()), family


class Scaled(nn.Linear):
    """A linear class with a forward of its own that reads more than its parameters."""

    def __init__(self, inputs, outputs, *, registered):
        super().__init__(inputs, outputs, bias=False)
        scale = torch.full((outputs,), 2.0)
        if registered:
            self.register_buffer("scale", scale)
        else:
            self.scale = scale

    def forward(self, x):
        return super().forward(x) * self.scale


@pytest.mark.parametrize("registered", [True, False])
def test_a_linear_class_that_reads_more_than_its_parameters_is_pruned(registered):
    model, expected = tiny_model("llama"), {*matrices(tiny_model("llama"))}
    for layer in decoder_layers(model):
        old = layer.mlp.up_proj
        layer.mlp.up_proj = Scaled(old.in_features, old.out_features, registered=registered)
    assert {*matrices(model)} == expected


def test_cross_attentions_that_never_run_stay_dense():
    reasons = dense_weights(tiny_family("bart"))
    assert {why for name, why in reasons.items() if "encoder_attn" in name} == {
        "runs only beside an encoder"
    }
    assert not any("self_attn" in name for name in reasons)


def test_a_weight_that_layers_share_is_one_matrix():
    model = tiny_family("zamba")
    found = [id(matrix.parameter) for matrix in matrices(model).values()]
    assert len(found) == len(set(found))


@pytest.mark.parametrize("family", ["mamba", "dbrx"])
def test_what_other_code_reads_directly_gets_no_adapter(family):
    model = tiny_family(family)
    direct = {matrix.name for matrix in matrices(model).values() if matrix.read_directly}
    assert direct
    wrapped = attach_lora(model, LoRA(r=2))
    adapted = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert adapted
    assert not any(name in path for name in direct for path in adapted)


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "glm4_moe", "ctrl", "llama4_text"])
def test_lora_with_its_defaults_adapts_and_merges(family, caplog):
    model = tiny_family(family)
    with torch.no_grad():
        expected = model(WINDOWS, use_cache=False).logits
    wrapped = attach_lora(model, LoRA())
    _, stacks = lora_targets(tiny_family(family))
    assert bool(stacks) == ("has no dropout for experts" in caplog.text)
    wrapped.train()
    wrapped(input_ids=WINDOWS, labels=WINDOWS).loss.backward()
    assert all(p.grad is not None for n, p in wrapped.named_parameters() if "lora_B" in n)
    merged = merge_lora(wrapped).eval()
    with torch.no_grad():
        assert torch.allclose(merged(WINDOWS, use_cache=False).logits, expected, atol=1e-5)


def test_names_of_targets_select_what_is_meant_and_no_more():
    for family in ("bert", "ctrl", "gemma4", "llama", "mixtral"):
        model = tiny_family(family)
        names, _ = lora_targets(model)
        meant = {m.name for m in matrices(model).values() if not (m.fused or m.read_directly)}
        modules = [name for name, _ in model.named_modules()]
        selected = {m for m in modules if any(m == n or m.endswith(f".{n}") for n in names)}
        assert selected == meant, family


def test_the_projections_of_an_entry_are_all_that_is_pruned(monkeypatch):
    from prunelight.models.families.architectures import ARCHITECTURES, Architecture

    monkeypatch.setitem(ARCHITECTURES, "llama", Architecture(projections=("q_proj", "up_proj")))
    model = tiny_model()
    assert {name.rpartition(".")[2] for name in matrices(model)} == {"q_proj", "up_proj"}
    assert set(lora_targets(model)[0]) == {"q_proj", "up_proj"}
    assert "mlp.down_proj.weight" in places(dense_weights(model))
