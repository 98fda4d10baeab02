"""Principal components of hidden states, and weights that read and write in them.

The linear algebra of SliceGPT (arXiv:2401.15024), all in float64. With eigenvectors in float32
SliceGPT's models lose several tenths of a point of perplexity (Tables 4 and 5 there).
"""

# T tokens, D hidden, d sliced, O out_features, I in_features

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_RANK_TOLERANCE = 1e-13  # of the largest eigenvalue

_ROWS = 4096  # of a weight, that are in float64 at a time


def principal_components(gram: Tensor, width: int) -> tuple[Tensor, float]:
    """Return the first principal components of a Gram matrix (SliceGPT, Section 3.3).

    Args:
        gram: X^T X, (D, D) float64, not centred.
        width: how many to keep, d.

    Returns:
        Orthonormal columns (D, d), the largest first, each with its largest entry positive; and
        their share of the energy, in [0, 1].

    Raises:
        ValueError: if the matrix holds NaN or Inf, or if components are cut and its rank is below
            the width.
    """
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    rank = int((values > _RANK_TOLERANCE * values[0]).sum())
    if rank < width < len(gram):
        raise ValueError(
            f"the calibration states span only {rank} directions of the {width} to keep; give "
            "more, or more varied, text"
        )
    components = vectors[:, :width]
    largest = components.gather(0, components.abs().argmax(0, keepdim=True))
    explained = values[:width].sum() / values.sum().clamp(min=1e-300)
    return components * largest.sign(), explained.item()


def signal_of(states: Tensor, signal: str, *, centered: bool) -> Tensor:
    """Return states (tokens, D) in float64; `centered` subtracts the mean of each token.

    The signal "normalized" gives each token the same norm, as the model's norms do but for epsilon.
    """
    x = states.double()
    if centered:
        x = x - x.mean(-1, keepdim=True)
    if signal == "normalized":
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True).clamp(min=1e-30))
    return x


def random_rotation(width: int, generator: torch.Generator) -> Tensor:
    """Return an orthogonal matrix (width, width) float64, uniformly distributed."""
    q, r = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator))
    return q * r.diagonal().sign()


def read_basis(module: Any, norm: Any, basis: Tensor | None, *, offset: float = 0.0) -> None:
    """Let a linear or an embedding read states in a basis, in place, and absorb the norm before.

    W <- W diag(g) Q and b <- b + W beta. Blocks of rows save memory: in float64 a head is large.

    Args:
        module: has a weight W of shape (O, D).
        norm: the norm before the module, with weight g and perhaps bias beta; None has neither.
        basis: Q, (D, d) float64, on the device that computes; None leaves the dense basis.
        offset: what the norm adds to its weight.
    """
    weight, biased = module.weight.detach(), getattr(norm, "bias", None) is not None
    place = torch.device("cpu") if basis is None else basis.device
    gain = getattr(norm, "weight", None)
    gain = None if gain is None else gain.detach().to(place).double() + offset
    width = weight.shape[1] if basis is None else basis.shape[1]
    new_weight = weight.new_empty(len(weight), width)
    for start in range(0, len(weight), _ROWS):
        block = slice(start, start + _ROWS)
        rows = weight[block].to(place).double()
        if biased:
            shift = rows @ norm.bias.detach().to(rows)
            bias = module.bias.detach()[block]
            bias.copy_(bias.to(shift) + shift)
        rows = rows if gain is None else rows * gain
        new_weight[block] = (rows if basis is None else rows @ basis).to(new_weight)
    set_weight(module, new_weight)


def write_basis(linear: Any, basis: Tensor) -> None:
    """Let a linear write its output in a basis, in place: W <- Q^T W, b <- b Q."""
    if linear.bias is not None:
        bias = (linear.bias.detach().to(basis) @ basis).to(linear.bias)
        linear.bias = nn.Parameter(bias, linear.bias.requires_grad)
    set_weight(linear, basis.T @ linear.weight.detach().to(basis))


def set_weight(module: Any, weight: Tensor) -> None:
    """Give a linear or an embedding another weight, in its dtype and on its device."""
    trained = module.weight.requires_grad
    module.weight = nn.Parameter(weight.to(module.weight).contiguous(), trained)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    else:
        module.embedding_dim = weight.shape[1]
