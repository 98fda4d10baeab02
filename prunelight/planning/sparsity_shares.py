"""From scores and a target to the share of zeros that each decoder layer gets.

Shares by OWL (arXiv:2310.05175) or DLP (arXiv:2505.23807) meet the target exactly, weighted by the
number of weights. The released codes average layers of unequal size, and do not renormalise what
they clip. Nothing here knows a model. Ties are broken by the lower index.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

MOST = 0.99  # the largest share of zeros that clipping leaves in a layer, for lower targets


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


def clipping_excess(shares: Sequence[float], target: float) -> float:
    """Return by how much the worst share lies outside [0, 1), as `fit_to_target` would clip it."""
    most = max(MOST, (1 + target) / 2)
    return max(0.0, max(shares) - most, -min(shares))


def round_to_patterns(
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
