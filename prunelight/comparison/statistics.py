"""Comparing methods fairly: the same windows and questions, drawn anew together for all methods.

A bootstrap draws windows (or questions) with replacement. Paired, the same draw serves all methods:
what is hard for all of them cancels out of their differences. Two methods tie where the interval
of their difference holds 0. A front holds what no other choice beats in size and in quality.
"""

# M methods, N windows or questions, R draws

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prunelight.evaluation.quality.bootstrap import DRAWS, PERCENTILES, Array, resamples


@dataclass(frozen=True)
class Paired:
    """A method beside the best one.

    Attributes:
        value: of the method.
        low: of its own 95 % interval.
        high: of its own 95 % interval.
        difference: of the method from the best, in units of the value.
        difference_low: of the paired 95 % interval of that difference.
        difference_high: of the paired 95 % interval of that difference.
        best: it has the best value.
        ties: it is not the best, and the interval of the difference holds 0.
    """

    value: float
    low: float
    high: float
    difference: float
    difference_low: float
    difference_high: float
    best: bool
    ties: bool


def paired(
    sums: Sequence[Sequence[Sequence[float]]],
    counts: Sequence[Sequence[float]],
    *,
    lower_is_better: bool,
    draws: int = DRAWS,
    seed: int = 0,
) -> list[Paired]:
    """Compare methods on the same windows or questions of one or several texts or tasks.

    The value of a method is the mean over the texts of sum / count: each text weighs the same,
    each token (or question) of a text too.

    Args:
        sums: [method][text][window]: what is summed in a window, such as its negative
            log-likelihood; or 1 for a right answer.
        counts: [text][window]: tokens of a window, or 1 for a question.
        lower_is_better: which end is best.
        draws: of the bootstrap.
        seed: of the draws.

    Raises:
        ValueError: if the methods were not measured on the same windows.
    """
    _check_same_windows(sums, counts)
    values, drawn = _bootstrap(sums, counts, draws, seed)
    best = int(np.argmin(values) if lower_is_better else np.argmax(values))
    results = []
    for method, value in enumerate(values):
        low, high = np.percentile(drawn[method], PERCENTILES)
        differences = drawn[method] - drawn[best]
        less, more = np.percentile(differences, PERCENTILES)
        results.append(
            Paired(
                value=float(value),
                low=float(low),
                high=float(high),
                difference=float(value - values[best]),
                difference_low=float(less),
                difference_high=float(more),
                best=method == best,
                ties=method != best and bool(less <= 0 <= more),
            )
        )
    return results


def combined(
    sums: Sequence[Sequence[Sequence[float]]],
    counts: Sequence[Sequence[float]],
    weights: Sequence[float],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Return a weighted sum of the values of methods, and its paired 95 % interval.

    Args:
        sums: [method][text][window], see `paired`.
        counts: [text][window].
        weights: one a method, such as 1, -1, -1, 1 for an interaction.
        draws: of the bootstrap.
        seed: of the draws.

    Raises:
        ValueError: if the methods were not measured on the same windows.
    """
    _check_same_windows(sums, counts)
    values, drawn = _bootstrap(sums, counts, draws, seed)
    low, high = np.percentile(np.asarray(weights) @ drawn, PERCENTILES)
    return float(np.asarray(weights) @ values), float(low), float(high)


def _check_same_windows(
    sums: Sequence[Sequence[Sequence[float]]], counts: Sequence[Sequence[float]]
) -> None:
    for of_method in sums:
        if [len(text) for text in of_method] != [len(text) for text in counts]:
            raise ValueError("paired methods must be measured on the same windows; run them again")


def _bootstrap(
    sums: Sequence[Sequence[Sequence[float]]],
    counts: Sequence[Sequence[float]],
    draws: int,
    seed: int,
) -> tuple[Array, Array]:
    """Return the values (M,), and those of each draw (M, R); all methods share a draw."""
    generator = np.random.default_rng(seed)
    values, drawn = np.zeros(len(sums)), np.zeros((len(sums), draws))
    for text, count in enumerate(counts):
        weights = np.asarray(count, dtype=np.float64)  # (N,)
        of_text = np.array([method[text] for method in sums], dtype=np.float64)  # (M, N)
        times = resamples(len(weights), generator, draws)  # (R, N)
        tokens = times @ weights  # (R,)
        values += of_text.sum(1) / weights.sum() / len(counts)
        drawn += (of_text @ times.T) / np.maximum(tokens, 1e-30) / len(counts)
    return values, drawn


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return which points no other one beats, in the order of their first value.

    Args:
        points: (cost, loss) of each choice; lower is better in both.

    Returns:
        Indices of points such that no other is at least as good in both and better in one.
    """
    order = sorted(range(len(points)), key=lambda i: (points[i], i))
    kept: list[int] = []
    for index in order:
        if not kept or points[index][1] < points[kept[-1]][1]:
            kept.append(index)
    return kept
