"""SparseGPT (arXiv:2301.00774): prunes a weight, and corrects the entries that stay.

A pure function of a weight (O, I) and the Hessian of its input. Zeros are chosen within blocks of
columns, in exact numbers.
"""

# O out_features (rows of several matrices may be stacked), I in_features, K columns of one block

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prunelight.calibration.statistics import finite_values
from prunelight.pruning.sparsity.masks import Amount, Pattern, check_width, count_zeros, matrix_mask
from prunelight.runtime.arguments import above, at_least, check_fields
from prunelight.runtime.finite import fault_of

_LAZY = 32  # columns that are corrected one by one; later columns are corrected in one product

_DAMPINGS = (1.0, 10.0, 100.0, 1000.0)  # factors tried in turn until the Hessian is definite


@dataclass(frozen=True)
class SparseGPT:
    """Settings of SparseGPT.

    Attributes:
        dampening: added to the Hessian's diagonal, as a share of its mean.
        block_size: columns solved together; zeros are chosen within them.
        act_order: solve the columns with the largest inputs first.
        bits: also round the weights that stay to 4 or 8 bits. The same loop rounds and prunes, so
            later columns make up for both errors. Weights are stored dequantized.
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
        check_fields(self, dampening=above(0), block_size=at_least(1), group_size=at_least(1))
        if self.bits not in (None, 4, 8):
            raise ValueError(f"bits={self.bits} must be 4, 8 or left out")
        if self.bits and self.block_size % self.group_size:
            raise ValueError(
                f"group_size={self.group_size} must divide block_size={self.block_size}"
            )
        if self.bits and self.act_order:
            raise ValueError("act_order=True would scatter the groups of bits; use one of the two")


def sparsegpt(
    weight: Tensor, hessian: Tensor, amount: Amount, settings: SparseGPT | None = None
) -> Tensor:
    """Prune a weight and correct the rest, so that outputs change least (Algorithm 1).

    Args:
        weight: (O, I).
        hessian: X^T X summed over tokens, (I, I), in any unit.
        amount: share of zeros, exact in total and within one weight in each block; or N:M.
        settings: see `SparseGPT`.

    Returns:
        The new weight, (O, I), float32, exactly zero where pruned. The arguments are unchanged.

    Raises:
        ValueError: if M does not divide I, act_order meets a pattern, or the weight or the Hessian
            holds NaN or Inf.
    """
    return sparsegpt_stacked([weight], hessian, [amount], settings or SparseGPT())[0]


@torch.no_grad()
def sparsegpt_stacked(
    weights: Sequence[Tensor], hessian: Tensor, amounts: Sequence[Amount], settings: SparseGPT
) -> list[Tensor]:
    """Solve weights that share an input together; each result is that of `sparsegpt` alone.

    Args:
        weights: each (O_k, I).
        hessian: X^T X of their common input, (I, I).
        amounts: one for each weight, all shares or all patterns with the same M.
        settings: see `SparseGPT`.
    """
    for amount in amounts:
        _check_pattern(amount, weights[0].shape[1], settings)
    hessian = finite_values(hessian, "Hessian").to(
        torch.promote_types(weights[0].dtype, torch.float32)
    )
    dead = hessian.diagonal() <= 0
    order = hessian.diagonal().argsort(descending=True, stable=True) if settings.act_order else None
    # Transposed, a column is contiguous and its update is one rank-1 call: (I, all O).
    columns = torch.cat([finite_values(weight).T for weight in weights], dim=1)
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
    """Return the number of zeros in a block of columns that keeps the running total exact."""
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
    """Prune one block (K, O) in place; return its errors (K, O), which later columns make up for.

    Args:
        columns: columns of the weights, corrected for all earlier blocks.
        factor: the block's own part of the factor of the inverse Hessian, (K, K) upper.
        dead: True at inputs that are always zero, (K,); their weights go first.
        rows: rows of each weight.
        targets: for each weight its number of zeros in this block, or its pattern.
        settings: for the quantization.
    """
    diagonal = factor.diagonal()
    errors = torch.empty_like(columns)
    first = targets[0]
    step = first.of if isinstance(first, Pattern) else len(columns)  # columns chosen at a time
    grid = settings.group_size if settings.bits else len(columns)
    scale = zero = None
    final = columns
    if settings.bits:  # the grid must hold the weights as corrected, which are larger
        final = columns.clone()
        _solve_block(final, factor, dead, rows, targets, replace(settings, bits=None))
    done = 0  # columns whose errors have reached the whole block
    for i in range(len(columns)):
        if i % step == 0:
            group = slice(i, i + step)
            scores = _saliency(columns[group], diagonal[group], dead[group]).split(rows, dim=1)
            parts = zip(scores, targets, strict=True)
            pruned = torch.cat([matrix_mask(part.T, of) for part, of in parts]).T.contiguous()
        if settings.bits and i % grid == 0:
            scale, zero = _grid(final[i : i + grid], settings.bits)
        kept = columns[i].masked_fill(pruned[i % step], 0)
        if settings.bits:
            kept = _round(kept, scale, zero, settings.bits)
        torch.sub(columns[i], kept, out=errors[i]).div_(diagonal[i])
        columns[i] = kept
        # The next few columns are corrected at once, all later ones by one product: fewer passes.
        end = min(done + _LAZY, len(columns))
        columns[i + 1 : end].addr_(factor[i, i + 1 : end], errors[i], alpha=-1)
        if i + 1 == end or (i + 1) % step == 0 or (i + 1) % grid == 0:
            ready = slice(done, i + 1)
            columns[end:].addmm_(factor[ready, end:].T, errors[ready], alpha=-1)
            done = i + 1
    return errors


def _saliency(columns: Tensor, diagonal: Tensor, dead: Tensor) -> Tensor:
    """Return w^2 / [H^-1]_jj of columns (K, O): the rise of the error without a weight (OBS).

    Weights of dead inputs score below all others, in the order of |w|.
    """
    scores = (columns / diagonal[:, None]).square_()
    if bool(dead.any()):
        scores[dead] = -1 / (1 + columns[dead].abs())
    return scores


def inverse_factor(hessian: Tensor, dampening: float) -> Tensor:
    """Return the upper U with U^T U = (H + dampening * mean(diag H) * I)^-1, (I, I).

    A dead input (zero diagonal) gets the mean diagonal of the others. If rounding leaves the matrix
    indefinite, the damping rises tenfold, up to 1000 times.

    Raises:
        ValueError: if the matrix is still indefinite then.
    """
    diagonal = hessian.diagonal().clone()
    alive = diagonal > 0
    diagonal[~alive] = diagonal[alive].mean() if bool(alive.any()) else 1  # in the Hessian's unit
    unit = dampening * diagonal.mean()
    # Two matrices take turns, since each may take a gigabyte.
    work, triangle = torch.empty_like(hessian), torch.empty_like(hessian)
    fault = torch.zeros((), dtype=torch.int32, device=hessian.device)
    for factor in _DAMPINGS:
        work.copy_(hessian)
        work.diagonal().copy_(diagonal + factor * unit)
        torch.linalg.cholesky_ex(work, out=(triangle, fault))
        if not fault:
            torch.cholesky_inverse(triangle, out=work)
            torch.linalg.cholesky_ex(work, upper=True, out=(triangle, fault))
        if not fault and not fault_of(triangle):  # isfinite would copy it
            return triangle
    raise ValueError(
        f"the Hessian of {len(hessian)} inputs is singular even with {_DAMPINGS[-1]:g} times "
        f"dampening={dampening}; raise it, or calibrate on more text"
    )


def _grid(columns: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return scale and zero point, each (O,), of an asymmetric grid over columns (K, O)."""
    low, high = columns.amin(0).clamp(max=0), columns.amax(0).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-12)
    return scale, (-low / scale).round()


def _round(column: Tensor, scale: Tensor | None, zero: Tensor | None, bits: int) -> Tensor:
    """Return a column (O,) rounded to its grid and dequantized; zeros stay exactly zero."""
    assert scale is not None
    assert zero is not None
    return ((column / scale).round().add_(zero).clamp_(0, 2**bits - 1).sub_(zero)).mul_(scale)
