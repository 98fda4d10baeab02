"""LoRA that keeps zeros: it adapts W + m * (s B A).

LoRA (arXiv:2106.09685) multiplies its update by the mask m = (W != 0) of the frozen weight, so that
merging keeps every zero and every N:M group. That costs a dense product more per matrix and step:
with a mask, the update has no low rank.
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

from prunelight.recovery.zeros.weight_masks import unpack_mask


def mask_adapters(
    model: PeftModel, names: Iterable[str], quantized: Mapping[str, Tensor] = MappingProxyType({})
) -> None:
    """Make LoRA adapters keep the zeros of their weights, in place: W + m * (s B A).

    The mask is derived from the weight in every step: zeros that are added later count too.

    Args:
        model: adapted by `attach_lora`.
        names: of matrices; those without an adapter are frozen and keep their zeros as it is.
        quantized: masks (O, I) of quantized weights, packed, by name of their matrix: rounding
            makes further weights zero, which are none in the base that adapters are merged onto.
    """
    base = model.get_base_model()
    for name in names:
        owner, _, parameter_name = name.rpartition(".")
        layer: Any = base.get_submodule(owner)
        while isinstance(layer, ParamWrapper):  # one inside the other, one per fused weight
            if layer.parameter_name == parameter_name:
                # peft allows no variants here and offers no other hook; the wrapper keeps its
                # adapters and only looks up two methods elsewhere.
                layer.__class__ = MaskedParamWrapper
            layer = layer.base_layer
        layer = getattr(layer, parameter_name, None)
        if isinstance(layer, Linear) or (name in quantized and isinstance(layer, LoraLayer)):
            for adapter in layer.lora_A:
                masked = QuantizedMaskedLora(quantized[name]) if name in quantized else MaskedLora()
                layer.lora_variant[adapter] = masked


class MaskedLora(LoraVariant):
    """LoRA of a `Linear` or `Conv1D` whose update is masked: y = x W^T + dropout(x) (m * s B A)^T.

    What peft calls a variant; the base class says what each method is for.
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
        # peft hands over x in the adapter's float32. The update is a dense product here: it is
        # computed in the dtype of the base's own product, half precision or that of autocast.
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
        """Return the merged weight; a kept one that rounds to zero takes the smallest number."""
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
    """The masked update of a quantized weight; for training, not for merging.

    Args:
        kept: packed mask (O, I) of the weight in full precision.
    """

    def __init__(self, kept: Tensor) -> None:
        self._kept = kept  # no buffer: DDP would broadcast it in every step

    def supports_lora_conversion(self) -> bool:
        """Return False: the masked update has no low rank."""
        return False

    def forward(  # type: ignore[override]  # a method here, static in peft
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
        """Replace the weight by the masked sum; peft folds the factors into a dense one."""
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
    """What stands in for the frozen weight while the experts run."""

    def __init__(self, lhs: Tensor, rhs: Tensor, scaling: float) -> None:
        super().__init__()
        self.factors = (lhs, rhs, scaling)

    def forward(self, W: Tensor) -> Tensor:
        return MaskedSum.apply(W, *self.factors)


class MaskedUpdate(torch.autograd.Function):
    """y + x (m * s B A)^T for y (..., O), x (..., I), W (O, I), A (r, I), B (O, r); W is frozen.

    In place of W, packed bits of m will do where y is not joined.

    Autograd would keep mask and update, (O, I), of every matrix until the backward: they are
    computed again there, in the dtype of x as the large products are. `joined` says that y is
    x W^T of the very same x, cut off from the graph: its part of the gradient of x is added here,
    which saves a product.
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
        x, W, A, B = ctx.saved_tensors  # once: gradient checkpointing allows no more
        dtype = A.dtype
        with torch.autocast(x.device.type, enabled=False):
            A, B = A.to(x.dtype), (ctx.scaling * B).to(x.dtype)
            delta = B @ A
            mask, of_x = _mask(W, delta), None
            if ctx.needs_input_grad[0]:
                delta.mul_(mask)
                of_x = gradient @ (delta.add_(W) if ctx.joined else delta)
            of_delta = (_token_rows(gradient).T @ _token_rows(x)).mul_(mask)  # (O, I)
            of_A, of_B = B.T @ of_delta, ctx.scaling * (of_delta @ A.T)
            of_y = None if ctx.joined else gradient
            return of_x, of_y, None, of_A.to(dtype), of_B.to(dtype), None, None


def _token_rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _mask(W: Tensor, delta: Tensor) -> Tensor:
    """Return m as numbers 0 and 1: on a CPU ten times faster to apply than a bool mask."""
    if W.dtype == torch.uint8:
        return unpack_mask(W, delta).to(delta.dtype)
    return W.sign().abs_().to(delta.dtype)


class MaskedSum(torch.autograd.Function):
    """m * (W + s L R) for W (E, O, I), L (E, O, r), R (E, r, I); W is frozen.

    It equals W + m * s L R, since W is zero where m is. The mask is computed again in the backward.
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
            of_delta = gradient.masked_fill(W == 0, 0).mul_(ctx.scaling)
            return None, of_delta @ rhs.mT, lhs.mT @ of_delta, None
