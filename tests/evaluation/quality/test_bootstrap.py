import math

import numpy as np
import pytest

from prunelight.evaluation.quality.bootstrap import (
    mean_interval,
    paired_difference,
    perplexity_interval,
)


def test_the_interval_of_equal_windows_is_their_value():
    interval = mean_interval([6.0] * 9, [3] * 9)
    assert (interval.value, interval.low, interval.high) == pytest.approx((2, 2, 2))


def test_a_mean_weighs_each_token_alike():
    assert mean_interval([1.0, 9.0], [1, 3]).value == 10 / 4


def test_the_interval_is_that_of_the_central_limit_theorem_for_many_windows():
    values = np.random.default_rng(1).normal(5, 2, size=400)
    interval = mean_interval(values)
    half = 1.96 * values.std(ddof=1) / math.sqrt(400)
    assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    generator, holds = np.random.default_rng(2), 0
    for _ in range(200):
        interval = mean_interval(generator.normal(1, 1, size=60))
        holds += interval.low <= 1 <= interval.high
    assert 0.88 <= holds / 200 <= 0.99


def test_perplexity_is_the_exponential_of_the_mean():
    interval = perplexity_interval([2.0, 4.0, 3.0], [2, 2, 2])
    assert interval.value == pytest.approx(math.exp(9 / 6))
    assert interval.low <= interval.value <= interval.high
    assert perplexity_interval([1e6], [1]).value == math.inf


def test_one_window_says_nothing_of_the_spread():
    interval = perplexity_interval([2.0], [2])
    assert interval.value == pytest.approx(math.e)
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)


def test_a_model_ties_with_itself_and_pairing_takes_away_what_is_hard_for_both():
    nll = np.random.default_rng(3).normal(50, 20, size=30)
    assert paired_difference(nll, nll, [10] * 30).high == 0
    better = nll - 1  # a tenth of a nat each token, far below the spread of the windows
    paired = paired_difference(better, nll, [10] * 30)
    assert paired.low == pytest.approx(-0.1)
    alone = mean_interval(nll, [10] * 30)
    assert alone.high - alone.low > 1


def test_a_paired_difference_turns_around_with_its_models():
    generator = np.random.default_rng(4)
    a, b = generator.normal(0, 1, size=(2, 50))
    there, back = paired_difference(a, b, [1] * 50), paired_difference(b, a, [1] * 50)
    assert (there.value, there.low) == pytest.approx((-back.value, -back.high))


def test_what_cannot_be_paired_is_refused():
    with pytest.raises(ValueError, match="3 and 2 values cannot be paired; measure both"):
        paired_difference([1, 2, 3], [1, 2], [1, 1, 1])
    with pytest.raises(ValueError, match="3 windows and 2 counts"):
        mean_interval([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="no window counts a token"):
        mean_interval([0.0], [0])
