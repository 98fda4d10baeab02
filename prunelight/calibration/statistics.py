"""Streaming accumulators: `update` with the tokens of one micro-batch, `result` at the end.

They hold running sums, never a list of states, so memory does not grow with the calibration set.
Padding is masked by the caller. `pool` replaces the sums by those of all ranks that share the
windows; it comes once, after the last update.
"""

# B sequences, T tokens, D hidden, I in_features

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import reduce

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from prunelight.runtime.processes import ProcessGroup


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

    def pool(self, group: ProcessGroup) -> MeanCosine:
        """Add up the sums of all ranks, in place."""
        mine = (self.total, self.count, self.first_total, self.first_count)
        self.total, count, self.first_total, first_count = group.totals(*mine)
        self.count, self.first_count = int(count), int(first_count)
        return self

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


class InputNorm:
    """Squared norms of the input features of a weight, over tokens; float32 on the inputs' device.

    Attributes:
        tokens: how many were seen.
        squares: sum of x_j^2, (I,); a tensor of zeros on the CPU before the first token.
    """

    def __init__(self, in_features: int) -> None:
        self.tokens = 0
        self.squares = torch.zeros(in_features)

    def update(self, x: Tensor) -> None:
        """Add tokens (T, I)."""
        self.tokens += len(x)
        self.squares = self.squares.to(x.device) + x.float().square().sum(0)

    def pool(self, group: ProcessGroup) -> None:
        """Add up the sums of all ranks, in place."""
        self.tokens = int(group.totals(self.tokens)[0])
        self.squares = group.sum(self.squares)

    def norms(self) -> Tensor:
        """Return ||X_j||_2 over all tokens, (I,); ones if all are zero, which ranks by |W|.

        Raises:
            ValueError: if an input was NaN or Inf.
        """
        if not bool(self.squares.isfinite().all()):
            raise ValueError(
                "inputs are NaN or Inf; load the model in bfloat16 or float32, or check its weights"
            )
        seen = bool(self.squares.any())  # in another process perhaps, so not self.tokens
        return self.squares.sqrt() if seen else torch.ones_like(self.squares)


class InputVariance(InputNorm):
    """Variance of the input features of a weight over tokens, beside their squared norms.

    Chunks are joined by their own means and squared deviations (Chan et al.), which unlike a
    difference of two large sums loses no digits.
    """

    def __init__(self, in_features: int) -> None:
        super().__init__(in_features)
        self.mean = torch.zeros(in_features)
        self.deviations = torch.zeros(in_features)

    def update(self, x: Tensor) -> None:
        """Add tokens (T, I)."""
        if not len(x):
            return
        before = self.tokens
        super().update(x)
        x = x.float()
        mean = x.mean(0)
        shift = mean - self.mean.to(x.device)
        self.mean = self.mean.to(x.device) + shift * (len(x) / self.tokens)
        self.deviations = self.deviations.to(x.device) + (x - mean).square().sum(0)
        self.deviations += shift.square() * (before * len(x) / self.tokens)

    def pool(self, group: ProcessGroup) -> None:
        """Join the means and squared deviations of all ranks, in place."""
        own, mean = self.tokens, self.mean
        super().pool(group)
        self.mean = group.sum(mean * (own / max(1, self.tokens)))
        self.deviations = group.sum(self.deviations + own * (mean - self.mean).square())

    def variance(self) -> Tensor:
        """Return the variance of each feature, (I,)."""
        return self.deviations / max(1, self.tokens)


class Hessian(InputNorm):
    """X^T X of the inputs of a weight, beside their squared norms; float32 on the inputs' device.

    Only blocks on and above the diagonal are computed: the product is symmetric.
    """

    _BLOCK = 512
    _DTYPE = torch.float32

    def __init__(self, in_features: int) -> None:
        super().__init__(in_features)
        self.product: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Add tokens (T, I)."""
        x = x.to(self._DTYPE)
        self.tokens += len(x)
        if self.product is None:
            self.product = x.new_zeros(x.shape[1], x.shape[1])
        for start in range(0, x.shape[1], self._BLOCK):
            block = slice(start, start + self._BLOCK)
            self.product[block, start:].addmm_(x[:, block].T, x[:, start:])
        self.squares = self.product.diagonal()

    def pool(self, group: ProcessGroup) -> None:
        """Add up the products of all ranks, in place."""
        self.tokens = int(group.totals(self.tokens)[0])
        if self.tokens:
            if self.product is None:  # tokens of other ranks alone reached this expert
                self.product = torch.zeros(*self.squares.shape * 2, dtype=self._DTYPE)
            self.product = group.sum(self.product)
            self.squares = self.product.diagonal()

    def result(self) -> Tensor:
        """Return X^T X, (I, I); the identity if no token was seen, which ranks by |W|.

        Raises:
            ValueError: if an input was NaN or Inf.
        """
        self.norms()  # checks
        if self.product is None:
            return torch.eye(len(self.squares))
        upper = self.product.triu()
        return upper + upper.triu(1).T


class Gram(Hessian):
    """X^T X in float64, whose eigenvectors float32 would not give (SliceGPT, Tables 4 and 5)."""

    _DTYPE = torch.float64


def exact_median(parts: Callable[[], Iterable[Tensor]], group: ProcessGroup | None = None) -> float:
    """Return the lower median over parts without joining them, as torch.median of all would.

    Two histograms of 16 bits each: non-negative floats are ordered as their bit patterns are.

    Args:
        parts: gives the same non-negative float32 tensors each time it is called.
        group: whose parts count; None means that this one has them all.
    """
    group = group or ProcessGroup()

    def histogram(pick: Callable[[Tensor], Tensor]) -> Tensor:
        counts = (torch.bincount(pick(_bits(part)), minlength=1 << 16) for part in parts())
        return group.sum(reduce(torch.add, counts))

    high = histogram(lambda bits: bits >> 16)
    top, rank = _bin_of(high, (int(high.sum()) - 1) // 2)
    bottom, _ = _bin_of(histogram(lambda bits: bits[bits >> 16 == top] & 0xFFFF), rank)
    return torch.tensor(top << 16 | bottom, dtype=torch.int32).view(torch.float32).item()


def _bits(values: Tensor) -> Tensor:
    return values.float().contiguous().view(torch.int32).flatten()


def _bin_of(histogram: Tensor, rank: int) -> tuple[int, int]:
    """Return the bin that holds the element of a rank (from 0), and its rank within that bin."""
    cumulative = histogram.cumsum(0)
    found = int((cumulative <= rank).sum())
    return found, rank - (int(cumulative[found - 1]) if found else 0)


def check_finite(index: int, statistic: float, outputs: Tensor) -> None:
    """Raise ValueError, naming the layer, if a statistic of its outputs is NaN or Inf."""
    if not math.isfinite(statistic):
        what = "NaN" if bool(outputs.isnan().any()) else "Inf"
        raise ValueError(
            f"{what} in the hidden states after decoder layer {index} (dtype {outputs.dtype}); "
            "load the model in bfloat16 or float32, or check its weights"
        )


def finite_values(values: Tensor, what: str = "weight") -> Tensor:
    """Return values in float32 (float64 stays).

    Raises:
        ValueError: if one is NaN or Inf.
    """
    values = values if values.dtype == torch.float64 else values.float()
    if not bool(values.isfinite().all()):
        raise ValueError(f"the {what} of shape {tuple(values.shape)} holds NaN or Inf")
    return values
