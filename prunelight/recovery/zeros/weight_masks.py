"""Masks that keep zeros while all weights are trained, and records that check zeros.

Full training takes the gradient of m * W. After every optimizer step it sets masked weights and
their optimizer state to exactly zero.
"""

# O out_features, I in_features

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from prunelight.models.families.matrices import Matrix
from prunelight.recovery.sharded_weights import local_shard, shard_like, sum_over_shards


def pack_mask(mask: Tensor) -> Tensor:
    """Return a bool tensor of n elements as bits on the CPU: uint8, (ceil(n / 8),)."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy()))


def unpack_mask(bits: Tensor, like: Tensor) -> Tensor:
    """Return packed bits as a bool tensor with shape and device of `like`.

    Raises:
        ValueError: if the number of bits does not fit.
    """
    if bits.numel() != (like.numel() + 7) // 8:
        raise ValueError(f"{8 * bits.numel()} packed bits do not fit shape {tuple(like.shape)}")
    bits_of_byte = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)  # (256, 8)
    table = torch.from_numpy(bits_of_byte).bool().to(like.device)
    return table[bits.to(like.device).int()].view(-1)[: like.numel()].view(like.shape)


def _check_zero(matrix: Matrix, pruned: Tensor) -> None:
    """Check this process' shard of a matrix; all processes must call this together."""
    weight = matrix.parameter
    filled = ((local_shard(weight) != 0) & pruned).sum()  # NaN counts as filled
    # The sum makes all processes fail together: if one failed alone, the others would wait for it.
    if sum_over_shards(filled, weight):
        raise RuntimeError(
            f"{filled} weights of {matrix.name} are pruned and no longer zero; train with "
            "keep_zeros=True, and let nothing else write to the weights"
        )


class ZeroRecord:
    """Which weights are zero now, as bits on the CPU, to check later that they still are."""

    def __init__(self, matrices: Iterable[Matrix]) -> None:
        """Record the zeros of the matrices."""
        self._zeros = [(matrix, pack_mask(matrix.parameter == 0)) for matrix in matrices]

    def check(self) -> None:
        """Check that all recorded zeros are exactly zero.

        Raises:
            RuntimeError: naming the matrix, and how many of its zeros are filled.
        """
        for matrix, bits in self._zeros:
            weight = matrix.parameter
            _check_zero(matrix, shard_like(unpack_mask(bits, weight), weight))


class WeightMasks:
    """Masks that keep pruned weights at exactly zero while all weights are trained.

    The whole masks are bits on the CPU, in the weight's stored shape (a `Conv1D` stores (I, O)). A
    mask that was used has one byte more per weight that this process holds, on the weight's device.

    Attributes:
        matrices: name -> matrix.

    Args:
        matrices: matrices whose present zeros are kept.
    """

    def __init__(self, matrices: Iterable[Matrix]) -> None:
        self.matrices = {matrix.name: matrix for matrix in matrices}
        self._bits = {n: pack_mask(m.parameter.detach() == 0) for n, m in self.matrices.items()}
        self._pruned: dict[str, Tensor] = {}  # of this process' shards, made when they are used
        self._hooks: list[Any] = []

    def pruned(self, name: str) -> Tensor:
        """Return the whole mask of a matrix, True on pruned weights, on the weight's device."""
        return unpack_mask(self._bits[name], self.matrices[name].parameter)

    def _local(self, name: str) -> Tensor:
        """Return the mask of this process' shard of a matrix."""
        weight = self.matrices[name].parameter
        known = self._pruned.get(name)
        if known is None or known.shape != local_shard(weight).shape:  # cut up since
            known = shard_like(self.pruned(name), weight)
        self._pruned[name] = known.to(weight.device)  # the model may have moved since
        return self._pruned[name]

    def share(self) -> float:
        """Return the share of pruned weights, in [0, 1]."""
        zeros = sum(int(self.pruned(name).sum()) for name in self.matrices)  # one mask at a time
        return zeros / sum(matrix.parameter.numel() for matrix in self.matrices.values())

    def update(self, name: str, kept: Tensor) -> None:
        """Prune more weights of a matrix, in place and for good.

        The optimizer's state follows with the next step, or at once with `apply(optimizer)`.

        Args:
            name: name of the matrix.
            kept: bool, False on weights to prune, in the stored shape of the unsharded weight.
        """
        pruned = self.pruned(name)
        self._set(name, pruned.logical_or_(~kept.to(pruned.device)))
        self._zero(name, None)

    def _set(self, name: str, pruned: Tensor) -> None:
        self._bits[name] = pack_mask(pruned)
        self._pruned[name] = shard_like(pruned, self.matrices[name].parameter)

    def apply(self, optimizer: Optimizer | None = None) -> None:
        """Set pruned weights, and their entries in the optimizer's state, to zero, in place."""
        for name in self.matrices:
            self._zero(name, optimizer)

    @torch.no_grad()
    def _zero(self, name: str, optimizer: Optimizer | None) -> None:
        weight, pruned = self.matrices[name].parameter, self._local(name)
        local_shard(weight).masked_fill_(pruned, 0)  # multiplying by 0 would leave -0.0 and NaN
        state = optimizer.state.get(weight, {}) if optimizer is not None else {}
        for value in state.values():
            # Codes of an 8-bit optimizer have the weight's shape too, but code 0 is no value 0.
            has_entries = isinstance(value, Tensor) and value.shape == weight.shape
            if has_entries and value.is_floating_point():
                local_shard(value).masked_fill_(pruned.to(value.device), 0)

    def watch(self, optimizer: Optimizer) -> None:
        """Mask gradients from now on, and weights and optimizer state after every optimizer step.

        Unmasked gradients of pruned weights would enter the norm for gradient clipping. They would
        also change kept weights in optimizers that mix the entries of a matrix. FSDP2 calls no
        hooks for gradients of sharded weights: call `mask_gradients` before each step there.
        """
        for name, matrix in self.matrices.items():
            if matrix.parameter.requires_grad and not isinstance(matrix.parameter, DTensor):
                # A hook on the tensor runs before DDP averages gradients and before clipping.
                self._hooks.append(matrix.parameter.register_hook(self._gradient_mask(name)))
        step = optimizer.register_step_post_hook(lambda stepped, *_: self.apply(stepped))
        self._hooks.append(step)

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Set the gradients of pruned weights to zero, in place, where weights are sharded."""
        for name, matrix in self.matrices.items():
            if isinstance(matrix.parameter, DTensor) and matrix.parameter.grad is not None:
                local_shard(matrix.parameter.grad).masked_fill_(self._local(name), 0)

    def _gradient_mask(self, name: str) -> Callable[[Tensor], Tensor]:
        return lambda gradient: gradient.masked_fill(self._local(name), 0)

    def unwatch(self) -> None:
        """Remove the hooks of `watch`."""
        while self._hooks:
            self._hooks.pop().remove()

    def check(self) -> None:
        """Check that all pruned weights are exactly zero.

        Raises:
            RuntimeError: naming the matrix, and how many of its pruned weights are not zero.
        """
        for name, matrix in self.matrices.items():
            _check_zero(matrix, self._local(name))

    def state_dict(self) -> dict[str, Tensor]:
        """Return which weights are kept, as bits: matrix name -> uint8, 1/8 byte per weight."""
        return {name: pack_mask(~self.pruned(name)) for name in self.matrices}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over the masks of a `state_dict` and set pruned weights to zero, in place.

        Raises:
            ValueError: if the state has masks of other matrices.
        """
        unmatched = set(state) ^ set(self.matrices)
        if unmatched:
            raise ValueError(
                f"masks of {len(unmatched)} matrices are only on one side, e.g. {min(unmatched)}"
            )
        for name, bits in state.items():
            self._set(name, ~unpack_mask(bits, self.matrices[name].parameter))
        self.apply()
