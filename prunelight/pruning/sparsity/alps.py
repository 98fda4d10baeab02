"""ALPS (arXiv:2406.07831): the best zeros and the best weights beside them, by ADMM.

A pure function of a weight (O, I) and the Hessian of its input. ADMM minimises the error of the
outputs under a number of zeros: W solves a ridge regression, D keeps the largest weights of W, and
a penalty that rises pulls the two together until the places of the zeros stand. Conjugate gradients
then give the best weights at these places. SparseGPT's places are taken where they are better,
which the paper does not do: so the error is never above SparseGPT's.
"""

# O out_features, I in_features

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prunelight.calibration.statistics import finite_values
from prunelight.pruning.sparsity.masked_solution import masked_solution
from prunelight.pruning.sparsity.masks import Amount, Pattern, check_width, count_zeros, matrix_mask
from prunelight.pruning.sparsity.sparsegpt import SparseGPT, sparsegpt_stacked
from prunelight.pruning.sparsity.swaps import swapped_solution
from prunelight.runtime.arguments import above, at_least, check_fields
from prunelight.runtime.devices import float64_device

_FIRST_PENALTY = 0.1  # rho of the paper, for a Hessian with ones on its diagonal
_EVERY = 3  # iterations between two looks at which places have changed
# Share of the kept places that changed -> factor of the penalty (Section 3.2 of the paper).
_FACTORS = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))


@dataclass(frozen=True)
class ALPS:
    """Settings of ALPS.

    Attributes:
        dampening: added to the Hessian's diagonal, as a share of its mean.
        iterations: most iterations of ADMM; it ends before, once the places of the zeros stand.

    Raises:
        ValueError: if a value is out of range.
    """

    dampening: float = 0.01
    iterations: int = 300

    def __post_init__(self) -> None:
        """Check the values."""
        check_fields(self, dampening=above(0), iterations=at_least(1))


def alps(
    weight: Tensor,
    hessian: Tensor,
    amount: Amount,
    settings: ALPS | None = None,
    *,
    swaps: int = 0,
) -> Tensor:
    """Prune a weight, so that outputs change least (Algorithms 1 and 2).

    Args:
        weight: (O, I).
        hessian: X^T X summed over tokens, (I, I), in any unit.
        amount: share of zeros, exact over the whole weight; or N:M.
        settings: see `ALPS`.
        swaps: rounds of swaps of zeros after it, see `swaps.py`.

    Returns:
        The new weight, (O, I), float32, exactly zero where pruned. The arguments are unchanged.

    Raises:
        ValueError: if M does not divide I, or the weight or the Hessian holds NaN or Inf.
    """
    return alps_stacked([weight], hessian, [amount], settings or ALPS(), swaps=swaps)[0]


@torch.no_grad()
def alps_stacked(
    weights: Sequence[Tensor],
    hessian: Tensor,
    amounts: Sequence[Amount],
    settings: ALPS,
    *,
    swaps: int = 0,
) -> list[Tensor]:
    """Solve weights that share an input; their Hessian is decomposed once.

    Args:
        weights: each (O_k, I).
        hessian: X^T X of their common input, (I, I).
        amounts: one for each weight, all shares or all patterns with the same M.
        settings: see `ALPS`.
        swaps: rounds of swaps of zeros after it.
    """
    for amount in amounts:
        if isinstance(amount, Pattern):
            check_width(amount, weights[0].shape[1])
    dense = [finite_values(weight) for weight in weights]
    dead = hessian.diagonal() <= 0
    system = _System.of(finite_values(hessian, "Hessian"), settings.dampening, dense[0].dtype)
    others = sparsegpt_stacked(weights, hessian, amounts, SparseGPT(settings.dampening))
    return [
        _solve(weight, other, amount, system, dead, settings.iterations, swaps)
        for weight, other, amount in zip(dense, others, amounts, strict=True)
    ]


@dataclass(frozen=True)
class _System:
    """A damped Hessian in units in which its diagonal is one.

    Attributes:
        scale: root of the diagonal, (I,): a weight times this is the weight in these units.
        hessian: (I, I).
        values: its eigenvalues, (I,).
        vectors: its eigenvectors, one a column, (I, I).
    """

    scale: Tensor
    hessian: Tensor
    values: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, hessian: Tensor, dampening: float, dtype: torch.dtype) -> _System:
        """Return the system of X^T X; dead inputs get the mean energy of the others."""
        damped = hessian.to(float64_device(hessian.device)).to(torch.float64, copy=True)
        diagonal = damped.diagonal()
        alive = diagonal > 0
        diagonal[~alive] = diagonal[alive].mean() if bool(alive.any()) else 1
        diagonal += dampening * diagonal.mean()
        scale = diagonal.sqrt()
        damped /= scale[:, None]
        damped /= scale
        values, vectors = torch.linalg.eigh(damped)
        parts = (scale, damped, values.clamp(min=0), vectors)  # rounding may leave -1e-17
        return cls(*(part.to(hessian.device, dtype) for part in parts))

    def resolvent(self, penalty: float) -> Tensor:
        """Return (H + penalty)^-1, (I, I)."""
        return (self.vectors / (self.values + penalty)) @ self.vectors.T

    def error(self, change: Tensor) -> float:
        """Return tr(D H D^T), the error of a change D (O, I) of the weight."""
        return float(((change @ self.hessian) * change).sum(dtype=torch.float64))


def _solve(
    weight: Tensor,
    other: Tensor,
    amount: Amount,
    system: _System,
    dead: Tensor,
    iterations: int,
    swaps: int,
) -> Tensor:
    """Return one weight (O, I) with its zeros; `other` is SparseGPT's, which it has to beat."""
    target = amount if isinstance(amount, Pattern) else count_zeros(weight.numel(), amount)
    kept = weight.numel() - int(matrix_mask(weight, target).sum())
    if kept in (0, weight.numel()):
        return weight.clone() if kept else torch.zeros_like(weight)
    dense = weight * system.scale
    cross = dense @ system.hessian
    start, mask = _admm(dense, cross, target, kept, system, dead, iterations)
    solution = masked_solution(system.hessian, cross, mask, start=start)
    other = other.to(dense.dtype) * system.scale
    if system.error(dense - solution) > system.error(dense - other):
        mask = other != 0
        solution = masked_solution(system.hessian, cross, mask, start=other)
    if swaps:
        solution = swapped_solution(dense, solution, mask, system.hessian, amount, swaps)
    return solution.div_(system.scale)


def _admm(
    dense: Tensor,
    cross: Tensor,
    target: Pattern | int,
    kept: int,
    system: _System,
    dead: Tensor,
    iterations: int,
) -> tuple[Tensor, Tensor]:
    """Return weights (O, I) and the places that ADMM keeps (Algorithm 1), bool (O, I).

    Args:
        dense: W of the dense layer, (O, I).
        cross: W H, (O, I).
        target: number of zeros, or the pattern.
        kept: number of weights that stay.
        system: H.
        dead: True at inputs that are always zero, (I,); their weights go first.
        iterations: at most so many.
    """
    sparse = dense.clone()
    multiplier = torch.zeros_like(dense)
    penalty = _FIRST_PENALTY
    resolvent = system.resolvent(penalty)
    mask = pruned = _smallest(dense, target, dead)
    for iteration in range(1, iterations + 1):
        side = torch.add(cross, sparse, alpha=penalty).sub_(multiplier)
        free = side @ resolvent
        sparse = torch.add(free, multiplier, alpha=1 / penalty)
        mask = _smallest(sparse, target, dead)
        sparse.masked_fill_(mask, 0)
        multiplier.add_(free.sub_(sparse), alpha=penalty)
        if iteration % _EVERY:
            continue
        changed = int((mask != pruned).sum()) / kept
        if not changed:
            break
        pruned = mask
        penalty *= next(factor for share, factor in _FACTORS if changed >= share)
        resolvent = system.resolvent(penalty)
    return sparse, ~mask


def _smallest(weight: Tensor, target: Pattern | int, dead: Tensor) -> Tensor:
    """Return True at the smallest weights (O, I); those of dead inputs come before all others."""
    scores = weight.abs()
    if bool(dead.any()):
        scores[:, dead] = -1 / (1 + scores[:, dead])
    return matrix_mask(scores, target)
