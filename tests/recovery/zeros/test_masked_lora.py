"""Masked LoRA: an update that leaves every zero where it is."""

from types import SimpleNamespace

import pytest
import torch
from peft.tuners.lora.layer import Linear, ParamWrapper
from tiny import tiny_model, token_windows
from torch import nn
from zeros import put_zeros

from prunelight.models.families.matrices import Matrix, matrices
from prunelight.planning.plan import Plan
from prunelight.planning.steps import Sparsify
from prunelight.recovery.lora import LoRA, attach_lora, merge_lora
from prunelight.recovery.zeros.masked_lora import (
    MaskedLora,
    MaskedSum,
    MaskedUpdate,
    mask_adapters,
)
from prunelight.recovery.zeros.planned_zeros import PlannedZeros
from prunelight.recovery.zeros.weight_masks import WeightMasks

FAMILIES = ("llama", "gpt2", "mixtral")  # Linear, Conv1D, fused experts


def sparse_model(family="llama"):
    model = tiny_model(family)
    put_zeros(matrices(model).values())
    return model


def adapted(family="llama", dropout=0.0, **settings):
    """A sparse model with masked adapters that have an effect."""
    model = sparse_model(family)
    names = list(matrices(model))
    wrapped = attach_lora(model, LoRA(r=2, dropout=dropout, **settings))
    mask_adapters(wrapped, names)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return wrapped.eval()


def plain_delta(layer):
    """s * B A of an adapter, in the shape of the weight, written out without peft."""
    A, B = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    if not isinstance(layer, ParamWrapper):
        delta = B @ A
        return layer.scaling["default"] * (delta.T if layer.fan_in_fan_out else delta)
    experts = layer.get_param().shape[0]
    rank = layer.r["default"]
    pairs = [(B[:, e::experts], A[e * rank : (e + 1) * rank]) for e in range(experts)]
    return layer.scaling["default"] * torch.stack([b @ a for b, a in pairs])


@torch.no_grad()
def reference(wrapped, family):
    """The sparse model with m * s B A added to its weights."""
    model = sparse_model(family)
    found = matrices(model)
    paths = {id(module): name for name, module in wrapped.get_base_model().named_modules()}
    for layer in wrapped.get_base_model().modules():
        if isinstance(layer, (Linear, ParamWrapper)):
            name = paths[id(layer)]
            if isinstance(layer, ParamWrapper):
                name = f"{name.partition('.base_layer')[0]}.{layer.parameter_name}"
            W = found[name].parameter
            W.add_(((W != 0) * plain_delta(layer)).float())
    return model


@torch.no_grad()
def logits_of(model):
    return model(token_windows()).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_lora_computes_with_w_plus_the_masked_update(family):
    wrapped = adapted(family)
    expected = logits_of(reference(wrapped, family))
    assert (logits_of(sparse_model(family)) - expected).abs().max() > 1e-2
    # x W + x D and x (W + D) round differently in float32, through 6 layers.
    torch.testing.assert_close(logits_of(wrapped), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_keeps_every_zero_and_gives_w_plus_the_update(family):
    wrapped = adapted(family)
    sparse, expected = matrices(sparse_model(family)), matrices(reference(wrapped, family))
    merged = matrices(merge_lora(wrapped))
    for name, matrix in merged.items():
        W = matrix.parameter
        assert torch.equal(W == 0, sparse[name].parameter == 0)
        torch.testing.assert_close(W, expected[name].parameter, rtol=1e-5, atol=1e-6)
    groups = merged["model.layers.0.self_attn.q_proj"] if family == "llama" else None
    if groups is not None:
        assert ((groups.parameter.view(32, -1, 4) != 0).sum(-1) == 2).all(), "2:4 stays 2:4"


def test_unmerging_gives_the_sparse_weights_back():
    wrapped = adapted()
    before = wrapped.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight.clone()
    wrapped.merge_adapter()
    W = wrapped.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
    assert torch.equal(W == 0, before == 0)
    assert not torch.equal(W, before)
    wrapped.unmerge_adapter()
    torch.testing.assert_close(W, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_adapters_equal_those_of_plain_autograd(family):
    def gradients(wrapped):
        wrapped.get_base_model().set_experts_implementation("eager")  # the fused one has no float64
        wrapped.double()(token_windows(), labels=token_windows()).loss.backward()
        return {n: p.grad for n, p in wrapped.named_parameters() if p.requires_grad}

    masked, unmasked = adapted(family), adapted(family)
    for layer in unmasked.modules():
        if isinstance(layer, Linear):  # the same products, with the mask and nothing recomputed
            layer.lora_variant["default"] = PlainVariant()
        elif isinstance(layer, ParamWrapper):
            layer.__class__ = PlainParamWrapper
    expected = gradients(unmasked)
    for name, gradient in gradients(masked).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12)
        assert gradient.abs().max() > 0


class PlainVariant:
    def forward(self, module, active_adapter, x, result, **kwargs):
        W = module.get_base_layer().weight
        update = module.get_delta_weight(active_adapter) * (W != 0)
        return result + x @ (update if module.fan_in_fan_out else update.T)


class PlainParamWrapper(ParamWrapper):
    def get_delta_factors(self, adapter_name):  # peft then adds identity @ update
        update = self.get_delta_weight(adapter_name) * (self.get_param() != 0)
        return torch.eye(update.shape[1]).to(update).expand(len(update), -1, -1), update, 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_kept_weight_that_merging_would_cancel_stays_apart_from_the_zeros(dtype):
    W = torch.tensor([[0.5, -0.25, 0.0, 1.0]], dtype=dtype)
    adapter = SimpleNamespace(get_delta_weight=lambda _: torch.tensor([[-0.5, 0.25, 9.0, 1.0]]))
    merged = MaskedLora.merge_safe(adapter, "default", W)
    assert merged.dtype == dtype
    assert ((merged == 0) == (W == 0)).all()
    assert merged[0, 3] == 2
    assert torch.equal(merged[0, :2].sign(), W[0, :2].sign())
    assert merged[0, :2].abs().max() < 1e-4


def test_custom_gradients_pass_the_numerical_check():
    generator = torch.Generator().manual_seed(0)

    def random(*shape, zeros=False):
        value = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return value * (value > 0) if zeros else value.requires_grad_()

    x, A, B = random(2, 3, 4), random(2, 4), random(5, 2)
    y, W = random(2, 3, 5), random(5, 4, zeros=True)
    assert torch.autograd.gradcheck(MaskedUpdate.apply, (x, y, W, A, B, 0.7, False))

    def joined(x, A, B):  # as with a frozen base product that is cut off from the graph
        return MaskedUpdate.apply(x, (x @ W.T).detach(), W, A, B, 0.7, True)

    def plain(x, A, B):
        return x @ W.T + x @ (0.7 * (W != 0) * (B @ A)).T

    found = []
    for call in (joined, plain):
        output = call(x, A, B)
        found.append((output, *torch.autograd.grad((output**2).sum(), (x, A, B))))
    assert all(torch.allclose(a, b) for a, b in zip(*found, strict=True))
    lhs, rhs = random(2, 5, 3), random(2, 3, 4)
    assert torch.autograd.gradcheck(MaskedSum.apply, (random(2, 5, 4, zeros=True), lhs, rhs, 0.7))


def test_dropout_acts_on_the_input_of_the_update_only():
    wrapped = adapted(dropout=0.5)
    layer = wrapped.get_base_model().model.layers[0].mlp.up_proj.train()
    W, x = layer.get_base_layer().weight, torch.randn(3, 32)
    torch.manual_seed(0)
    found = layer(x)
    torch.manual_seed(0)
    dropped = nn.functional.dropout(x, 0.5)
    delta = (plain_delta(layer) * (W != 0)).float()
    torch.testing.assert_close(found, x @ W.T + dropped @ delta.T)


def test_autograd_keeps_no_dense_update_and_no_mask():
    wrapped = adapted().train()
    weights = {p.data_ptr() for p in wrapped.parameters()}
    kept = []

    def keep(tensor):
        if tensor.data_ptr() not in weights and tensor.shape in ((64, 32), (32, 64)):
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        wrapped(token_windows(), labels=token_windows())
    assert kept == []


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_lora_works_under_autocast_and_over_half_precision(family):
    exact = logits_of(adapted(family))
    wrapped = adapted(family)
    with torch.autocast("cpu", torch.bfloat16):
        out = wrapped(token_windows(), labels=token_windows())
    assert out.logits.dtype == torch.bfloat16
    # bfloat16 has 8 bits; on average, since near a tie a router may choose another expert.
    assert (out.logits - exact).abs().mean() < 0.05 * exact.abs().mean()
    out.loss.backward()
    gradients = [p.grad for p in wrapped.parameters() if p.requires_grad]
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)
    half = wrapped.bfloat16()
    assert logits_of(half).dtype == torch.bfloat16


@pytest.mark.parametrize("family", FAMILIES)
def test_zeros_that_are_added_during_training_count_at_once(family):
    wrapped = adapted(family)
    name, matrix = next(reversed(matrices(sparse_model(family)).items()))
    masks = WeightMasks([matrix_of(wrapped, name)])
    kept = torch.rand(matrix.parameter.shape) < 0.5
    masks.update(name, kept)
    merged = matrices(merge_lora(wrapped))[name].parameter
    masks.check()
    assert torch.equal(merged != 0, kept & (matrix.parameter != 0))


def matrix_of(wrapped, name):
    owner, _, parameter_name = name.rpartition(".")
    module = wrapped.get_base_model().get_submodule(owner)
    if isinstance(module, ParamWrapper):
        return Matrix(name, module.get_base_layer(), parameter_name)
    return Matrix(name, getattr(module, parameter_name).get_base_layer())


def test_matrices_without_an_adapter_are_frozen_and_left_alone():
    wrapped = adapted(targets=["q_proj"])
    masked = [m for m in wrapped.modules() if isinstance(m, Linear) and m.lora_variant]
    assert len(masked) == 6
    before = logits_of(wrapped)
    torch.testing.assert_close(logits_of(merge_lora(wrapped)), before, rtol=1e-4, atol=1e-4)


def test_plans_of_another_model_are_refused():
    step = Sparsify({"model.layers.9.mlp.up_proj": 0.5}, "magnitude")
    with pytest.raises(ValueError, match=r"1 matrices that the model does not have, e.g. model.l"):
        PlannedZeros.find(tiny_model(), [Plan("DLP", {}, {}, (step,))])
