"""Bootstrap intervals over windows or questions; paired ones for two models on the same ones.

A draw takes as many windows as there are, with replacement. The interval holds 95 % of the draws.
Paired, one draw serves both models: what is hard for both cancels out of their difference.
"""

# N windows or questions, R draws

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from prunelight.evaluation.quality.results import Interval

DRAWS = 2000
PERCENTILES = (2.5, 97.5)  # of a 95 % interval

Array = NDArray[np.float64]


def mean_interval(
    sums: Sequence[float], counts: Sequence[float] | None = None, *, seed: int = 0
) -> Interval:
    """Return the mean per counted item, sum of `sums` over sum of `counts`, with its interval.

    Args:
        sums: (N,), one of each window.
        counts: (N,), items of each window; None counts one a window.
        seed: of the draws.

    Returns:
        Interval; its ends are NaN for a single window, which says nothing of the spread.

    Raises:
        ValueError: if the lengths differ, or nothing is counted.
    """
    values = np.asarray(sums, dtype=np.float64)
    weights = np.ones_like(values) if counts is None else np.asarray(counts, dtype=np.float64)
    if values.shape != weights.shape:
        raise ValueError(
            f"{len(values)} windows and {len(weights)} counts: there must be as many; measure both "
            "on the same windows"
        )
    if not weights.sum() > 0:
        raise ValueError("no window counts a token; give windows of two tokens or more")
    value = math.fsum(values) / math.fsum(weights)
    if len(values) < 2 or not math.isfinite(value):
        return Interval(value, math.nan, math.nan)
    draws = resamples(len(values), np.random.default_rng(seed))
    with np.errstate(invalid="ignore", divide="ignore"):
        means = (draws @ values) / (draws @ weights)
    low, high = np.nanpercentile(means, PERCENTILES)
    return Interval(value, float(low), float(high))


def perplexity_interval(nll: Sequence[float], tokens: Sequence[int], *, seed: int = 0) -> Interval:
    """Return the token-weighted perplexity of windows, with its interval.

    Args:
        nll: (N,), summed negative log-likelihood of each window, in nats.
        tokens: (N,), predicted tokens of each window.
        seed: of the draws.
    """
    mean = mean_interval(nll, tokens, seed=seed)
    return Interval(*(exp_or_infinity(x) for x in (mean.value, mean.low, mean.high)))


def paired_difference(
    nll: Sequence[float], reference_nll: Sequence[float], tokens: Sequence[int], *, seed: int = 0
) -> Interval:
    """Return ln(perplexity / perplexity of a reference) on the same windows, with its interval.

    Two models tie where the interval holds 0.

    Args:
        nll: (N,), summed negative log-likelihood of each window, in nats.
        reference_nll: (N,), the same of the reference.
        tokens: (N,), predicted tokens of each window.
        seed: of the draws.

    Raises:
        ValueError: if the models were not measured on the same windows.
    """
    if len(nll) != len(reference_nll):
        raise ValueError(
            f"{len(nll)} and {len(reference_nll)} values cannot be paired; measure both models on "
            "the same windows"
        )
    differences = [a - b for a, b in zip(nll, reference_nll, strict=True)]
    return mean_interval(differences, tokens, seed=seed)


def resamples(count: int, generator: np.random.Generator, draws: int = DRAWS) -> Array:
    """Return how often each draw holds each of `count` windows, (R, N).

    Sums over a draw are products with it.
    """
    return generator.multinomial(count, np.full(count, 1 / count), size=draws).astype(np.float64)


def exp_or_infinity(value: float) -> float:
    """Return the exponential of a value; infinity where a float cannot hold it."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
