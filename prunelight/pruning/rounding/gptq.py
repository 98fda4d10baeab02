"""GPTQ (arXiv:2210.17323): rounds a weight to a grid, and corrects the columns that come later.

A pure function of a weight (O, I) and the Hessian of its input. It is the loop of SparseGPT without
pruning. Columns with the largest inputs go first, while each keeps the grid of its own group of
inputs ("static groups"): so no program that loads the result needs another order of columns.
Weights that are zero stay zero: without that the corrections fill them.
"""

# O out_features, I in_features, G groups of inputs

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prunelight.calibration.statistics import finite_values
from prunelight.models.packed.grids import PER_ROW, WeightGrid
from prunelight.pruning.sparsity.sparsegpt import inverse_factor
from prunelight.runtime.arguments import above, at_least, check_fields

BITS = (4, 8)


@dataclass(frozen=True)
class GPTQ:
    """Settings of GPTQ.

    Attributes:
        bits: of a weight, 4 or 8.
        group_size: inputs that share a scale; -1 for one scale a row; None for the largest of 128,
            64 and 32 that divides all widths.
        dampening: added to the Hessian's diagonal, as a share of its mean.
        act_order: round the columns with the largest inputs first.
        block_size: columns that are corrected together.

    Raises:
        ValueError: if a value is out of range.
    """

    bits: int = 4
    group_size: int | None = None
    dampening: float = 0.01
    act_order: bool = True
    block_size: int = 128

    def __post_init__(self) -> None:
        """Check the values."""
        check_fields(self, dampening=above(0), block_size=at_least(1))
        if self.bits not in BITS:
            raise ValueError(f"bits={self.bits} must be 4 or 8")
        if self.group_size is not None and self.group_size != PER_ROW and self.group_size < 1:
            raise ValueError(
                f"group_size={self.group_size} must be a number of inputs such as 128, or -1 for "
                "one scale a row"
            )


def grid_scale(weight: Tensor, grid: WeightGrid, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the scales of a grid that holds a weight, (O, G), of a dtype.

    The grid is that of compressed-tensors: it is symmetric, and the largest |W| of a group is
    (2^bits - 1) / 2 steps from zero.

    Args:
        weight: (O, I).
        grid: its groups must divide I.
        dtype: in which the scales are stored.
    """
    size = weight.shape[1] if grid.group_size == PER_ROW else grid.group_size
    largest = weight.float().unflatten(1, (-1, size)).abs().amax(-1)
    scale = (largest / ((2**grid.bits - 1) / 2)).to(dtype)
    return torch.where(scale == 0, torch.finfo(dtype).eps, scale)


def nearest_on_grid(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return the nearest values of a grid.

    Args:
        weight: of any shape.
        scale: of the same shape, the step of each value.
        bits: of a value.
    """
    most = 2 ** (bits - 1)
    return (weight / scale).round_().clamp_(-most, most - 1).mul_(scale)


def each_input(scale: Tensor, in_features: int) -> Tensor:
    """Return the scale of each input, (O, G) -> (O, I), float32."""
    return scale.float().repeat_interleave(in_features // scale.shape[1], dim=1)


@torch.no_grad()
def gptq(
    weight: Tensor, hessian: Tensor, scale: Tensor, settings: GPTQ, *, keep_zeros: bool = True
) -> Tensor:
    """Round a weight to a grid, so that outputs change least.

    Args:
        weight: (O, I); rows of several matrices may be stacked.
        hessian: X^T X summed over tokens, (I, I), in any unit.
        scale: of `grid_scale`, (O, G).
        settings: see `GPTQ`; its bits are those of the scale.
        keep_zeros: weights that are zero stay zero.

    Returns:
        The new weight, (O, I), float32. The arguments are unchanged.

    Raises:
        ValueError: if the weight or the Hessian holds NaN or Inf.
    """
    # Transposed, a column is contiguous and its update is one rank-1 call: (I, O).
    columns = finite_values(weight).float().T.contiguous()
    steps = each_input(scale, len(columns)).T.contiguous()
    hessian = finite_values(hessian, "Hessian").float()
    order = torch.arange(len(columns), device=columns.device)
    if settings.act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    columns, steps, hessian = columns[order], steps[order], hessian[order][:, order]
    zeros = columns == 0 if keep_zeros else torch.zeros_like(columns, dtype=torch.bool)
    inverse = inverse_factor(hessian, settings.dampening)
    for start in range(0, len(columns), settings.block_size):
        block = slice(start, min(start + settings.block_size, len(columns)))
        factor, errors = inverse[block, block], torch.empty_like(columns[block])
        for i, column in enumerate(columns[block]):
            rounded = nearest_on_grid(column, steps[start + i], settings.bits)
            rounded.masked_fill_(zeros[start + i], 0)
            torch.sub(column, rounded, out=errors[i]).div_(factor[i, i])
            column.copy_(rounded)
            columns[start + i + 1 : block.stop].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
        columns[block.stop :].addmm_(inverse[block, block.stop :].T, errors, alpha=-1)
    return torch.empty_like(columns).index_copy_(0, order, columns).T.contiguous()
