"""Choose the share of zeros of each decoder layer from scores and a target.

Shares by OWL (arXiv:2310.05175) or DLP (arXiv:2505.23807) meet the target exactly, weighted by the
number of weights. The released codes average layers of unequal size as if they were equal, and do
not renormalise shares that they clip. Of equal scores the lower index comes first. Nothing here
knows a model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

MAX_SHARE = 0.99  # clipping leaves at most this share of zeros in a layer, for lower targets


def uniform(sizes: Sequence[int], target: float) -> list[float]:
    """Return the target for every layer."""
    return [target] * len(sizes)


def dlp(
    scores: Sequence[float], sizes: Sequence[int], target: float, alpha: float = 0.15
) -> list[float]:
    """Dynamic layerwise pruning: the lower a layer's score, the fewer zeros (arXiv:2505.23807).

    d_l = 2 alpha (S_max - S_l) / (S_max - S_min) and sparsity_l = target + mean(d) - d_l. The
    paper's importance 1 - S_l / sum(S) gives the same d: its scale and offset cancel.

    Args:
        scores: median (paper) or mean (released code) of |W_ij| * ||X_j|| of each layer.
        sizes: number of weights of each layer.
        target: share of zeros over all layers, in [0, 1).
        alpha: half the spread of the shares.

    Returns:
        Shares with the weighted mean `target`. They are not clipped; see `fit_to_target`.
    """
    return _spread([-score for score in scores], sizes, target, alpha)


def owl(
    outlier_ratios: Sequence[float], sizes: Sequence[int], target: float, alpha: float = 0.08
) -> list[float]:
    """Outlier-weighed sparsity: the more outliers, the fewer zeros (arXiv:2310.05175).

    Args:
        outlier_ratios: share of |W_ij| * ||X_j|| above M times their mean, of each layer.
        sizes: number of weights of each layer.
        target: share of zeros over all layers, in [0, 1).
        alpha: half the spread of the shares, the paper's lambda.

    Returns:
        Shares with the weighted mean `target`. They are not clipped; see `fit_to_target`.
    """
    return _spread(outlier_ratios, sizes, target, alpha)


def _spread(
    density: Sequence[float], sizes: Sequence[int], target: float, alpha: float
) -> list[float]:
    """Spread shares over 2 alpha about the mean `target`; a high `density` gets few zeros."""
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
    """Clip shares into [0, 1), and shift the others until the weighted mean is the target.

    Raises:
        ValueError: if the target does not lie in [0, 1).
    """
    if not 0 <= target < 1:
        raise ValueError(f"sparsity={target} must lie in [0, 1)")
    most = max(MAX_SHARE, (1 + target) / 2)
    fitted = [min(max(share, 0.0), most) for share in shares]
    for _ in range(len(fitted) + 1):  # each round but the last clips one more layer
        missing = target - weighted_mean(fitted, sizes)
        # A layer at a bound may leave it again, in the other direction.
        movable = [i for i, x in enumerate(fitted) if (x < most if missing > 0 else x > 0)]
        if abs(missing) < 1e-15 or not movable:
            break
        shift = missing * sum(sizes) / sum(sizes[i] for i in movable)
        for i in movable:
            fitted[i] = min(max(fitted[i] + shift, 0.0), most)
    return fitted


def clipping_excess(shares: Sequence[float], target: float) -> float:
    """Return how far the worst share lies outside the range of `fit_to_target`; 0 if none does."""
    most = max(MAX_SHARE, (1 + target) / 2)
    return max(0.0, max(shares) - most, -min(shares))


def round_to_patterns(
    shares: Sequence[float], sizes: Sequence[int], pattern: tuple[int, int]
) -> list[int]:
    """Round shares to a pattern N_l:M for each layer; all layers together keep as much as N:M.

    Rounds by largest remainder: every layer prunes floor(M * share) of M. Then layers with the
    largest remainders prune one more, while the total allows. The total is exact for layers of
    equal size. Otherwise the zeros fall short by less than one step of the smallest layer that can
    prune more.

    Args:
        shares: share of zeros of each layer, with the weighted mean 1 - N / M.
        sizes: number of weights of each layer.
        pattern: (N, M): N of M consecutive weights are kept.

    Returns:
        N_l for each layer, in [1, M].
    """
    kept, of = pattern
    zeros = [min(math.floor(of * share + 1e-9), of - 1) for share in shares]
    budget = (of - kept) * sum(sizes) - sum(z * s for z, s in zip(zeros, sizes, strict=True))
    order = sorted(range(len(shares)), key=lambda i: (zeros[i] - of * shares[i], i))
    for i in order * of:  # several rounds: a layer that keeps 1 of M takes no more
        if zeros[i] < of - 1 and sizes[i] <= budget:
            zeros[i] += 1
            budget -= sizes[i]
    return [of - z for z in zeros]


def deal_blocks(wanted: Sequence[float], most: Sequence[int], total: int) -> list[int]:
    """Round what layers should keep to whole blocks, one or more a layer; the total is exact.

    Blocks are dealt one by one to the layer that lacks most. So a layer gets less than one block
    more or less than it should, if `wanted` adds up to the total and no bound is met.

    Args:
        wanted: number of blocks that each layer should keep.
        most: number of blocks that each layer has.
        total: number of blocks of all layers, in [number of layers, sum(most)].

    Raises:
        ValueError: if the layers cannot keep so many, or so few.
    """
    if not len(most) <= total <= sum(most):
        raise ValueError(f"total={total} blocks must lie in [{len(most)}, {sum(most)}]")
    counts = [1] * len(most)
    for _ in range(total - len(most)):
        open_layers = [i for i, count in enumerate(counts) if count < most[i]]
        counts[max(open_layers, key=lambda i: (wanted[i] - counts[i], -i))] += 1
    return counts


def spend_budget(
    scores: Sequence[Sequence[float]], sizes: Sequence[float], budget: float
) -> list[int]:
    """Return how many blocks each list keeps, of all lists ranked together (FLAP).

    The first block of each list stays. Of the others, from the highest score on, as many stay as
    bring the parameters nearest to the budget (arXiv:2312.11983, adaptive over layers and modules).

    Args:
        scores: of the blocks of each list, in descending order, such as of a layer's neurons.
        sizes: parameters of one block of each list.
        budget: parameters that all lists keep together.

    Raises:
        ValueError: if the first blocks alone have more parameters, by half a block or more.
    """
    kept = math.fsum(sizes)
    if kept - min(sizes) / 2 >= budget:
        raise ValueError(f"budget={budget:.0f} must exceed the {kept:.0f} of one block each")
    ranked = sorted((-score, index) for index, values in enumerate(scores) for score in values[1:])
    counts = [1] * len(scores)
    for _, index in ranked:
        if abs(kept + sizes[index] - budget) > abs(kept - budget):
            break
        counts[index] += 1
        kept += sizes[index]
    return counts
