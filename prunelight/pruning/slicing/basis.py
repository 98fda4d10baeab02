"""Principal components of hidden states, and weights that read and write in them.

The linear algebra of SliceGPT (arXiv:2401.15024), all of it in float64: with eigenvectors in
float32 its models lose several tenths of a point of perplexity (Tables 4 and 5 there).
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
        the share of the energy that they have, in [0, 1].

    Raises:
        ValueError: if the matrix holds NaN or Inf, or its rank is below the width and something
            is cut.
    """
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    rank = int((values > _RANK_TOLERANCE * values[0]).sum())
    if rank < width < len(gram):
        raise ValueError(
            f"the calibration states span only {rank} directions of the {width} to keep; give "
            "more, or more varied, text"
        )
    kept = vectors[:, :width]
    largest = kept.gather(0, kept.abs().argmax(0, keepdim=True))
    explained = values[:width].sum() / values.sum().clamp(min=1e-300)
    return kept * largest.sign(), explained.item()


def signal_of(states: Tensor, signal: str, *, centered: bool) -> Tensor:
    """Return states (tokens, D) in float64, less their mean before a LayerNorm.

    "normalized" gives each token the same norm, as the norms of the model do but for epsilon.
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
    """Let a linear or embedding read a basis instead of what a norm gave, in place.

    W <- W diag(g) Q and b <- b + W beta, by blocks of rows: in float64 a head is large.

    Args:
        module: whose weight is (O, D).
        norm: the norm before it, with weight g and perhaps bias beta; None has neither.
        basis: Q, (D, d) float64, on the device to compute on; None leaves the dense one.
        offset: what the norm adds to its weight.
    """
    weight, biased = module.weight.detach(), getattr(norm, "bias", None) is not None
    place = torch.device("cpu") if basis is None else basis.device
    gain = getattr(norm, "weight", None)
    gain = None if gain is None else gain.detach().to(place).double() + offset
    made = weight.new_empty(len(weight), weight.shape[1] if basis is None else basis.shape[1])
    for start in range(0, len(weight), _ROWS):
        block = slice(start, start + _ROWS)
        rows = weight[block].to(place).double()
        if biased:
            shift = rows @ norm.bias.detach().to(rows)
            bias = module.bias.data[block]
            module.bias.data[block] = (bias.to(shift) + shift).to(bias)
        rows = rows if gain is None else rows * gain
        made[block] = (rows if basis is None else rows @ basis).to(made)
    set_weight(module, made)


def write_basis(linear: Any, basis: Tensor) -> None:
    """Let a linear write in a basis: W <- Q^T W, b <- b Q."""
    if linear.bias is not None:
        turned = (linear.bias.detach().to(basis) @ basis).to(linear.bias)
        linear.bias = nn.Parameter(turned, linear.bias.requires_grad)
    set_weight(linear, basis.T @ linear.weight.detach().to(basis))


def set_weight(module: Any, weight: Tensor) -> None:
    """Give a linear or an embedding another weight, in its dtype and on its device."""
    trained = module.weight.requires_grad
    module.weight = nn.Parameter(weight.to(module.weight).contiguous(), trained)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    else:
        module.embedding_dim = weight.shape[1]
