"""Paired comparisons: laws of ties, of the best, and of fronts."""

from dataclasses import asdict

import numpy as np
import pytest

from prunelight.comparison.statistics import front, paired


def windows(*means, seed=0, number=40):
    """One text: window sums of methods that share how hard each window is."""
    generator = np.random.default_rng(seed)
    shared = generator.normal(0, 50, number)
    return [[(shared + 100 * m + generator.normal(0, 1, number)).tolist()] for m in means]


COUNTS = [[100.0] * 40]


def test_a_method_ties_with_itself_and_differs_by_nothing():
    (sums,) = windows(1.0)
    first, second = paired([sums, sums], COUNTS, lower_is_better=True)
    assert (first.best, second.best) == (True, False)
    assert second.ties
    assert second.difference == second.difference_low == second.difference_high == 0


def test_pairing_finds_a_difference_that_lies_within_both_intervals():
    best, worse = paired(windows(1.0, 1.05), COUNTS, lower_is_better=True)
    assert best.low < worse.value < best.high, "alone, the intervals overlap"
    assert best.best
    assert not worse.ties
    assert worse.difference_low > 0


def test_a_better_method_is_best_whichever_end_is_better():
    low, high = windows(1.0, 3.0)
    assert paired([low, high], COUNTS, lower_is_better=True)[0].best
    assert paired([low, high], COUNTS, lower_is_better=False)[1].best


def test_the_order_of_the_methods_changes_no_figure():
    a, b, c = windows(1.0, 1.1, 1.2)
    forth = paired([a, b, c], COUNTS, lower_is_better=True)
    back = paired([c, b, a], COUNTS, lower_is_better=True)
    for one, other in zip(forth, back[::-1], strict=True):
        assert asdict(one) == pytest.approx(asdict(other))


def test_the_value_is_the_token_weighted_mean_of_each_text_and_texts_weigh_the_same():
    sums = [[[2.0, 6.0], [10.0]]]
    counts = [[1.0, 3.0], [5.0]]
    (one,) = paired(sums, counts, lower_is_better=True)
    assert one.value == pytest.approx((8 / 4 + 10 / 5) / 2)
    assert one.low <= one.value <= one.high


def test_an_interval_narrows_as_windows_are_added():
    def width(number):
        (sums,) = windows(1.0, number=number)
        (one,) = paired([sums], [[100.0] * number], lower_is_better=True)
        return one.high - one.low

    assert width(640) < 0.5 * width(40)


def test_methods_that_saw_other_windows_are_not_compared():
    with pytest.raises(ValueError, match="measured on the same windows"):
        paired([[[1.0, 2.0]], [[1.0]]], [[1.0, 1.0]], lower_is_better=True)


def test_a_front_holds_what_nothing_beats():
    points = [(1.0, 5.0), (2.0, 4.0), (2.0, 6.0), (3.0, 4.5), (4.0, 1.0), (1.0, 5.0)]
    kept = front(points)
    assert kept == [0, 1, 4]
    for index, point in enumerate(points):
        beaten = any(a <= point[0] and b <= point[1] and (a, b) != point for a, b in points)
        assert (index in kept) or beaten or points.index(point) in kept


def test_a_front_of_nothing_is_empty():
    assert front([]) == []
