"""Removal that keeps the family's pattern: equal to brute force, and clear where it cannot be."""

import itertools
import random

import pytest

from prunelight.planning.layer_choice import lowest_scores
from prunelight.planning.layer_pattern import (
    counts_that_keep_pattern,
    keeps_pattern,
    pattern_fits,
)


def lowest_keeping_pattern(scores, count, kinds, pattern, protected=()):
    return lowest_scores(scores, count, protected, pattern_fits(kinds, pattern, count))


def every(step):
    """Each step-th layer is full, the others slide: Gemma 3 with 6, SmolLM3's RoPE with 4."""
    return lambda total: ["full" if (i + 1) % step == 0 else "sliding" for i in range(total)]


def last_is_full(total):
    """A rule that depends on the depth: Gemma 4 attends fully in its last layer."""
    return [*every(3)(total)[:-1], "full"]


def leading(total):
    """The first two layers are dense, the others have experts."""
    return ["dense" if i < 2 else "experts" for i in range(total)]


PATTERNS = {"2": every(2), "3": every(3), "4": every(4), "last": last_is_full, "lead": leading}


def brute_force(scores, count, kinds, pattern, protected):
    sets = [
        removed
        for removed in itertools.combinations(range(len(scores)), count)
        if keeps_pattern(kinds, removed, pattern) and not set(removed) & set(protected)
    ]
    return list(min(sets, key=lambda s: (sum(scores[i] for i in s), s))) if sets else None


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("seed", range(6))
def test_the_choice_is_that_of_brute_force(name, seed):
    chance, pattern = random.Random(seed), PATTERNS[name]
    total = chance.randint(4, 10)
    # Few values, so that many sums are equal; half the dense models follow the pattern themselves.
    scores = [chance.randint(0, 3) for _ in range(total)]
    kinds = pattern(total) if seed % 2 else chance.choices([*set(pattern(total))], k=total)
    protected = chance.sample(range(total), seed % 3)
    possible = counts_that_keep_pattern(kinds, pattern, protected)
    for count in range(total):
        expected = brute_force(scores, count, kinds, pattern, protected)
        assert (expected is not None) == (count in possible)
        if expected is not None:
            chosen = lowest_keeping_pattern(scores, count, kinds, pattern, protected)
            assert chosen == expected


@pytest.mark.parametrize("seed", range(4))
def test_equal_kinds_give_the_lowest_scores(seed):
    chance = random.Random(seed)
    scores = [chance.choice([0.1, 0.2, 0.3, 1e-17, 1e9]) for _ in range(12)]
    for count in range(12):
        chosen = lowest_keeping_pattern(
            scores, count, ["same"] * 12, lambda total: ["same"] * total
        )
        assert chosen == lowest_scores(scores, count)


def test_a_whole_period_goes_where_single_layers_are_cheapest():
    scores = [0.0 if i in (0, 4, 8, 12) else 1.0 for i in range(24)]
    kinds = every(6)(24)
    chosen = lowest_keeping_pattern(scores, 6, kinds, every(6))
    assert sum(kinds[i] == "full" for i in chosen) == 1
    assert keeps_pattern(kinds, chosen, every(6))
    assert not keeps_pattern(kinds, lowest_scores(scores, 4), every(6))


def test_a_deep_model_is_no_recursion_too_deep():
    kinds = every(4)(400)
    assert len(lowest_keeping_pattern([1.0] * 400, 4, kinds, every(4))) == 4


def test_counts_that_a_set_of_layers_allows_are_told():
    kinds = [*every(4)(8)[:7], "sliding"]  # one full layer, the fourth
    assert counts_that_keep_pattern(kinds, every(4)) == [1, 2, 3, 4, 5, 6, 7]
    with pytest.raises(ValueError, match="no 0 layers can be chosen such that all others can stay"):
        lowest_keeping_pattern([1.0] * 8, 0, kinds, every(4))


def test_a_score_that_is_not_finite_is_named():
    with pytest.raises(ValueError, match=r"scores\[1\]=nan must be finite .*protect layer 1"):
        lowest_keeping_pattern([0.0, float("nan"), 1.0], 1, "aaa", lambda total: "a" * total)
    chosen = lowest_keeping_pattern(
        [0.0, float("nan"), 1.0], 1, "aaa", lambda total: "a" * total, protected=[1]
    )
    assert chosen == [0]
