"""Swaps of zeros: a kept weight and a pruned one of the same row change places (arXiv:2512.10922).

A swap is made where it lowers the error of the row's output, e H e^T, with e what the row lacks of
the dense one. What a swap changes is known exactly, so that the error never rises. Swaps stay
within a row, and within a group of N:M, so that the numbers of zeros stay too. The paper makes the
best swap of each row per round; here a round goes through all columns and makes the best swap for
each zero, which ends in the same kind of optimum after far fewer products.
"""

# O out_features, I in_features, R rows that have a zero in one column, P columns to swap with

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prunelight.calibration.statistics import finite_values
from prunelight.pruning.sparsity.masked_solution import masked_solution
from prunelight.pruning.sparsity.masks import Amount, Pattern

_LEAST_GAIN = 1e-6  # of a row's error: a smaller one may be rounding

# (rows (R,), column, slopes (R, P)) -> the values (R or R, P) that the column's weights would get.
_Values = Callable[[Tensor, int, Tensor], Tensor]


@torch.no_grad()
def swapped_mask(
    weight: Tensor, pruned: Tensor, hessian: Tensor, amount: Amount, rounds: int
) -> Tensor:
    """Return a better mask for a weight whose kept entries stay as they are.

    Args:
        weight: (O, I).
        pruned: bool (O, I), True where a weight is zero now.
        hessian: X^T X of its input, (I, I), in any unit.
        amount: of zeros; the groups of a pattern keep their numbers.
        rounds: at most so many passes over the columns; they end where no swap helps.

    Returns:
        True where a weight is pruned, bool (O, I), with the same number in each row.

    Raises:
        ValueError: if the weight or the Hessian holds NaN or Inf.
    """
    dense, pruned = finite_values(weight), pruned.clone()
    hessian = finite_values(hessian, "Hessian").to(dense.dtype)
    sparse = dense.masked_fill(pruned, 0)
    for _ in range(rounds):
        values: _Values = lambda rows, column, _: dense[rows, column, None]
        if not _swap(dense, sparse, pruned, hessian, amount, values):
            break
    return pruned


@torch.no_grad()
def swapped_solution(
    dense: Tensor, sparse: Tensor, kept: Tensor, hessian: Tensor, amount: Amount, rounds: int
) -> Tensor:
    """Return better weights (O, I), in which those that are kept are the best for their places.

    Args:
        dense: the dense weight, (O, I).
        sparse: the best weight for the places that are kept, (O, I).
        kept: these places, bool (O, I).
        hessian: positive definite, (I, I).
        amount: of zeros; the groups of a pattern keep their numbers.
        rounds: at most so many passes over the columns, each with a solution after it.
    """
    sparse, pruned, cross = sparse.clone(), ~kept, dense @ hessian
    diagonal = hessian.diagonal()
    for _ in range(rounds):
        values: _Values = lambda _, column, slopes: slopes / diagonal[column]
        if not _swap(dense, sparse, pruned, hessian, amount, values):
            break
        sparse = masked_solution(hessian, cross, ~pruned, start=sparse)
    return sparse


def _swap(
    dense: Tensor,
    sparse: Tensor,
    pruned: Tensor,
    hessian: Tensor,
    amount: Amount,
    values: _Values,
) -> int:
    """Swap zeros of each column in turn, in place in `sparse` and `pruned`; return how many.

    With g = e H, a swap that zeroes s_p and puts v at q changes the error e H e^T by
    2 s_p g_p + s_p^2 H_pp - 2 v (g_q + s_p H_pq) + v^2 H_qq.
    """
    gradient = (dense - sparse) @ hessian
    least = _LEAST_GAIN * ((dense - sparse) * gradient).sum(-1)
    diagonal, swaps = hessian.diagonal(), 0
    for column in range(dense.shape[1]):
        rows = pruned[:, column].nonzero()[:, 0]
        partners = _partners(column, amount, dense.shape[1])
        weights = sparse[rows, partners]
        slopes = torch.addcmul(gradient[rows, column, None], weights, hessian[column, partners])
        value = values(rows, column, slopes)
        change = value * (diagonal[column] * value - 2 * slopes)
        change += weights * (diagonal[partners] * weights + 2 * gradient[rows, partners])
        change.masked_fill_(pruned[rows, partners], torch.inf)
        best, place = change.min(-1)
        better = best < -least[rows]
        if not bool(better.any()):
            continue
        rows, place, value = rows[better], place[better], value[better]
        value = (value if value.shape[1] == 1 else value.gather(1, place[:, None]))[:, 0]
        partner = place + (partners.start or 0)
        gone = sparse[rows, partner]
        gradient[rows] += gone[:, None] * hessian[partner] - value[:, None] * hessian[column]
        sparse[rows, partner], sparse[rows, column] = 0, value
        pruned[rows, partner], pruned[rows, column] = True, False
        swaps += len(rows)
    return swaps


def _partners(column: int, amount: Amount, width: int) -> slice:
    """Return the columns whose weights may swap with those of a column."""
    if not isinstance(amount, Pattern):
        return slice(0, width)
    start = column - column % amount.of
    return slice(start, start + amount.of)
