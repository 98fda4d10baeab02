"""LoRA that keeps zeros: it adapts W + m * (s B A).

The update of LoRA (arXiv:2106.09685) is multiplied by the mask m = (W != 0) of the frozen weight.
So merging keeps every zero and every N:M group. A masked update has no low rank, which costs one
more dense product per matrix and step.

Private names of peft used here: the methods of `LoraVariant`, `LoraLayer.lora_variant`, and of
`ParamWrapper` `_activate_lora`, `_remove_parametrizations`, `get_delta_factors` and `get_param`.
Tested with peft 0.21; tests/recovery/test_private_apis.py checks that these names exist.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear, LoraLayer, LoraVariant, ParamWrapper
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.utils import parametrize

from prunelight.recovery.lora import keep_as_peft
from prunelight.recovery.zeros.weight_masks import unpack_mask


def mask_adapters(
    model: PeftModel, names: Iterable[str], quantized: Mapping[str, Tensor] = MappingProxyType({})
) -> None:
    """Make LoRA adapters keep the zeros of their weights, in place: W + m * (s B A).

    Each step derives the mask from the weight, so that zeros added later count too.

    Args:
        model: a model with adapters of `attach_lora`.
        names: names of matrices. Those without an adapter are frozen and keep their zeros anyway.
        quantized: name of a quantized matrix -> packed mask (O, I) of its full-precision weight.
            Rounding to 4 or 8 bits makes further weights zero, which the mask must not hold.
    """
    base = model.get_base_model()
    for name in names:
        owner, _, parameter_name = name.rpartition(".")
        layer: Any = base.get_submodule(owner)
        while isinstance(layer, ParamWrapper):  # nested, one wrapper per fused weight
            if layer.parameter_name == parameter_name:
                # peft offers no variants or hooks for fused weights. Another class replaces two
                # methods of the wrapper, which keeps its adapters.
                layer.__class__ = MaskedParamWrapper
            layer = layer.base_layer
        layer = getattr(layer, parameter_name, None)
        if isinstance(layer, Linear) or (name in quantized and isinstance(layer, LoraLayer)):
            keep_as_peft(layer)
            for adapter in layer.lora_A:
                packed = quantized.get(name)
                variant = MaskedLora() if packed is None else QuantizedMaskedLora(packed)
                layer.lora_variant[adapter] = variant


class MaskedLora(LoraVariant):
    """LoRA of a `Linear` or `Conv1D` whose update is masked: y = x W^T + dropout(x) (m * s B A)^T.

    A variant in peft's terms; peft's base class documents each method.
    """

    def supports_lora_conversion(self) -> bool:
        """Return False: the masked update has no low rank."""
        return False

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: object
    ) -> Tensor:
        """Return `result` plus the masked update of x (..., I)."""
        W = module.get_base_layer().weight
        # peft passes x in float32, the adapter's dtype. The masked update is a dense product, so it
        # is computed in the dtype of the base's product: half precision, or autocast's dtype.
        dropout = module.lora_dropout[active_adapter]
        joined = not (module.training and getattr(dropout, "p", 0))
        return MaskedUpdate.apply(
            dropout(x).to(result.dtype),
            result.detach() if joined else result,
            W.T if module.fan_in_fan_out else W,
            module.lora_A[active_adapter].weight,
            module.lora_B[active_adapter].weight,
            module.scaling[active_adapter],
            joined,
        )

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return the merged weight; kept weights that round to zero become the smallest number."""
        W = orig_weight
        merged = W + MaskedLora._delta(module, active_adapter, W)
        return merged.where((merged != 0) | (W == 0), W.sign() * torch.finfo(W.dtype).tiny)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """Merge into the weight, in place."""
        orig_weight.data += MaskedLora._delta(module, active_adapter, orig_weight)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return the weight as it was before merging, up to rounding."""
        return orig_weight - MaskedLora._delta(module, active_adapter, orig_weight)

    @staticmethod
    def _delta(module: Any, adapter: str, W: Tensor) -> Tensor:
        return module.get_delta_weight(adapter).masked_fill(W == 0, 0).to(W.dtype)


class QuantizedMaskedLora(LoraVariant):
    """LoRA of a quantized weight whose update is masked; for training, not for merging.

    Args:
        kept: packed mask (O, I) of the weight in full precision.
    """

    def __init__(self, kept: Tensor) -> None:
        self._kept = kept  # not a buffer: DDP would broadcast a buffer in every step

    def supports_lora_conversion(self) -> bool:
        """Return False: the masked update has no low rank."""
        return False

    def forward(  # type: ignore[override]  # peft's is a static method
        self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: object
    ) -> Tensor:
        """Return `result` plus the masked update of x (..., I)."""
        self._kept = self._kept.to(x.device)
        return MaskedUpdate.apply(
            module.lora_dropout[active_adapter](x).to(result.dtype),
            result,
            self._kept,
            module.lora_A[active_adapter].weight,
            module.lora_B[active_adapter].weight,
            module.scaling[active_adapter],
            False,
        )


class MaskedParamWrapper(ParamWrapper):
    """LoRA of fused expert weights (E, O, I) whose update is masked."""

    def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> Tensor:
        """Return the masked update, for merging."""
        delta = super().get_delta_weight(adapter_name, *args, **kwargs)
        return delta.masked_fill(self.get_param() == 0, 0)

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        """Replace the weight by the masked sum while the experts run."""
        adapters = [adapter for adapter in active_adapters if adapter in self.lora_A]
        if not adapters:
            yield
            return
        (adapter,) = adapters
        owner: Any = self.get_base_layer()
        proxy = _MaskedSumProxy(*self.get_delta_factors(adapter))
        parametrize.register_parametrization(owner, self.parameter_name, proxy)
        owner.parametrizations[self.parameter_name].original.requires_grad_(False)
        try:
            with parametrize.cached():
                yield
        finally:
            self._remove_parametrizations()


class _MaskedSumProxy(nn.Module):
    """Parametrization that gives m * (W + s L R) in place of the frozen weight W."""

    def __init__(self, lhs: Tensor, rhs: Tensor, scaling: float) -> None:
        super().__init__()
        self.factors = (lhs, rhs, scaling)

    def forward(self, W: Tensor) -> Tensor:
        return MaskedSum.apply(W, *self.factors)


class MaskedUpdate(torch.autograd.Function):
    """y + x (m * s B A)^T for y (..., O), x (..., I), W (O, I), A (r, I), B (O, r); W is frozen.

    Packed bits of m may stand in place of W where `joined` is False.

    Autograd would keep mask and update (O, I) of every matrix until the backward. Here the backward
    computes both again, in the dtype of x, like the large products.

    With `joined`, y is x W^T of the same x, detached from the graph. The backward then adds the
    gradient through y to the gradient of x, which saves a product.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        W: Tensor,
        A: Tensor,
        B: Tensor,
        scaling: float,
        joined: bool,
    ) -> Tensor:
        """Return the updated output, (..., O)."""
        ctx.save_for_backward(x, W, A, B)
        ctx.scaling, ctx.joined = scaling, joined
        with torch.autocast(x.device.type, enabled=False):
            delta = (scaling * B).to(x.dtype) @ A.to(x.dtype)
            return y + F.linear(x, delta.mul_(_mask(W, delta)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, y, A and B."""
        x, W, A, B = ctx.saved_tensors  # read once: gradient checkpointing allows no second read
        dtype = A.dtype
        with torch.autocast(x.device.type, enabled=False):
            A, B = A.to(x.dtype), (ctx.scaling * B).to(x.dtype)
            delta = B @ A
            mask, grad_x = _mask(W, delta), None
            if ctx.needs_input_grad[0]:
                delta.mul_(mask)
                grad_x = gradient @ (delta.add_(W) if ctx.joined else delta)
            grad_delta = (_token_rows(gradient).T @ _token_rows(x)).mul_(mask)  # (O, I)
            grad_A, grad_B = B.T @ grad_delta, ctx.scaling * (grad_delta @ A.T)
            grad_y = None if ctx.joined else gradient
            return grad_x, grad_y, None, grad_A.to(dtype), grad_B.to(dtype), None, None


def _token_rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _mask(W: Tensor, delta: Tensor) -> Tensor:
    """Return m as numbers 0 and 1; on a CPU ten times as fast to apply as a bool mask."""
    if W.dtype == torch.uint8:
        return unpack_mask(W, delta).to(delta.dtype)
    return W.sign().abs_().to(delta.dtype)


class MaskedSum(torch.autograd.Function):
    """m * (W + s L R) for W (E, O, I), L (E, O, r), R (E, r, I); W is frozen.

    This equals W + m * s L R, since W is zero where m is. The backward computes the mask again.
    """

    @staticmethod
    def forward(ctx: Any, W: Tensor, lhs: Tensor, rhs: Tensor, scaling: float) -> Tensor:
        """Return the weight to compute with, like W."""
        ctx.save_for_backward(W, lhs, rhs)
        ctx.scaling = scaling
        with torch.autocast(W.device.type, enabled=False):
            return torch.baddbmm(W, lhs, rhs, alpha=scaling).masked_fill_(W == 0, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the factors."""
        W, lhs, rhs = ctx.saved_tensors
        with torch.autocast(W.device.type, enabled=False):
            grad_product = gradient.masked_fill(W == 0, 0).mul_(ctx.scaling)
            return None, grad_product @ rhs.mT, lhs.mT @ grad_product, None
