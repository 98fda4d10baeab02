"""Numbers in, numbers out: from scores and a target to a choice of layers, or a share of each.

Shares by OWL (arXiv:2310.05175) or DLP (arXiv:2505.23807) meet the target exactly, weighted by the
number of weights; the released codes average layers of unequal size and do not renormalise what
they clip. Nothing here knows a model. Ties are broken by the lower index, so that a choice is
reproducible.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

MOST = 0.99  # the largest share of zeros that clipping leaves in a layer, for lower targets


def layers_to_remove(ratio: float | None, num_layers: int | None, total: int) -> int:
    """Return how many of `total` decoder layers to remove.

    Args:
        ratio: share of the decoder layers, in [0, 1), rounded to the nearest whole layer.
        num_layers: the number itself. Exactly one of the two must be given.
        total: number of decoder layers of the model.

    Raises:
        ValueError: if both or neither are given, or nothing would be left.
    """
    check_depth_target(ratio, num_layers)
    count = round(ratio * total) if ratio is not None else num_layers
    assert count is not None
    if count >= total:
        given = f"num_layers={num_layers}" if ratio is None else f"ratio={ratio}"
        raise ValueError(
            f"{given} would remove {count} of {total} decoder layers; at least one must stay"
        )
    return count


def check_depth_target(ratio: float | None, num_layers: int | None) -> None:
    """Check a depth target before any model is at hand.

    Raises:
        ValueError: unless exactly one of ratio in [0, 1) and num_layers >= 0 is given.
    """
    if (ratio is None) == (num_layers is None):
        raise ValueError(
            f"ratio={ratio} and num_layers={num_layers}: give exactly one of the two "
            "(ratio is the share of decoder layers, num_layers how many are removed)"
        )
    if ratio is not None and not 0 <= ratio < 1:
        raise ValueError(f"ratio={ratio} must lie in [0, 1); 0.2 removes one layer in five")
    if num_layers is not None and num_layers < 0:
        raise ValueError(f"num_layers={num_layers} must be at least 0")


def lowest(scores: Sequence[float], count: int, protected: Collection[int] = ()) -> list[int]:
    """Return the indices of the `count` lowest scores, in ascending order of index.

    Raises:
        ValueError: if a protected index does not exist or too few unprotected ones are left.
    """
    protected = resolve_indices(protected, len(scores))
    free = [i for i in range(len(scores)) if i not in protected]
    if count > len(free):
        raise ValueError(
            f"{count} layers to remove, but only {len(free)} of {len(scores)} are not protected "
            f"(protected={sorted(protected)}); remove fewer or protect fewer"
        )
    return sorted(sorted(free, key=lambda i: (scores[i], i))[:count])


def lowest_window(scores: Sequence[float], size: int, protected: Collection[int] = ()) -> list[int]:
    """Return the layers of the contiguous window with the lowest score.

    Args:
        scores: score of the window that starts at layer i, for i = 0 .. total - size.
        size: layers in a window.
        protected: layers that no window may contain.

    Raises:
        ValueError: if a protected index does not exist or every window contains a protected layer.
    """
    protected = resolve_indices(protected, len(scores) + size - 1)
    if size == 0:
        return []
    starts = [i for i in range(len(scores)) if not protected & set(range(i, i + size))]
    if not starts:
        raise ValueError(
            f"every window of {size} contiguous layers contains a protected one "
            f"(protected={sorted(protected)}); remove fewer or protect fewer"
        )
    start = min(starts, key=lambda i: (scores[i], i))
    return list(range(start, start + size))


def resolve_indices(indices: Collection[int], total: int) -> set[int]:
    """Return layer indices as a set in [0, total); negative ones count from the end, as in Python.

    Raises:
        ValueError: if an index does not exist.
    """
    outside = [i for i in indices if not -total <= i < total]
    if outside:
        raise ValueError(f"protected={outside} must lie in [{-total}, {total - 1}]")
    return {i % total for i in indices}


def uniform(sizes: Sequence[int], target: float) -> list[float]:
    """Return the target for every layer."""
    return [target] * len(sizes)


def dlp(
    scores: Sequence[float], sizes: Sequence[int], target: float, alpha: float = 0.15
) -> list[float]:
    """Dynamic layerwise pruning: the lower a layer's score, the fewer zeros (arXiv:2505.23807).

    d_l = 2 alpha (S_max - S_l) / (S_max - S_min) and sparsity_l = target + mean(d) - d_l. The
    paper's importance 1 - S_l / sum(S) gives the same d: min and max cancel its scale and offset.

    Args:
        scores: a layer's median (paper) or mean (released code) of |W_ij| * ||X_j||.
        sizes: weights of each layer.
        target: share of zeros over all layers, in [0, 1).
        alpha: half the spread of the shares.

    Returns:
        Shares with the weighted mean `target`, not clipped: see `fit_to_target`.
    """
    return _spread([-score for score in scores], sizes, target, alpha)


def owl(
    outlier_ratios: Sequence[float], sizes: Sequence[int], target: float, alpha: float = 0.08
) -> list[float]:
    """Outlier-weighed sparsity: the more outliers, the fewer zeros (arXiv:2310.05175).

    Args:
        outlier_ratios: share of a layer's |W_ij| * ||X_j|| above M times their mean.
        sizes: weights of each layer.
        target: share of zeros over all layers, in [0, 1).
        alpha: half the spread of the shares, the paper's lambda.

    Returns:
        Shares with the weighted mean `target`, not clipped: see `fit_to_target`.
    """
    return _spread(outlier_ratios, sizes, target, alpha)


def _spread(
    density: Sequence[float], sizes: Sequence[int], target: float, alpha: float
) -> list[float]:
    """Spread shares by 2 alpha, the highest `density` lowest, about the weighted mean `target`."""
    low, high = min(density), max(density)
    if high == low:
        return uniform(sizes, target)
    offsets = [2 * alpha * (value - low) / (high - low) for value in density]
    middle = weighted_mean(offsets, sizes)
    return [target + middle - offset for offset in offsets]


def weighted_mean(values: Sequence[float], sizes: Sequence[int]) -> float:
    """Return the mean of values, weighted by sizes."""
    return math.fsum(v * s for v, s in zip(values, sizes, strict=True)) / sum(sizes)


def fit_to_target(shares: Sequence[float], sizes: Sequence[int], target: float) -> list[float]:
    """Clip shares into [0, 1) and shift those not clipped until the weighted mean is the target.

    Raises:
        ValueError: if the target does not lie in [0, 1).
    """
    if not 0 <= target < 1:
        raise ValueError(f"sparsity={target} must lie in [0, 1)")
    most = max(MOST, (1 + target) / 2)
    fitted = [min(max(share, 0.0), most) for share in shares]
    for _ in range(len(fitted) + 1):  # each round clips one more layer, or is the last
        missing = target - weighted_mean(fitted, sizes)
        # A layer at a bound may leave it again, in the other direction.
        free = [i for i, x in enumerate(fitted) if (x < most if missing > 0 else x > 0)]
        if abs(missing) < 1e-15 or not free:
            break
        shift = missing * sum(sizes) / sum(sizes[i] for i in free)
        for i in free:
            fitted[i] = min(max(fitted[i] + shift, 0.0), most)
    return fitted


def clipped_by(shares: Sequence[float], target: float) -> float:
    """Return by how much the worst share lies outside [0, 1), as `fit_to_target` would clip it."""
    most = max(MOST, (1 + target) / 2)
    return max(0.0, max(shares) - most, -min(shares))


def mixed_kept(
    shares: Sequence[float], sizes: Sequence[int], pattern: tuple[int, int]
) -> list[int]:
    """Round shares to numbers N_l kept of M, so that all layers together keep what N:M would.

    By largest remainder: every layer prunes floor(M * share), then those with the largest
    remainders one more, while the total allows. Exact for layers of equal size; else the total of
    zeros stays below the target by less than one step of the smallest layer left.

    Args:
        shares: shares of zeros, with the weighted mean 1 - N / M.
        sizes: weights of each layer.
        pattern: (N, M).

    Returns:
        N_l for each layer, in [1, M].
    """
    kept, of = pattern
    zeros = [min(math.floor(of * share + 1e-9), of - 1) for share in shares]
    budget = (of - kept) * sum(sizes) - sum(z * s for z, s in zip(zeros, sizes, strict=True))
    order = sorted(range(len(shares)), key=lambda i: (zeros[i] - of * shares[i], i))
    for i in order * of:  # again from the start, where layers at M - 1 leave a remainder
        if zeros[i] < of - 1 and sizes[i] <= budget:
            zeros[i] += 1
            budget -= sizes[i]
    return [of - z for z in zeros]


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
        mean: over all layers, in [0, 1).
        base: that of a layer without redundancy, in [0, mean].

    Returns:
        Shares with this mean; those that leave [0, 1) are clipped, and the others make up for it.
    """
    scale = (mean - base) / (math.fsum(redundancy) / len(redundancy))
    shares = [v * scale + base for v in redundancy]
    return fit_to_target(shares, [1] * len(shares), mean)


def slicing_widths(ratios: Sequence[float], hidden_size: int, round_to: int) -> list[int]:
    """Round (1 - ratio) * hidden_size to multiples of `round_to`, with the sum kept to half of one.

    By largest remainder, so that the mean ratio survives the rounding.

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
        free = [i for i, n in enumerate(units) if 1 <= n + step <= most]
        units[max(free, key=lambda i: (step * (exact[i] - units[i]), -i))] += step
        missing -= step
    return [n * round_to for n in units]


def uniform_width(ratio: float, hidden_size: int, round_to: int) -> int:
    """Return SliceGPT's width: (1 - ratio) * hidden_size, down to a multiple of `round_to`.

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
