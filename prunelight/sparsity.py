"""Solvers that put zeros into one weight matrix: magnitude, Wanda, SparseGPT; any share or N:M.

Pure functions of a weight (O, I) and statistics of its input. Magnitude compares within the whole
matrix, Wanda (arXiv:2306.11695) within each output row, SparseGPT (arXiv:2301.00774) within blocks
of columns, and corrects the weights that stay. Counts are exact and ties go to the lower index; the
released codes prune one weight too many and all that tie with it.
"""

# O out_features (rows of several matrices may be stacked), I in_features, K columns of one block

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from prunelight.statistics import ties_in_any_order

_LAZY = 32  # columns that are corrected one by one; those beyond in one product
_DAMPINGS = (1.0, 10.0, 100.0, 1000.0)  # factors tried in turn until the Hessian is definite


@dataclass(frozen=True)
class Pattern:
    """N:M sparsity: of every `of` consecutive inputs of a row, `kept` stay (N is the number kept).

    The convention of NVIDIA and torch; the research codes count the zeros.

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
        """Return it as "N:M"."""
        return f"{self.kept}:{self.of}"

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read "N:M".

        Raises:
            ValueError: if it is none.
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


@dataclass(frozen=True)
class SparseGPT:
    """Settings of SparseGPT.

    Attributes:
        dampening: added to the Hessian's diagonal, as a share of its mean.
        block_size: columns solved together; zeros are chosen within them.
        act_order: solve the columns with the largest inputs first.
        bits: also round the weights that stay to this many bits (4 or 8) inside the same loop, so
            that later columns make up for both errors; they are stored dequantized.
        group_size: columns that share one scale and zero point, with bits.

    Raises:
        ValueError: if a value is out of range.
    """

    dampening: float = 0.01
    block_size: int = 128
    act_order: bool = False
    bits: int | None = None
    group_size: int = 128

    def __post_init__(self) -> None:
        """Check the values."""
        if not self.dampening > 0 or self.block_size < 1:
            raise ValueError(
                f"dampening={self.dampening} must be above 0 and block_size={self.block_size} at "
                "least 1"
            )
        if self.bits not in (None, 4, 8):
            raise ValueError(f"bits={self.bits} must be 4, 8 or left out")
        if self.bits and (self.group_size < 1 or self.block_size % self.group_size):
            raise ValueError(
                f"group_size={self.group_size} must divide block_size={self.block_size}"
            )
        if self.bits and self.act_order:
            raise ValueError("act_order=True would scatter the groups of bits; use one of the two")


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
        ValueError: if they do not; names the weight.
    """
    if width % pattern.of:
        raise ValueError(
            f"pattern={pattern} needs in_features to be a multiple of {pattern.of}, {name} has "
            f"{width}"
        )


def lowest_mask(scores: Tensor, count: int) -> Tensor:
    """Return True at the `count` lowest scores along the last dimension; ties by lower index."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    with ties_in_any_order():
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
    # By ranks: kthvalue and sums over millions of tiny groups are far slower.
    order = groups.argsort(dim=-1, stable=True)
    pruned = torch.zeros_like(groups, dtype=torch.bool)
    pruned.scatter_(-1, order[..., : amount.of - amount.kept], True)
    return pruned.reshape(scores.shape)


def matrix_mask(scores: Tensor, target: Pattern | int) -> Tensor:
    """Return True at the lowest scores of a whole matrix (O, K): a number of them, or by N:M."""
    if isinstance(target, Pattern):
        return row_mask(scores, target)
    return lowest_mask(scores.flatten(), target).view(scores.shape)


def magnitude_mask(weight: Tensor, amount: Amount) -> Tensor:
    """Return True where a weight is pruned: the smallest |W| of the whole matrix (O, I)."""
    target = amount if isinstance(amount, Pattern) else count_zeros(weight.numel(), amount)
    return matrix_mask(_finite(weight).abs(), target)


def wanda_scores(weight: Tensor, norms: Tensor) -> Tensor:
    """Return |W_ij| * ||X_j||, float32 (O, I) (arXiv:2306.11695, Eq. 1)."""
    return _finite(weight).abs() * _finite(norms, "norms of the inputs")


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
    """Return True where a weight is pruned, with a share that differs from row to row.

    A row loses its lowest scores as long as their sum stays below alpha times the row's sum, with
    one alpha for all rows (released code of Wanda, `use_variant`). That code searches alpha until
    the sparsity is right to 1e-3; here floor(O * I * sparsity) weights are pruned.
    """
    scores = wanda_scores(weight, norms)
    values, order = scores.sort(dim=-1, stable=True)
    # Shares of the row's sum rise along the sorted row: the lowest of all rows are alpha's.
    with ties_in_any_order():
        sums = values.cumsum(-1)
    share = sums / values.sum(-1, keepdim=True).clamp(min=1e-30)
    pruned = matrix_mask(share, count_zeros(scores.numel(), sparsity))
    return torch.zeros_like(pruned).scatter_(-1, order, pruned)


def sparsegpt(
    weight: Tensor, hessian: Tensor, amount: Amount, settings: SparseGPT | None = None
) -> Tensor:
    """Prune and correct a weight so that its outputs change least (arXiv:2301.00774, Algorithm 1).

    Args:
        weight: (O, I).
        hessian: X^T X summed over tokens, (I, I), in any unit.
        amount: share of zeros, exact in total and (to one weight) in each block; or N:M.
        settings: see `SparseGPT`.

    Returns:
        The new weight, (O, I), float32, exactly zero where pruned. The inputs are unchanged.

    Raises:
        ValueError: if M does not divide I, act_order meets a pattern, or a number is NaN or Inf,
            in the Hessian too.
    """
    return sparsegpt_stacked([weight], hessian, [amount], settings or SparseGPT())[0]


@torch.no_grad()
def sparsegpt_stacked(
    weights: Sequence[Tensor], hessian: Tensor, amounts: Sequence[Amount], settings: SparseGPT
) -> list[Tensor]:
    """Solve weights that share an input in one go; each one as `sparsegpt` alone would.

    Args:
        weights: each (O_k, I).
        hessian: X^T X of their common input, (I, I).
        amounts: one for each weight, all shares or all patterns with the same M.
        settings: see `SparseGPT`.
    """
    for amount in amounts:
        _check_pattern(amount, weights[0].shape[1], settings)
    hessian = _finite(hessian, "Hessian").to(torch.promote_types(weights[0].dtype, torch.float32))
    dead = hessian.diagonal() <= 0
    order = hessian.diagonal().argsort(descending=True, stable=True) if settings.act_order else None
    # Transposed, a column is contiguous and its update is one rank-1 call: (I, all O).
    columns = torch.cat([_finite(weight).T for weight in weights], dim=1)
    if order is not None:
        columns, hessian, dead = columns[order], hessian[order][:, order], dead[order]
    inverse = inverse_factor(hessian, settings.dampening)
    rows = [len(weight) for weight in weights]
    of = max(a.of if isinstance(a, Pattern) else 1 for a in amounts)
    width = max(settings.block_size // of, 1) * of  # whole groups of M
    for start in range(0, len(columns), width):
        block = slice(start, min(start + width, len(columns)))
        targets = [_target(a, size, block) for a, size in zip(amounts, rows, strict=True)]
        factor = inverse[block, block]
        errors = _solve_block(columns[block], factor, dead[block], rows, targets, settings)
        columns[block.stop :].addmm_(inverse[block, block.stop :].T, errors, alpha=-1)
    if order is not None:
        columns = torch.empty_like(columns).index_copy_(0, order, columns)
    return [part.T.contiguous() for part in columns.split(rows, dim=1)]


def _check_pattern(amount: Amount, width: int, settings: SparseGPT) -> None:
    if not isinstance(amount, Pattern):
        return
    check_width(amount, width)
    if settings.act_order:
        raise ValueError(f"act_order=True breaks the groups of pattern={amount}")
    if settings.bits and settings.block_size % amount.of:
        raise ValueError(
            f"block_size={settings.block_size} must be a multiple of {amount.of} for "
            f"pattern={amount} with bits={settings.bits}"
        )


def _target(amount: Amount, rows: int, block: slice) -> Pattern | int:
    """Return the zeros to place in a block of columns so that the running total stays exact."""
    if isinstance(amount, Pattern):
        return amount
    return count_zeros(block.stop * rows, amount) - count_zeros(block.start * rows, amount)


def _solve_block(
    columns: Tensor,
    factor: Tensor,
    dead: Tensor,
    rows: Sequence[int],
    targets: Sequence[Pattern | int],
    settings: SparseGPT,
) -> Tensor:
    """Prune one block (K, O) in place; return the errors (K, O) that the later columns make up for.

    Args:
        columns: columns of the weights, corrected for all earlier blocks.
        factor: the block's own part of the factor of the inverse Hessian, (K, K) upper.
        dead: inputs that are always zero, (K,): their weights are the first to go.
        rows: rows of each weight.
        targets: of each weight, the zeros to place in this block, or its pattern.
        settings: for the quantization.
    """
    diagonal = factor.diagonal()
    errors = torch.empty_like(columns)
    first = targets[0]
    step = first.of if isinstance(first, Pattern) else len(columns)  # columns chosen at a time
    grid = settings.group_size if settings.bits else len(columns)
    scale = zero = None
    final = columns
    if settings.bits:  # the grid must hold what the weights grow to when they make up for others
        final = columns.clone()
        _solve_block(final, factor, dead, rows, targets, replace(settings, bits=None))
    done = 0  # columns whose errors have reached the whole block
    for i in range(len(columns)):
        if i % step == 0:
            group = slice(i, i + step)
            scores = _saliency(columns[group], diagonal[group], dead[group]).split(rows, dim=1)
            chosen = zip(scores, targets, strict=True)
            pruned = torch.cat([matrix_mask(part.T, of) for part, of in chosen]).T.contiguous()
        if settings.bits and i % grid == 0:
            scale, zero = _grid(final[i : i + grid], settings.bits)
        kept = columns[i].masked_fill(pruned[i % step], 0)
        if settings.bits:
            kept = _round(kept, scale, zero, settings.bits)
        torch.sub(columns[i], kept, out=errors[i]).div_(diagonal[i])
        columns[i] = kept
        # Errors reach the next few columns at once, those beyond in one product: fewer passes.
        end = min(done + _LAZY, len(columns))
        columns[i + 1 : end].addr_(factor[i, i + 1 : end], errors[i], alpha=-1)
        if i + 1 == end or (i + 1) % step == 0 or (i + 1) % grid == 0:
            ready = slice(done, i + 1)
            columns[end:].addmm_(factor[ready, end:].T, errors[ready], alpha=-1)
            done = i + 1
    return errors


def _saliency(columns: Tensor, diagonal: Tensor, dead: Tensor) -> Tensor:
    """Return w^2 / [H^-1]_jj of the columns (K, O), by which the error rises (OBS).

    Columns of dead inputs come below all others, ordered by |w|.
    """
    scores = (columns / diagonal[:, None]).square_()
    if bool(dead.any()):
        scores[dead] = -1 / (1 + columns[dead].abs())
    return scores


def inverse_factor(hessian: Tensor, dampening: float) -> Tensor:
    """Return the upper U with U^T U = (H + dampening * mean(diag H) * I)^-1, (I, I).

    A dead input (zero diagonal) gets the mean of the others. Where rounding leaves the matrix
    indefinite, the damping is raised tenfold, up to 1000 times.

    Raises:
        ValueError: if that does not help either.
    """
    damped = hessian.clone()
    diagonal = damped.diagonal()
    alive = diagonal > 0
    diagonal[~alive] = diagonal[alive].mean() if bool(alive.any()) else 1  # in the Hessian's unit
    unit = dampening * diagonal.mean()
    plain = diagonal.clone()
    for factor in _DAMPINGS:
        diagonal.copy_(plain + factor * unit)
        lower, fault = torch.linalg.cholesky_ex(damped)
        if not fault:
            upper, fault = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not fault and bool(upper.isfinite().all()):
            return upper
    raise ValueError(
        f"the Hessian of {len(hessian)} inputs is singular even with {_DAMPINGS[-1]:g} times "
        f"dampening={dampening}; raise it, or calibrate on more text"
    )


def _grid(columns: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return scale and zero point (O,) of an asymmetric grid over a group of columns (K, O)."""
    low, high = columns.amin(0).clamp(max=0), columns.amax(0).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-12)
    return scale, (-low / scale).round()


def _round(column: Tensor, scale: Tensor | None, zero: Tensor | None, bits: int) -> Tensor:
    """Return a column (O,) rounded to its grid, dequantized; zeros stay exactly zero."""
    assert scale is not None
    assert zero is not None
    return ((column / scale).round().add_(zero).clamp_(0, 2**bits - 1).sub_(zero)).mul_(scale)


def _finite(values: Tensor, what: str = "weight") -> Tensor:
    """Return values in float32 (float64 stays).

    Raises:
        ValueError: if one is NaN or Inf.
    """
    values = values if values.dtype == torch.float64 else values.float()
    if not bool(values.isfinite().all()):
        raise ValueError(f"the {what} of shape {tuple(values.shape)} holds NaN or Inf")
    return values
