"""Streaming accumulators: `update` with the tokens of one micro-batch, `result` at the end.

They hold running sums in float64 on the CPU, never a list of states, so memory does not grow with
the calibration set. Padding is masked by the caller's `mask`.
"""

# B sequences, T tokens, D hidden

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity


class MeanCosine:
    """Mean over tokens of the cosine similarity of two streams of hidden states."""

    def __init__(self) -> None:
        self.total = 0.0
        self.first_total = 0.0
        self.count = 0
        self.first_count = 0

    def update(self, x: Tensor, y: Tensor, mask: Tensor | None, first: Tensor | None) -> None:
        """Add the tokens of one micro-batch.

        Args:
            x: hidden states, (B, T, D).
            y: the other hidden states, same shape.
            mask: tokens that count, bool (B, T); None counts all.
            first: the first token of each sequence, bool (B, T), summed apart because
                attention sinks live there; None takes position 0.
        """
        cosine = token_cosine(x, y)  # (B, T)
        heads = cosine[:, 0] if first is None else cosine[first]
        counted = cosine if mask is None else cosine[mask]
        self.total += counted.cpu().double().sum().item()
        self.count += counted.numel()
        self.first_total += heads.cpu().double().sum().item()
        self.first_count += heads.numel()

    def result(self) -> float:
        """Return the mean cosine over all counted tokens, in [-1, 1].

        Raises:
            ValueError: if no token was counted.
        """
        if self.count == 0:
            raise ValueError("0 tokens were counted; ignore fewer tokens or mask less")
        return self.total / self.count

    def first_result(self) -> float:
        """Return the mean cosine of the first tokens alone."""
        return self.first_total / max(1, self.first_count)


def token_cosine(x: Tensor, y: Tensor) -> Tensor:
    """Return the cosine similarity of each token's two states, (B, T, D) x 2 -> (B, T).

    In float32 whatever the input: float16 overflows on massive activations. Not by the (T, T)
    product of which the released ShortGPT code takes the diagonal. One sequence at a time, so
    that the float32 copies stay small.
    """
    rows = [cosine_similarity(a.float(), b.float(), dim=-1) for a, b in zip(x, y, strict=True)]
    return torch.stack(rows)
