"""Which layers go: how many, those with the lowest scores, never the protected ones."""

from itertools import pairwise

import pytest

from prunelight.planning.layer_choice import (
    check_depth_target,
    layers_to_remove,
    lowest_scores,
    lowest_window,
    resolve_indices,
    runs_of,
)

SCORES = [0.9, 0.2, 0.5, 0.1, 0.3, 0.8]


def test_a_ratio_of_zero_removes_nothing():
    assert layers_to_remove(0.0, None, 6) == 0


@pytest.mark.parametrize(("ratio", "count"), [(0.1, 1), (0.33, 2), (0.5, 3), (0.8, 5)])
def test_a_ratio_is_rounded_to_the_nearest_layer(ratio, count):
    assert layers_to_remove(ratio, None, 6) == count


def test_num_layers_is_the_number_itself():
    assert [layers_to_remove(None, n, 6) for n in range(6)] == [0, 1, 2, 3, 4, 5]


def test_a_larger_ratio_never_removes_fewer_layers():
    counts = [layers_to_remove(percent / 100, None, 30) for percent in range(98)]
    assert counts == sorted(counts)


@pytest.mark.parametrize(
    ("ratio", "num_layers", "given"),
    [(0.99, None, "ratio=0.99 would remove 6 of 6"), (None, 6, "num_layers=6 would remove 6 of 6")],
)
def test_at_least_one_layer_must_stay(ratio, num_layers, given):
    with pytest.raises(ValueError, match=given):
        layers_to_remove(ratio, num_layers, 6)


@pytest.mark.parametrize("check", [check_depth_target, lambda *a: layers_to_remove(*a, 6)])
@pytest.mark.parametrize(
    ("ratio", "num_layers", "message"),
    [
        (None, None, "give exactly one of the two"),
        (0.2, 2, "ratio=0.2 and num_layers=2: give exactly one of the two"),
        (-0.1, None, r"ratio=-0.1 must lie in \[0, 1\)"),
        (1, None, r"ratio=1 must lie in \[0, 1\)"),
        (float("nan"), None, r"ratio=nan must lie in \[0, 1\)"),
        (None, -1, "num_layers=-1 must be at least 0"),
    ],
)
def test_a_depth_target_out_of_range_is_refused(check, ratio, num_layers, message):
    with pytest.raises(ValueError, match=message):
        check(ratio, num_layers)


def test_the_lowest_scores_are_chosen_in_order_of_index():
    assert lowest_scores(SCORES, 3) == [1, 3, 4]


def test_choosing_more_keeps_what_was_chosen_before():
    choices = [set(lowest_scores(SCORES, count)) for count in range(7)]
    assert all(small < large for small, large in pairwise(choices))


def test_only_the_order_of_scores_matters():
    assert lowest_scores([10 * s - 3 for s in SCORES], 3) == lowest_scores(SCORES, 3)


def test_ties_go_to_the_lower_index():
    assert lowest_scores([0.5] * 6, 2) == [0, 1]
    assert lowest_window([0.5] * 5, 2) == [0, 1]


def test_choosing_none_gives_none():
    assert lowest_scores(SCORES, 0) == []
    assert lowest_window(SCORES, 0) == []


def test_protected_layers_are_never_chosen():
    assert lowest_scores(SCORES, 3, protected=[3, 1]) == [2, 4, 5]
    assert lowest_window([0.3, 0.1, 0.2, 0.4, 0.5], 2, protected=[1]) == [2, 3]


def test_negative_protected_indices_count_from_the_end():
    assert resolve_indices([-1, 0, -6, 2], 6) == {0, 2, 5}
    assert lowest_scores(SCORES, 2, protected=[-3]) == lowest_scores(SCORES, 2, protected=[3])


def test_protecting_too_many_layers_is_refused():
    with pytest.raises(ValueError, match=r"3 layers to remove, but only 2 of 6 .*\[0, 1, 2, 3\]"):
        lowest_scores(SCORES, 3, protected=[0, 1, 2, 3])


def test_the_window_with_the_lowest_score_is_chosen():
    assert lowest_window([0.5, 0.4, 0.1, 0.2], 3) == [2, 3, 4]


def test_windows_of_one_layer_are_the_lowest_layer():
    assert lowest_window(SCORES, 1) == lowest_scores(SCORES, 1)


def test_a_window_never_contains_a_protected_layer():
    # 4 windows of 3 layers over 6; only 3, 4, 5 leaves layer 2 alone.
    assert lowest_window([0.1, 0.1, 0.1, 0.9], 3, protected=[2]) == [3, 4, 5]
    with pytest.raises(ValueError, match=r"every window of 3 contiguous layers .*\[2, 3\]"):
        lowest_window([0.1, 0.1, 0.1, 0.9], 3, protected=[2, -3])


@pytest.mark.parametrize("index", [6, -7])
@pytest.mark.parametrize(
    "choose",
    [
        lambda protected: resolve_indices(protected, 6),
        lambda protected: lowest_scores(SCORES, 1, protected),
        lambda protected: lowest_window(SCORES[:5], 2, protected),
        lambda protected: lowest_window([*SCORES, 0.0], 0, protected),
    ],
)
def test_protecting_a_layer_that_does_not_exist_is_refused(choose, index):
    with pytest.raises(ValueError, match=rf"protected=\[{index}\] must lie in \[-6, 5\]"):
        choose([0, index])


def test_layers_are_split_into_runs_of_neighbours():
    assert runs_of({5, 3, 4, 9}) == [[3, 4, 5], [9]]
    assert runs_of([]) == []
