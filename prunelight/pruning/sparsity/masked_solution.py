"""Least squares under a mask, by conjugate gradients with the diagonal as preconditioner.

The best weights of a row, given which of them may differ from zero, solve a linear system of their
own. All rows advance together, each with a step length of its own, so that a product with one
shared matrix is all that an iteration costs.
"""

# O out_features, I in_features

from __future__ import annotations

import torch
from torch import Tensor

_MOST_ITERATIONS, _TOLERANCE = 100, 1e-4  # of the right side


def masked_solution(
    gram: Tensor,
    cross: Tensor,
    mask: Tensor,
    *,
    start: Tensor | None = None,
    tolerance: float = _TOLERANCE,
) -> Tensor:
    """Return for each row the solution d of d G = c over the places that the row's mask leaves.

    Each iteration lowers d G d^T - 2 d c^T, the error of the row, so that the result is never worse
    than the start.

    Args:
        gram: G, positive definite, (I, I).
        cross: right sides, (O, I).
        mask: bool (O, I), False where d must be 0.
        start: where to begin, (O, I), zero outside the mask; None begins at zero.
        tolerance: largest residual of all rows together, as a share of the right sides.

    Returns:
        The solutions, (O, I), exactly zero outside the mask.
    """
    inverse_diagonal = gram.diagonal().reciprocal()
    solution = torch.zeros_like(cross) if start is None else start.clone()
    residual = (cross if start is None else cross - start @ gram) * mask
    limit = tolerance * (cross * mask).norm()
    least = torch.finfo(cross.dtype).tiny
    direction = residual * inverse_diagonal
    product = (residual * direction).sum(-1, keepdim=True)
    for _ in range(_MOST_ITERATIONS):
        if residual.norm() <= limit:
            break
        step = (direction @ gram).mul_(mask)
        length = product / (direction * step).sum(-1, keepdim=True).clamp(min=least)
        solution.addcmul_(length, direction)
        residual.addcmul_(length, step, value=-1)
        scaled = residual * inverse_diagonal
        following = (residual * scaled).sum(-1, keepdim=True)
        direction = scaled.addcmul_(following / product.clamp(min=least), direction)
        product = following
    return solution
