"""Training that keeps zeros: masks for full training, and LoRA that adapts W + m * (s B A).

Full training takes the gradient of m * W, and after every optimizer step sets masked weights and
their optimizer state to exactly zero. LoRA (arXiv:2106.09685) multiplies its update by the mask
m = (W != 0) of the frozen weight, so that merging keeps every zero and every N:M group. That costs
a dense product more per matrix and step: with a mask, the update has no low rank.
"""

# O out_features, I in_features, E experts, r rank; m = (W != 0), s = alpha / r

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear, LoraLayer, LoraVariant, ParamWrapper
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from prunelight.architecture import Matrix
from prunelight.sharded import local, local_part, total


def pack(mask: Tensor) -> Tensor:
    """Return a bool tensor as bits on the CPU: uint8, (ceil(n / 8),)."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy()))


def unpack(bits: Tensor, like: Tensor) -> Tensor:
    """Return packed bits as a bool tensor with shape and device of `like`.

    Raises:
        ValueError: if the number of bits does not fit.
    """
    if bits.numel() != (like.numel() + 7) // 8:
        raise ValueError(f"{8 * bits.numel()} packed bits do not fit shape {tuple(like.shape)}")
    bits_of = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)  # (256, 8)
    table = torch.from_numpy(bits_of).bool().to(like.device)
    return table[bits.to(like.device).int()].view(-1)[: like.numel()].view(like.shape)


def _check_zero(matrix: Matrix, pruned: Tensor) -> None:
    """Check a matrix by the part of it that this rank has, on all ranks that share it."""
    weight = matrix.parameter
    filled = ((local(weight) != 0) & pruned).sum()  # NaN counts as filled
    if total(filled, weight):  # on all: a rank that failed alone would leave the others waiting
        raise RuntimeError(
            f"{filled} weights of {matrix.name} are pruned and no longer zero; train with "
            "keep_zeros=True, and let nothing else write to the weights"
        )


class ZeroRecord:
    """Where weights are zero now, as bits on the CPU, to check later that they still are."""

    def __init__(self, matrices: Iterable[Matrix]) -> None:
        """Record the zeros of the matrices."""
        self._zeros = [(matrix, pack(matrix.parameter == 0)) for matrix in matrices]

    def check(self) -> None:
        """Check that all recorded zeros are exactly zero.

        Raises:
            RuntimeError: naming the matrix, and how many of its zeros are filled.
        """
        for matrix, bits in self._zeros:
            weight = matrix.parameter
            _check_zero(matrix, local_part(unpack(bits, weight), weight))


class WeightMasks:
    """Masks that keep pruned weights at exactly zero while all weights are trained.

    One byte per weight that this rank has, in the shape in which it is stored (a `Conv1D` holds
    (I, O)) and on its device; once weights are sharded, beside one bit per weight on the CPU.

    Attributes:
        matrices: name -> matrix.

    Args:
        matrices: whose weights are kept where they are not zero.
    """

    def __init__(self, matrices: Iterable[Matrix]) -> None:
        self.matrices = {matrix.name: matrix for matrix in matrices}
        self._pruned = {name: m.parameter.detach() == 0 for name, m in self.matrices.items()}
        self._bits: dict[str, Tensor] = {}  # of the whole masks, where weights are sharded
        self._hooks: list[Any] = []

    def shard(self) -> None:
        """Keep of each mask what this rank has of its weight, after the weights were sharded."""
        for name, pruned in self._pruned.items():
            self._bits[name] = pack(pruned)
            self._pruned[name] = local_part(pruned, self.matrices[name].parameter)

    def pruned(self, name: str) -> Tensor:
        """Return the whole mask of a matrix, True where it is pruned, on the weight's device."""
        if self._bits:
            return unpack(self._bits[name], self.matrices[name].parameter)
        return self._local(name)

    def _local(self, name: str) -> Tensor:
        device = self.matrices[name].parameter.device  # the model may have moved since
        self._pruned[name] = self._pruned[name].to(device)
        return self._pruned[name]

    def share(self) -> float:
        """Return the share of pruned weights, in [0, 1]."""
        zeros = sum(int(self.pruned(name).sum()) for name in self.matrices)  # one mask at a time
        return zeros / sum(matrix.parameter.numel() for matrix in self.matrices.values())

    def update(self, name: str, kept: Tensor) -> None:
        """Prune more of a matrix, in place: what is not in `kept` becomes zero, for good.

        Optimizer state follows with the next step, or at once with `apply(optimizer)`.

        Args:
            name: of the matrix.
            kept: bool, True where weights stay, in the shape in which the whole weight is stored.
        """
        pruned = self.pruned(name)
        self._set(name, pruned.logical_or_(~kept.to(pruned.device)))
        self._zero(name, None)

    def _set(self, name: str, pruned: Tensor) -> None:
        if self._bits:
            self._bits[name] = pack(pruned)
        self._pruned[name] = local_part(pruned, self.matrices[name].parameter)

    def apply(self, optimizer: Optimizer | None = None) -> None:
        """Set pruned weights, and their entries in the optimizer's state, to zero, in place."""
        for name in self.matrices:
            self._zero(name, optimizer)

    @torch.no_grad()
    def _zero(self, name: str, optimizer: Optimizer | None) -> None:
        weight, pruned = self.matrices[name].parameter, self._local(name)
        local(weight).masked_fill_(pruned, 0)  # a product with 0 would leave -0.0 and NaN
        state = optimizer.state.get(weight, {}) if optimizer is not None else {}
        for value in state.values():
            # The codes of an 8-bit optimizer have the same shape, but their 0 is not the value 0.
            entries = isinstance(value, Tensor) and value.shape == weight.shape
            if entries and value.is_floating_point():
                local(value).masked_fill_(pruned.to(value.device), 0)

    def watch(self, optimizer: Optimizer) -> None:
        """Mask gradients from now on, and weights and state after every step of the optimizer.

        Without the gradients' mask, pruned weights would enter the norm that gradients are clipped
        by, and the update of kept weights in optimizers that mix the entries of a matrix. Sharded
        weights get theirs from FSDP2, which calls no hooks: call `mask_gradients` before each step.
        """
        for name, matrix in self.matrices.items():
            if matrix.parameter.requires_grad and not self._bits:
                # As a hook of the tensor it acts before DDP averages and before anything clips.
                self._hooks.append(matrix.parameter.register_hook(self._masker(name)))
        step = optimizer.register_step_post_hook(lambda stepped, *_: self.apply(stepped))
        self._hooks.append(step)

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Set the gradients of pruned weights to zero, in place, where weights are sharded."""
        for name, matrix in self.matrices.items() if self._bits else ():
            if matrix.parameter.grad is not None:
                local(matrix.parameter.grad).masked_fill_(self._local(name), 0)

    def _masker(self, name: str) -> Callable[[Tensor], Tensor]:
        return lambda gradient: gradient.masked_fill(self._local(name), 0)

    def unwatch(self) -> None:
        """Undo `watch`."""
        while self._hooks:
            self._hooks.pop().remove()

    def check(self) -> None:
        """Check that all pruned weights are exactly zero.

        Raises:
            RuntimeError: naming the matrix, and how many of its pruned weights are not.
        """
        for name, matrix in self.matrices.items():
            _check_zero(matrix, self._local(name))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the kept weights as bits: matrix name -> uint8, 1/8 byte per weight."""
        return {name: pack(~self.pruned(name)) for name in self.matrices}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the masks from `state_dict` and set pruned weights to zero, in place.

        Raises:
            ValueError: if the state is that of other matrices.
        """
        odd = set(state) ^ set(self.matrices)
        if odd:
            raise ValueError(f"masks of {len(odd)} matrices are only on one side, e.g. {min(odd)}")
        for name, bits in state.items():
            self._set(name, ~unpack(bits, self.matrices[name].parameter))
        self.apply()


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
                masked = PackedVariant(quantized[name]) if name in quantized else MaskedVariant()
                layer.lora_variant[adapter] = masked


class MaskedVariant(LoraVariant):
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
        merged = W + MaskedVariant._delta(module, active_adapter, W)
        return merged.where((merged != 0) | (W == 0), W.sign() * torch.finfo(W.dtype).tiny)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """Merge into the weight, in place."""
        orig_weight.data += MaskedVariant._delta(module, active_adapter, orig_weight)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return the weight as it was before merging, up to rounding."""
        return orig_weight - MaskedVariant._delta(module, active_adapter, orig_weight)

    @staticmethod
    def _delta(module: Any, adapter: str, W: Tensor) -> Tensor:
        return module.get_delta_weight(adapter).masked_fill(W == 0, 0).to(W.dtype)


class PackedVariant(LoraVariant):
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
            of_delta = (_rows(gradient).T @ _rows(x)).mul_(mask)  # (O, I)
            of_A, of_B = B.T @ of_delta, ctx.scaling * (of_delta @ A.T)
            of_y = None if ctx.joined else gradient
            return of_x, of_y, None, of_A.to(dtype), of_B.to(dtype), None, None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _mask(W: Tensor, delta: Tensor) -> Tensor:
    """Return m as numbers 0 and 1: on a CPU ten times faster to apply than a bool mask."""
    if W.dtype == torch.uint8:
        return unpack(W, delta).to(delta.dtype)
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
