"""Laws of the sliding loop and of the search for a target, on scores that need no model."""

import math
import random
from itertools import combinations

import pytest

from prunelight.planning.sliding_search import (
    BudgetExceededError,
    SlidingPass,
    max_removable_layers,
    merge_windows,
    refine_by_swaps,
    search_threshold,
    slide,
    swap_layers,
)

L = 12


def additive(costs):
    """A score that loses the cost of each layer that is gone."""
    return lambda groups: 1 - sum(costs[i] for low, high in groups for i in range(low, high))


def random_score(seed):
    """A score without any order: every set of windows has its own number."""
    known = {}

    def score(groups):
        return known.setdefault(groups, random.Random(f"{seed}{groups}").random())

    return score


def test_the_lowest_threshold_merges_all_that_may_be_merged():
    found = slide(random_score(0), L, -math.inf)
    assert found.groups == ((0, L - 1),)
    assert len(found.removed_layers) == L - 1 == max_removable_layers(L, ())


def test_a_threshold_that_nothing_meets_merges_nothing():
    found = slide(random_score(0), L, 1.1)
    assert found == SlidingPass((), 1.0, (), found.refused, found.trace)
    assert len(found.trace) == L - 1  # each pair was tried


def test_a_window_that_still_passes_at_the_bottom_is_kept():
    assert slide(additive([0.01] * L), L, 0.5, protected=[L - 1]).groups == ((0, L - 2),)


def test_windows_end_where_the_next_layer_costs_too_much():
    costs = [0.01] * L
    costs[7] = costs[3] = 1.0
    found = slide(additive(costs), L, 0.85)
    assert found.groups == ((8, 11), (4, 7), (0, 3))  # 7 and 3 stay, as the highest of a window
    assert found.similarity == pytest.approx(1 - 9 * 0.01)


def test_a_threshold_is_met_by_what_equals_it():
    costs = [0.25] * L
    assert len(slide(additive(costs), L, 0.5).removed_layers) == 2
    assert (
        len(slide(additive(costs), L, 0.75, by_merge=True).removed_layers) == 1
    )  # 0.5 / 0.75 is less


def test_no_set_of_windows_is_measured_twice_in_a_pass():
    seen = []

    def score(groups):
        seen.append(groups)
        return additive([0.05] * L)(groups)

    slide(score, L, 0.7)
    assert len(seen) == len(set(seen)) <= L - 1


@pytest.mark.parametrize("protected", [(0,), (11,), (0, 11), (5,), (0, 5, 6, 11), tuple(range(L))])
def test_protected_layers_are_in_no_window(protected):
    found = slide(additive([0.0] * L), L, 0.5, protected=protected)
    touched = {i for low, high in found.groups for i in range(low, high + 1)}
    assert not touched & set(protected)
    assert len(found.removed_layers) == max_removable_layers(L, protected)
    assert not set(found.trace) & set(protected)


def test_the_lowest_threshold_spares_protected_layers_too():
    assert slide(random_score(0), L, -math.inf, protected=[5]).groups == ((6, 11), (0, 4))


def test_what_cannot_be_measured_is_never_merged():
    def score(groups):  # -inf is what VariantReplay gives for NaN
        return -math.inf if any(low <= 6 < high for low, high in groups) else 0.5

    assert slide(score, L, -math.inf).groups == ((7, 11), (0, 6))
    with pytest.raises(ValueError, match="11 layers cannot be merged: .* NaN states"):
        search_threshold(lambda t: slide(score, L, t, target=11), 11)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("by_merge", [False, True])
def test_windows_are_disjoint_and_the_similarity_is_that_of_all_of_them(seed, by_merge):
    score = random_score(seed)
    found = slide(score, L, random.Random(seed).random(), by_merge=by_merge)
    assert all(a[0] > b[1] for a, b in zip(found.groups[:-1], found.groups[1:], strict=True))
    assert found.similarity == (score(found.groups) if found.groups else 1.0)
    assert len(found.margins) == len(found.removed_layers)


def passes(score, target, by_merge, allowed=None):
    """Return what `search` takes as run, and the passes it made."""
    made = []

    def run(threshold):
        if allowed is not None and len(made) >= allowed:
            raise BudgetExceededError
        made.append(slide(score, L, threshold, by_merge=by_merge, target=target))
        return made[-1]

    return run, made


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("target", [1, 4, L - 1])
@pytest.mark.parametrize("by_merge", [False, True])
def test_a_search_always_lands_on_the_target(seed, target, by_merge):
    run, made = passes(random_score(seed), target, by_merge)  # as far from monotone as it can be
    found, threshold = search_threshold(run, target)
    assert len(found.removed_layers) == target
    reached = [one for one in made if len(one.removed_layers) == target]
    assert found.similarity == max(one.similarity for one in reached)
    # The threshold that is told leads to the same windows again.
    assert slide(random_score(seed), L, threshold, by_merge=by_merge, target=target) == found


def test_where_removal_is_monotone_the_search_finds_the_highest_threshold():
    costs = [0.02 * (1 + i % 4) for i in range(L)]
    score, target = additive(costs), 4
    found, threshold = search_threshold(passes(score, target, False)[0], target)
    best = max(
        (t / 1000 for t in range(1001) if len(slide(score, L, t / 1000).removed_layers) >= target),
        default=0,
    )
    assert threshold == pytest.approx(best, abs=2e-3)
    assert found.groups == slide(score, L, threshold, target=target).groups


@pytest.mark.parametrize("allowed", [1, 2, 3])
def test_a_search_that_may_measure_no_more_keeps_what_it_has(allowed):
    run, made = passes(random_score(3), 4, True, allowed)
    found, _ = search_threshold(run, 4)
    assert len(made) == allowed
    assert len(found.removed_layers) == 4


def test_limit_by_merge_prefers_cheap_layers_that_come_late():
    # Layers of a cost that grows upwards: the paper's threshold spends itself on the first ones.
    costs = [0.01 + 0.005 * i for i in range(L)]
    by_model = search_threshold(passes(additive(costs), 3, False)[0], 3)[0]
    by_merge = search_threshold(passes(additive(costs), 3, True)[0], 3)[0]
    best = max(1 - sum(costs[i] for i in chosen) for chosen in combinations(range(L - 1), 3))
    assert by_merge.similarity == pytest.approx(best)
    assert by_model.similarity < by_merge.similarity


@pytest.mark.parametrize("seed", range(10))
def test_windows_and_the_layers_that_are_gone_say_the_same(seed):
    groups = slide(random_score(seed), L, 0.4).groups
    gone = {i for low, high in groups for i in range(low, high)}
    assert merge_windows(gone) == groups
    assert merge_windows(()) == ()


def test_a_pass_that_can_no_longer_reach_its_target_stops():
    seen = []

    def score(groups):
        seen.append(groups)
        return 0.0

    assert not slide(score, L, 0.5, target=4).removed_layers
    assert len(seen) == L - 1 - 3  # with 3 layers left, 4 cannot go


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("target", [1, 4, 8])
def test_an_exchange_keeps_the_number_of_layers_and_never_makes_it_worse(seed, target):
    score = random_score(seed)
    start = slide(score, L, -math.inf, protected=[3], target=target)
    better = swap_layers(score, start, L, protected=[3])
    assert len(better.removed_layers) == target
    assert not {i for low, high in better.groups for i in range(low, high + 1)} & {3}
    assert better.similarity == score(better.groups)
    assert better is start or better.similarity > start.similarity


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("target", [1, 4, 8])
def test_where_layers_do_not_interact_one_exchange_finds_the_best_model(seed, target):
    generator = random.Random(seed)
    shares = [generator.uniform(0.5, 1) for _ in range(L)]

    def score(groups):
        return math.prod(shares[i] for low, high in groups for i in range(low, high))

    start = slide(score, L, -math.inf, target=target)
    best = max(math.prod(chosen) for chosen in combinations(shares[: L - 1], target))
    found = swap_layers(score, start, L)
    assert found.similarity == pytest.approx(best)
    assert swap_layers(score, found, L) is found


def test_an_exchange_never_takes_what_cannot_be_measured():
    def score(groups):
        gone = {i for low, high in groups for i in range(low, high)}
        return -math.inf if 2 in gone else 0.5 + 0.01 * sum(gone)

    start = SlidingPass(merge_windows({0, 1}), score(merge_windows({0, 1})))
    assert swap_layers(score, start, L).groups == merge_windows({9, 10})


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("allowed", [0, 3, 9, 100])
def test_few_swaps_keep_the_number_of_layers_and_get_better_until_the_budget_ends(seed, allowed):
    unlimited, asked = random_score(seed), []

    def score(groups):
        if len(asked) == allowed:
            raise BudgetExceededError
        asked.append(groups)
        return unlimited(groups)

    removed = {1, 4, 5, 9}
    start = SlidingPass(merge_windows(removed), unlimited(merge_windows(removed)))
    better = refine_by_swaps(score, start, [0, 2, 3, 10], [9, 1])
    assert len(asked) <= allowed
    similarities = [start.similarity, *(one.similarity for one in better)]
    assert similarities == sorted(similarities)
    for one in better:
        assert len(one.removed_layers) == 4
        assert one.similarity == unlimited(one.groups)
        assert removed - one.removed_layers <= {9, 1}
        assert one.removed_layers - removed <= {0, 2, 3, 10}


def test_the_few_swaps_that_are_tried_find_the_best_layers_among_them():
    shares = [0.9, 0.99, 0.8, 0.7, 0.95, 0.6, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9]

    def score(groups):
        return math.prod(shares[i] for low, high in groups for i in range(low, high))

    start = SlidingPass(merge_windows({2, 5}), score(merge_windows({2, 5})))
    assert refine_by_swaps(score, start, [1, 4], [2, 5])[-1].removed_layers == {1, 4}
    assert refine_by_swaps(score, start, [3], [5])[-1].removed_layers == {2, 3}
