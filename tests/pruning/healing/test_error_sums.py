"""Laws of the regression: what it minimises, and what a mask leaves."""

import pytest
import torch

from prunelight.pruning.healing.error_sums import ErrorSums
from prunelight.pruning.sparsity.masked_solution import masked_solution


def tokens(seed=0, count=200, inputs=12, outputs=5):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, inputs, generator=generator) * torch.logspace(-1, 1, inputs)
    return (
        x,
        torch.randn(count, outputs, generator=generator),
        torch.rand(count, generator=generator),
    )


def sums_of(*parts):
    sums = ErrorSums.empty(5, (12,), torch.device("cpu"))
    for part in parts:
        sums.update(*part)
    return sums


def plain_error(change, x, missing, weights):
    residual = missing.double() - x.double() @ change.T
    return float((weights.double() * residual.square().sum(-1)).sum())


def test_sums_tell_the_error_of_any_change():
    sums = sums_of(tokens())
    for seed in range(3):
        change = torch.randn(5, 12, generator=torch.Generator().manual_seed(seed)).double()
        assert sums.error(change) == pytest.approx(plain_error(change, *tokens()))


def test_sums_add_up_over_parts_of_the_tokens():
    parts = [tokens(seed) for seed in range(3)]
    whole, halves = sums_of(*parts), sums_of(*parts[:1]) + sums_of(*parts[1:])
    torch.testing.assert_close(whole.gram, halves.gram)
    torch.testing.assert_close(whole.cross, halves.cross)
    assert (whole.tokens, float(whole.energy)) == (halves.tokens, pytest.approx(halves.energy))


@pytest.mark.parametrize("masked", [False, True])
def test_no_change_near_the_fit_has_a_smaller_penalised_error(masked):
    sums = sums_of(tokens())
    mask = torch.rand(5, 12, generator=torch.Generator().manual_seed(1)) > 0.5
    fit = sums.fit(0.1, mask if masked else None)
    strength = 0.1 * sums.gram.diagonal().median()

    def penalised(change):
        return sums.error(change) + float(strength * change.square().sum())

    for seed in range(5):
        nudge = torch.randn(5, 12, generator=torch.Generator().manual_seed(seed)).double()
        nudge = nudge * mask if masked else nudge
        assert penalised(fit) <= penalised(fit + 1e-2 * nudge)


def test_a_mask_is_kept_and_each_row_solved_as_if_alone():
    sums = sums_of(tokens())
    mask = torch.rand(5, 12, generator=torch.Generator().manual_seed(2)) > 0.6
    gram = sums.gram + 0.3 * torch.eye(12, dtype=torch.float64)
    found = masked_solution(gram, sums.cross, mask)
    assert bool((found[~mask] == 0).all())
    for row, places in enumerate(mask):
        expected = torch.linalg.solve(gram[places][:, places], sums.cross[row, places])
        torch.testing.assert_close(found[row, places], expected, rtol=1e-3, atol=1e-3)


def test_a_mask_that_leaves_all_places_changes_nothing():
    sums = sums_of(tokens())
    full = torch.ones(5, 12, dtype=torch.bool)
    torch.testing.assert_close(sums.fit(1.0), sums.fit(1.0, full), rtol=1e-3, atol=1e-4)


def test_a_rising_ridge_pulls_back_to_no_change():
    sums = sums_of(tokens())
    norms = [sums.fit(ridge).norm() for ridge in (0.01, 1.0, 100.0, 1e6)]
    assert norms == sorted(norms, reverse=True)
    assert norms[-1] < 1e-3 * norms[0]


def test_a_singular_gram_matrix_is_no_obstacle():
    few = [part[:3] for part in tokens()]
    assert bool(sums_of(few).fit(0.01).isfinite().all())
    nothing = ErrorSums.empty(5, (12,), torch.device("cpu"))
    assert bool((nothing.fit(1.0) == 0).all())


def test_sums_of_the_inputs_that_stay_are_those_of_the_matrix_without_the_others():
    generator = torch.Generator().manual_seed(0)
    x, target, weight = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((40, 6), (40, 3), (3, 6))
    )
    weights, kept = torch.rand(40, generator=generator).double(), torch.tensor([0, 3, 4])
    whole = ErrorSums.empty(3, (6,), torch.device("cpu"))
    whole.update(x, target - x @ weight.T, weights)
    fewer = ErrorSums.empty(3, (3,), torch.device("cpu"))
    fewer.update(x[:, kept], target - x[:, kept] @ weight[:, kept].T, weights)
    derived = whole.of_inputs(kept, weight)
    for name in ("gram", "cross", "energy"):
        torch.testing.assert_close(getattr(derived, name), getattr(fewer, name))
    assert (derived.kinds, derived.tokens) == (fewer.kinds, fewer.tokens)
