"""What a loss must know of a batch as plain numbers, found out before the batch is on its device.

A host that asks an accelerator for a number waits until all work before it is done. So the
positions that count, and the number of tokens, are taken from the batch while it is on the CPU.
"""

# B sequences, T tokens, M tokens that count, k of a top-k

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prunelight.losses import counted_targets


@dataclass(frozen=True)
class BatchFacts:
    """Facts of one training batch.

    Attributes:
        num_tokens: tokens without padding.
        padded: the batch holds padding.
        positions: positions among the B * T that predict a token that counts, (M,).
        targets: the tokens that they predict, (M,).
        teacher: the teacher's ids (M, k) and log-probabilities (M, k + 1), of a cache; else None.
    """

    num_tokens: int
    padded: bool
    positions: Tensor
    targets: Tensor
    teacher: tuple[Tensor, Tensor] | None = None

    def to(self, device: torch.device) -> BatchFacts:
        """Return the facts with their tensors on a device; the host does not wait for a GPU."""
        if self.positions.device == device:
            return self
        teacher = None if self.teacher is None else [_moved(part, device) for part in self.teacher]
        return replace(
            self,
            positions=_moved(self.positions, device),
            targets=_moved(self.targets, device),
            teacher=None if teacher is None else (teacher[0], teacher[1]),
        )


def facts_of(
    batch: Mapping[str, Tensor], teacher: tuple[Tensor, Tensor] | None = None
) -> BatchFacts:
    """Return the facts of a batch; waits for the device on which the batch is.

    Args:
        batch: input_ids and labels, (B, T), and an attention_mask of 0 and 1 if there is padding.
        teacher: what a cache of the teacher says of the tokens that count.
    """
    mask, num_tokens = batch.get("attention_mask"), batch["input_ids"].numel()
    if mask is not None:
        num_tokens = int(mask.sum())
    padded = num_tokens < batch["input_ids"].numel()
    return BatchFacts(num_tokens, padded, *counted_targets(batch["labels"]), teacher)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; from pinned memory a GPU copies while the host goes on."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type == "cuda")
