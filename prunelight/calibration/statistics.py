"""Streaming statistics: `update` with the tokens of each micro-batch, `result` at the end.

A statistic holds running sums, never a list of states, so memory does not grow with the calibration
set. The caller leaves out padding. `pool` adds up the sums of all ranks that share the windows; it
is called once, after the last update.
"""

# B sequences, T tokens, D hidden, I in_features

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import reduce
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from prunelight.runtime.processes import ProcessGroup

# Values of tokens that a mean holds on their device before they are added up; 4 MB.
_MOST_WAITING = 2**20


class TokenMean:
    """Mean over tokens of a value that each token has; of first tokens also apart.

    The values wait on their device, since a host that reads them waits for all work before them.

    Attributes:
        total, count: sum and number of the tokens that count, as of the last `settle`.
        first_total, first_count: those of first tokens.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, Tensor | None, Tensor | None]] = []
        self.total = 0.0
        self.first_total = 0.0
        self.count = 0
        self.first_count = 0

    def add(self, values: Tensor, mask: Tensor | None, first: Tensor | None) -> None:
        """Add the tokens of one micro-batch.

        Args:
            values: of the tokens, (B, T).
            mask: tokens that count, bool (B, T); None counts all.
            first: the first token of each sequence, bool (B, T); None takes position 0. These
                tokens are also summed apart, because attention sinks live there.
        """
        self._waiting.append((values, mask, first))
        if sum(values.numel() for values, *_ in self._waiting) >= _MOST_WAITING:
            self.settle()

    def settle(self) -> None:
        """Bring the values that wait to the CPU, all at once, and add them up in float64."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        flat = torch.cat([values.flatten() for values, *_ in waiting]).cpu()
        parts = flat.split([values.numel() for values, *_ in waiting])
        for part, (there, mask, first) in zip(parts, waiting, strict=True):
            values = part.view(there.shape)
            firsts = values[:, 0] if first is None else values[first.cpu()]
            counted = values if mask is None else values[mask.cpu()]
            self.total += counted.double().sum().item()
            self.count += counted.numel()
            self.first_total += firsts.double().sum().item()
            self.first_count += firsts.numel()

    def pool(self, group: ProcessGroup) -> Self:
        """Add up the sums of all ranks, in place, and return the statistic."""
        self.settle()
        self.total, count, self.first_total, first_count = group.totals(
            self.total, self.count, self.first_total, self.first_count
        )
        self.count, self.first_count = int(count), int(first_count)
        return self

    def result(self) -> float:
        """Return the mean over all counted tokens.

        Raises:
            ValueError: if no token was counted.
        """
        self.settle()
        if self.count == 0:
            raise ValueError("0 tokens were counted; ignore fewer tokens or mask less")
        return self.total / self.count

    def first_result(self) -> float:
        """Return the mean over the first tokens of all sequences."""
        self.settle()
        return self.first_total / max(1, self.first_count)


class MeanCosine(TokenMean):
    """Mean over tokens of the cosine similarity of two streams of hidden states, in [-1, 1]."""

    def update(self, x: Tensor, y: Tensor, mask: Tensor | None, first: Tensor | None) -> None:
        """Add the tokens of one micro-batch: states x and y (B, T, D); for the rest see `add`."""
        self.add(token_cosine(x, y), mask, first)


def token_cosine(x: Tensor, y: Tensor) -> Tensor:
    """Return the cosine similarity of each token's two states, (B, T, D) x 2 -> (B, T).

    Computed in float32 for every dtype: float16 overflows on massive activations. The released
    ShortGPT code computes all (T, T) products and takes their diagonal; we compute the diagonal
    alone, one sequence at a time to keep the float32 copies small.
    """
    rows = [cosine_similarity(a.float(), b.float(), dim=-1) for a, b in zip(x, y, strict=True)]
    return torch.stack(rows)


class InputNorm:
    """Squared norms of a weight's input features over tokens; float32, on the inputs' device.

    Attributes:
        tokens: number of tokens added.
        squares: sum of x_j^2 over tokens, (I,); zeros on the CPU before the first token.
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
        """Return ||X_j||_2 over all tokens, (I,); ones if all are zero, so that |W| alone decides.

        Raises:
            ValueError: if an input was NaN or Inf.
        """
        if not bool(self.squares.isfinite().all()):
            raise ValueError(
                "inputs are NaN or Inf; load the model in bfloat16 or float32, or check its weights"
            )
        # Not self.tokens, which counts this rank alone after `InputStatistics.reduce`.
        nonzero = bool(self.squares.any())
        return self.squares.sqrt() if nonzero else torch.ones_like(self.squares)


class InputVariance(InputNorm):
    """Variance of a weight's input features over tokens, and their squared norms.

    Micro-batches are joined by their means and squared deviations (Chan et al.). Unlike the
    difference of two large sums, this loses no digits.
    """

    def __init__(self, in_features: int) -> None:
        super().__init__(in_features)
        self.mean = torch.zeros(in_features)
        self.deviations = torch.zeros(in_features)

    def update(self, x: Tensor) -> None:
        """Add tokens (T, I)."""
        if not len(x):
            return
        tokens_before = self.tokens
        super().update(x)
        x = x.float()
        mean = x.mean(0)
        shift = mean - self.mean.to(x.device)
        self.mean = self.mean.to(x.device) + shift * (len(x) / self.tokens)
        self.deviations = self.deviations.to(x.device) + (x - mean).square().sum(0)
        self.deviations += shift.square() * (tokens_before * len(x) / self.tokens)

    def pool(self, group: ProcessGroup) -> None:
        """Join the means and squared deviations of all ranks, in place."""
        rank_tokens, rank_mean = self.tokens, self.mean
        super().pool(group)
        self.mean = group.sum(rank_mean * (rank_tokens / max(1, self.tokens)))
        shift = rank_mean - self.mean
        self.deviations = group.sum(self.deviations + rank_tokens * shift.square())

    def variance(self) -> Tensor:
        """Return the variance of each feature, (I,)."""
        return self.deviations / max(1, self.tokens)


class Hessian(InputNorm):
    """X^T X of a weight's inputs, and their squared norms; float32, on the inputs' device.

    Only blocks on and above the diagonal are computed, since the product is symmetric.
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
            if self.product is None:  # only tokens of other ranks reached this expert
                self.product = torch.zeros(*self.squares.shape * 2, dtype=self._DTYPE)
            self.product = group.sum(self.product)
            self.squares = self.product.diagonal()

    def result(self) -> Tensor:
        """Return X^T X, (I, I); the identity without any token, so that |W| alone decides.

        The tensor is the statistic's own: for 14,336 inputs a copy would take 0.8 GB.

        Raises:
            ValueError: if an input was NaN or Inf.
        """
        self.norms()  # raises if an input was NaN or Inf
        if self.product is None:
            return torch.eye(len(self.squares))
        for start in range(0, len(self.product), self._BLOCK):
            rows = self.product[start : start + self._BLOCK]
            square, right = rows[:, start:].split([len(rows), rows.shape[1] - start - len(rows)], 1)
            square.copy_(square.triu() + square.triu(1).T)
            self.product[start + len(rows) :, start : start + len(rows)] = right.T
        return self.product


class Gram(Hessian):
    """X^T X in float64; float32 is too coarse for its eigenvectors (SliceGPT, Tables 4 and 5)."""

    _DTYPE = torch.float64


def exact_median(parts: Callable[[], Iterable[Tensor]], group: ProcessGroup | None = None) -> float:
    """Return the lower median over all parts, as torch.median of the joined parts would.

    Non-negative floats have the order of their bit patterns. So two histograms, one of the upper
    and one of the lower 16 bits, find the median without joining the parts.

    Args:
        parts: returns the same non-negative float32 tensors at each call.
        group: the processes over whose parts the median is taken; None takes this process alone.
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
    index = int((cumulative <= rank).sum())
    return index, rank - (int(cumulative[index - 1]) if index else 0)


def check_finite(index: int, statistic: float, outputs: Tensor) -> None:
    """Check that a statistic of a decoder layer's outputs is finite.

    Args:
        index: of the layer.
        statistic: of its outputs.
        outputs: the outputs, or the largest number in them: they tell NaN from Inf.

    Raises:
        ValueError: if the statistic is NaN or Inf; names the layer.
    """
    if not math.isfinite(statistic):
        fault = "NaN" if bool(outputs.isnan().any()) else "Inf"
        raise ValueError(
            f"{fault} in the hidden states after decoder layer {index} (dtype {outputs.dtype}); "
            "load the model in bfloat16 or float32, or check its weights"
        )


def finite_values(values: Tensor, what: str = "weight") -> Tensor:
    """Return values in float32; float64 stays float64.

    Args:
        values: any tensor.
        what: name of the tensor in the error.

    Raises:
        ValueError: if a value is NaN or Inf.
    """
    values = values if values.dtype == torch.float64 else values.float()
    if not bool(values.isfinite().all()):
        raise ValueError(f"the {what} of shape {tuple(values.shape)} holds NaN or Inf")
    return values
