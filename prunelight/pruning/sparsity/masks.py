"""Which weights of one matrix become zero: by magnitude, Wanda, any share or N:M.

Pure functions of a weight (O, I) and the norms of its input. Magnitude compares within the whole
matrix, Wanda (arXiv:2306.11695) within each output row. Counts are exact, and the lower index goes
first among equal scores. The released codes prune one weight too many, and all that equal it.
"""

# O out_features, I in_features

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from prunelight.calibration.statistics import finite_values
from prunelight.runtime.devices import allowing_nondeterministic_ties
from prunelight.scoring.weight_scores import wanda_scores


@dataclass(frozen=True)
class Pattern:
    """N:M sparsity: of every `of` (M) consecutive inputs of a row, `kept` (N) stay.

    NVIDIA and torch count so; the research codes count the zeros.

    Raises:
        ValueError: unless 0 < kept <= of.
    """

    kept: int
    of: int

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not 0 < self.kept <= self.of:
            raise ValueError(f"pattern={self} must keep at least 1 and at most {self.of} weights")

    def __str__(self) -> str:
        """Return "N:M"."""
        return f"{self.kept}:{self.of}"

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read "N:M".

        Raises:
            ValueError: if the text is no N:M.
        """
        kept, separator, of = text.partition(":")
        if not (text.isascii() and separator and kept.isdecimal() and of.isdecimal()):
            raise ValueError(f"pattern={text!r} must be N:M, N weights kept of M, such as 2:4")
        return cls(int(kept), int(of))

    @property
    def sparsity(self) -> float:
        """Return the share of zeros."""
        return 1 - self.kept / self.of


Amount: TypeAlias = float | Pattern  # the share of zeros in [0, 1], or N:M


def count_zeros(size: int, sparsity: float) -> int:
    """Return floor(size * sparsity), safe against the rounding of the product.

    Raises:
        ValueError: if sparsity does not lie in [0, 1].
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity={sparsity} must lie in [0, 1]")
    return min(size, math.floor(size * sparsity + 1e-6))


def check_width(pattern: Pattern, width: int, name: str = "the weight") -> None:
    """Check that N:M groups tile a row.

    Raises:
        ValueError: if they do not; the error names the weight.
    """
    if width % pattern.of:
        raise ValueError(
            f"pattern={pattern} needs in_features to be a multiple of {pattern.of}, {name} has "
            f"{width}"
        )


def lowest_mask(scores: Tensor, count: int) -> Tensor:
    """Return True at the `count` lowest scores along the last dimension.

    Among equal scores the lower index goes first.
    """
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    with allowing_nondeterministic_ties():
        threshold = scores.kthvalue(count, dim=-1, keepdim=True).values
    below = scores < threshold
    ties = scores == threshold
    missing = count - below.sum(-1, keepdim=True)
    if bool((ties.sum(-1, keepdim=True) == missing).all()):
        return below | ties
    return below | (ties & (ties.cumsum(-1) <= missing))


def row_mask(scores: Tensor, amount: Amount) -> Tensor:
    """Return True where a weight is pruned, compared within each row (O, I) or N:M group of it."""
    if not isinstance(amount, Pattern):
        return lowest_mask(scores, count_zeros(scores.shape[-1], amount))
    check_width(amount, scores.shape[-1])
    groups = scores.reshape(len(scores), -1, amount.of)
    # Ranks by argsort: kthvalue and sums over millions of tiny groups are far slower.
    order = groups.argsort(dim=-1, stable=True)
    pruned = torch.zeros_like(groups, dtype=torch.bool)
    pruned.scatter_(-1, order[..., : amount.of - amount.kept], True)
    return pruned.reshape(scores.shape)


def matrix_mask(scores: Tensor, target: Pattern | int) -> Tensor:
    """Return True at the lowest scores of a matrix (O, K): a number of them, or by N:M."""
    if isinstance(target, Pattern):
        return row_mask(scores, target)
    return lowest_mask(scores.flatten(), target).view(scores.shape)


def magnitude_mask(weight: Tensor, amount: Amount) -> Tensor:
    """Return True where a weight is pruned: the smallest |W| of the whole matrix (O, I)."""
    target = amount if isinstance(amount, Pattern) else count_zeros(weight.numel(), amount)
    return matrix_mask(finite_values(weight).abs(), target)


def wanda_mask(weight: Tensor, norms: Tensor, amount: Amount) -> Tensor:
    """Return True where a weight is pruned: the lowest Wanda scores of each output row.

    Args:
        weight: (O, I).
        norms: norms of the input features over tokens, (I,), in any unit.
        amount: share of zeros of each row, or N:M.

    Raises:
        ValueError: if M does not divide I, or a number is NaN or Inf.
    """
    return row_mask(wanda_scores(weight, norms), amount)


def wanda_variant_mask(weight: Tensor, norms: Tensor, sparsity: float) -> Tensor:
    """Return True where a weight is pruned; the share of zeros differs from row to row.

    A row loses its lowest scores as long as their sum stays below alpha times the row's sum. Alpha
    is the same for all rows (released code of Wanda, `use_variant`). That code searches alpha until
    the sparsity is right to 1e-3; here exactly floor(O * I * sparsity) weights are pruned.
    """
    scores = wanda_scores(weight, norms)
    values, order = scores.sort(dim=-1, stable=True)
    # Shares of the row's sum rise along a sorted row. So the lowest shares of the whole matrix are
    # those below one alpha.
    with allowing_nondeterministic_ties():
        sums = values.cumsum(-1)
    share = sums / values.sum(-1, keepdim=True).clamp(min=1e-30)
    pruned = matrix_mask(share, count_zeros(scores.numel(), sparsity))
    return torch.zeros_like(pruned).scatter_(-1, order, pruned)
