"""Which widths layers are sliced to: the paper's equation, rounding and clipping."""

import statistics

import pytest

from prunelight.planning.slice_widths import (
    redundancies,
    slicing_ratios,
    slicing_widths,
    uniform_width,
)

INFLUENCES = [0.6, 0.3, 0.1, 0.05, 0.02, 0.07, 0.2, 0.5]


def test_redundancy_is_one_where_a_layer_changes_least_and_zero_where_most():
    found = redundancies(INFLUENCES)
    assert (found[4], found[0]) == (1, 0)
    assert sorted(found, reverse=True) == [
        v for _, v in sorted(zip(INFLUENCES, found, strict=True))
    ]
    assert redundancies([0.1, 0.1]) == [1, 1]


@pytest.mark.parametrize(("mean", "base"), [(0.3, 0.1), (0.25, 0.25), (0.25, 0.0), (0.1, 0.05)])
def test_slicing_ratios_follow_the_papers_equation_and_keep_the_mean(mean, base):
    v = redundancies(INFLUENCES)
    found = slicing_ratios(v, mean, base)
    factor = (mean - base) / statistics.mean(v)
    assert found == pytest.approx([factor * x + base for x in v])
    assert statistics.mean(found) == pytest.approx(mean)


def test_ratios_that_leave_the_width_are_clipped_and_made_up_for():
    found = slicing_ratios([1, 0, 0, 0, 0], 0.4, 0.0)
    assert max(found) < 1
    assert statistics.mean(found) == pytest.approx(0.4)


@pytest.mark.parametrize("round_to", [1, 8, 64])
@pytest.mark.parametrize("base", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("hidden", [576, 2048])
def test_rounded_widths_keep_the_mean_within_half_a_step_of_all_layers(round_to, base, hidden):
    ratios = slicing_ratios(redundancies(INFLUENCES), 0.3, base)
    widths = slicing_widths(ratios, hidden, round_to)
    assert all(w % round_to == 0 and 0 < w <= hidden for w in widths)
    assert abs(sum(widths) - 0.7 * hidden * len(widths)) <= round_to / 2
    exact = [(1 - r) * hidden for r in ratios]
    assert all(abs(w - x) < 2 * round_to for w, x in zip(widths, exact, strict=True))


def test_uniform_widths_are_rounded_down_as_in_slicegpt():
    assert uniform_width(0.2, 768, 8) == 608
    assert uniform_width(0.25, 576, 8) == 432
    assert uniform_width(0.0, 100, 8) == 100
