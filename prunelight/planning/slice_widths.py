"""Choose the width of each decoder layer from layer redundancies (DynamicSlicing, SliceGPT).

The formulas are those of arXiv:2411.03513 and arXiv:2401.15024. Nothing here knows a model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from prunelight.planning.sparsity_shares import fit_to_target


def redundancies(influences: Sequence[float]) -> list[float]:
    """Return DynamicSlicing's layer redundancy in [0, 1]: 1 where a layer changes least.

    1 - (I - min) / (max - min) of the Block Influences I, one a layer; all 1 if they are equal.
    """
    low, high = min(influences), max(influences)
    return [1 - (x - low) / (high - low) if high > low else 1.0 for x in influences]


def slicing_ratios(redundancy: Sequence[float], mean: float, base: float) -> list[float]:
    """Return the share of the width that each layer loses: v (mean - base) / mean(v) + base.

    Args:
        redundancy: v of each layer, in [0, 1].
        mean: mean share over all layers, in [0, 1).
        base: share that a layer without redundancy loses, in [0, mean].

    Returns:
        Shares with this mean. Shares outside [0, 1) are clipped, and the other layers lose more or
        less instead.
    """
    scale = (mean - base) / (math.fsum(redundancy) / len(redundancy))
    shares = [v * scale + base for v in redundancy]
    return fit_to_target(shares, [1] * len(shares), mean)


def slicing_widths(ratios: Sequence[float], hidden_size: int, round_to: int) -> list[int]:
    """Round (1 - ratio) * hidden_size to multiples of `round_to` by largest remainder.

    The sum of the widths changes by at most half of `round_to`, so that the mean ratio survives.

    Raises:
        ValueError: if nothing is left.
    """
    exact = [(1 - ratio) * hidden_size / round_to for ratio in ratios]
    most, total = hidden_size // round_to, round(math.fsum(exact))
    if total < len(exact) or most < 1:
        raise ValueError(
            f"round_to={round_to} leaves nothing of hidden_size={hidden_size} at a mean ratio of "
            f"{math.fsum(ratios) / len(ratios):.3g}; lower one of them"
        )
    units = [min(max(1, math.floor(x + 1e-9)), most) for x in exact]
    missing = min(total, most * len(units)) - sum(units)
    while missing:
        step = 1 if missing > 0 else -1
        adjustable = [i for i, n in enumerate(units) if 1 <= n + step <= most]
        units[max(adjustable, key=lambda i: (step * (exact[i] - units[i]), -i))] += step
        missing -= step
    return [n * round_to for n in units]


def uniform_width(ratio: float, hidden_size: int, round_to: int) -> int:
    """Return SliceGPT's width: (1 - ratio) * hidden_size, rounded down to a multiple of `round_to`.

    Raises:
        ValueError: if nothing is left.
    """
    if ratio == 0:
        return hidden_size
    width = math.floor((1 - ratio) * hidden_size + 1e-9) // round_to * round_to
    if width < 1:
        raise ValueError(
            f"round_to={round_to} leaves nothing of hidden_size={hidden_size} at slice_ratio="
            f"{ratio}; lower one of them"
        )
    return width
