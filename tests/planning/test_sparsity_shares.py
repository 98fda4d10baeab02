"""How a target sparsity is shared out over layers, by DLP, by OWL and evenly."""

import random

import pytest
import reference_sparsity as reference

from prunelight.planning.sparsity_shares import (
    deal_blocks,
    dlp,
    fit_to_target,
    owl,
    round_to_patterns,
    uniform,
)

SCORES = [0.9, 0.2, 0.5, 0.1, 0.3, 0.8]


TARGETS = [0.0, 0.05, 0.3, 0.7, 0.9, 0.97]
targets = pytest.mark.parametrize("target", TARGETS)
spreads = pytest.mark.parametrize("spread", [dlp, owl])


def tables(num_tables=20):
    """Scores and unequal sizes of 1 to 40 layers."""
    draw = random.Random(0)
    for _ in range(num_tables):
        layers = range(draw.randint(1, 40))
        yield [draw.uniform(0, 5) for _ in layers], [draw.randint(1, 10**7) for _ in layers]


def clipped(spread, scores, sizes, target, **alpha):
    return fit_to_target(spread(scores, sizes, target, **alpha), sizes, target)


@spreads
@targets
def test_the_weighted_mean_is_the_target_before_and_after_clipping(spread, target):
    for scores, sizes in tables():
        found = spread(scores, sizes, target)
        assert reference.weighted_mean(found, sizes) == pytest.approx(target, abs=1e-12)
        fitted = fit_to_target(found, sizes, target)
        assert reference.weighted_mean(fitted, sizes) == pytest.approx(target, abs=1e-12)
        assert all(0 <= share < 1 for share in fitted)


@spreads
@targets
def test_allocations_are_those_of_the_reference(spread, target):
    rule = {dlp: reference.dlp, owl: reference.owl}[spread]
    for scores, sizes in tables():
        found = spread(scores, sizes, target)
        assert found == pytest.approx(rule(scores, sizes, target), abs=1e-12)
        if max(found) < 0.98:  # how close to 1 a layer may come is ours to choose
            fitted = fit_to_target(found, sizes, target)
            assert fitted == pytest.approx(reference.clipped(found, sizes, target), abs=1e-9)


@spreads
def test_no_spread_equal_scores_or_one_layer_are_uniform(spread):
    scores, sizes = SCORES, [1, 2, 3, 4, 5, 6]
    even = uniform(sizes, 0.7)
    assert even == [0.7] * 6
    assert spread(scores, sizes, 0.7, alpha=0) == pytest.approx(even, abs=1e-15)
    for score in (0.0, 0.3, -1e9):
        assert spread([score] * 6, sizes, 0.7) == even
        assert spread([score], [3], 0.7) == [0.7]


def test_a_low_dlp_score_and_many_outliers_make_a_layer_dense():
    for scores, sizes in tables():
        by_score = [share for _, share in sorted(zip(scores, dlp(scores, sizes, 0.5), strict=True))]
        assert by_score == sorted(by_score)
        by_outliers = [s for _, s in sorted(zip(scores, owl(scores, sizes, 0.5), strict=True))]
        assert by_outliers == sorted(by_outliers, reverse=True)


@pytest.mark.parametrize(("spread", "alpha"), [(dlp, 0.15), (owl, 0.08)])
def test_the_spread_is_twice_alpha_and_alpha_the_papers(spread, alpha):
    for changed in ({}, {"alpha": 0.03}):
        found = spread(SCORES, [1, 2, 3, 4, 5, 6], 0.5, **changed)
        assert max(found) - min(found) == pytest.approx(2 * changed.get("alpha", alpha), abs=1e-12)


@spreads
def test_scale_and_offset_of_scores_do_not_matter(spread):
    moved = [7 * score - 3 for score in SCORES]
    assert spread(moved, [1] * 6, 0.5) == pytest.approx(spread(SCORES, [1] * 6, 0.5), abs=1e-12)


@pytest.mark.parametrize("target", [0.05, 0.9, 0.97])
def test_clipping_keeps_the_target_and_the_order(target):
    for scores, sizes in tables():
        shares = dlp(scores, sizes, target, alpha=0.15)
        fitted = fit_to_target(shares, sizes, target)
        assert reference.weighted_mean(fitted, sizes) == pytest.approx(target, abs=1e-12)
        assert all(0 <= share < 1 for share in fitted)
        ordered = [share for _, share in sorted(zip(shares, fitted, strict=True))]
        assert ordered == sorted(ordered)
        assert fit_to_target(fitted, sizes, target) == pytest.approx(fitted, abs=1e-12)


def test_shares_within_the_bounds_are_left_alone():
    shares = dlp(SCORES, [1, 2, 3, 4, 5, 6], 0.5)
    assert fit_to_target(shares, [1, 2, 3, 4, 5, 6], 0.5) == pytest.approx(shares, abs=1e-15)


def test_a_target_of_zero_prunes_nothing():
    for scores, sizes in tables():
        assert clipped(dlp, scores, sizes, 0.0) == pytest.approx([0.0] * len(sizes), abs=1e-12)


def test_any_shares_are_fitted_to_any_target():
    draw = random.Random(1)
    for _, sizes in tables(100):
        shares, target = [draw.uniform(-1, 2) for _ in sizes], draw.choice([0, 1e-3, 0.5, 0.999])
        fitted = fit_to_target(shares, sizes, target)
        assert reference.weighted_mean(fitted, sizes) == pytest.approx(target, abs=1e-12)
        assert all(0 <= share < 1 for share in fitted)


@pytest.mark.parametrize("target", [-0.1, 1.0, 1.5, float("nan")])
def test_a_target_out_of_range_is_refused(target):
    with pytest.raises(ValueError, match=rf"{target} must lie in \[0, 1\)"):
        fit_to_target([0.5, 0.5], [1, 1], target)


PATTERNS = pytest.mark.parametrize(
    "pattern", [(2, 4), (1, 4), (3, 4), (4, 8), (2, 8), (7, 8), (1, 2)]
)


@PATTERNS
@pytest.mark.parametrize("alpha", [0.0, 0.15, 0.4, 3.0])
def test_mixed_patterns_keep_as_much_as_one_pattern(pattern, alpha):
    kept, of = pattern
    for scores, _ in tables():
        sizes = [100] * len(scores)
        shares = clipped(dlp, scores, sizes, 1 - kept / of, alpha=alpha)
        mixed = round_to_patterns(shares, sizes, pattern)
        assert sum(mixed) == kept * len(sizes)
        assert all(1 <= n <= of for n in mixed)
        assert all(isinstance(n, int) for n in mixed)
        denser = [n for _, n in sorted((-s, n) for s, n in zip(shares, mixed, strict=True))]
        assert denser == sorted(denser)
        if max(shares) <= 1 - 1 / of:  # no layer at the bound: rounded up or down
            ideal = [of * (1 - share) for share in shares]
            assert all(abs(n - exact) < 1 + 1e-9 for n, exact in zip(mixed, ideal, strict=True))
            if len({round(share, 9) for share in shares}) == len(shares):  # no ties
                assert mixed == reference.round_to_patterns(shares, *pattern)


@PATTERNS
@pytest.mark.parametrize("sizes", [[5] * 6, [1, 2, 3, 4, 5, 6]])
def test_equal_shares_keep_the_pattern(pattern, sizes):
    kept, of = pattern
    assert round_to_patterns(uniform(sizes, 1 - kept / of), sizes, pattern) == [kept] * 6


@PATTERNS
def test_mixed_patterns_of_unequal_layers_stay_near_the_total(pattern):
    kept, of = pattern
    for scores, sizes in tables():
        mixed = round_to_patterns(clipped(dlp, scores, sizes, 1 - kept / of), sizes, pattern)
        assert all(1 <= n <= of for n in mixed)
        off = abs(sum(n * size for n, size in zip(mixed, sizes, strict=True)) - kept * sum(sizes))
        assert off <= max(sizes)  # one weight in M of one layer


# --- blocks of widths


def test_dealt_blocks_have_the_exact_total_and_lie_next_to_what_was_wanted():
    draw = random.Random(1)
    for _ in range(50):
        wanted = [draw.uniform(1, 20) for _ in range(draw.randint(1, 30))]
        total = round(sum(wanted))
        wanted = [x * total / sum(wanted) for x in wanted]
        counts = deal_blocks(wanted, [40] * len(wanted), total)
        assert sum(counts) == total
        if min(wanted) >= 1:
            assert all(abs(count - x) < 1 for count, x in zip(counts, wanted, strict=True))


def test_dealt_blocks_are_monotonic_and_equal_wants_differ_by_one_at_most():
    counts = deal_blocks([1, 2, 3, 4, 5], [9] * 5, 15)
    assert counts == [1, 2, 3, 4, 5]
    assert deal_blocks([2.5] * 4, [4] * 4, 10) == [3, 3, 2, 2]


def test_dealt_blocks_stay_within_one_and_what_a_layer_has():
    assert deal_blocks([0.0, 9.0, 3.0], [4, 4, 4], 9) == [1, 4, 4]
    assert deal_blocks([-5.0, 2.0], [4, 4], 2) == [1, 1]


@pytest.mark.parametrize("total", [2, 13])
def test_blocks_that_the_layers_cannot_keep_are_refused(total):
    with pytest.raises(ValueError, match=rf"total={total} blocks must lie in \[3, 12\]"):
        deal_blocks([1.0] * 3, [4] * 3, total)
