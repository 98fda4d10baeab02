"""Swaps of zeros: the error never rises, counts stay, and no single swap is left that helps."""

from itertools import pairwise, product

import pytest
import reference_sparsity as reference
import torch
from reference_sparsity import objective
from small_matrices import COLUMNS, PATTERNS, WIDTH, hessian, matrix, norms

from prunelight.pruning.sparsity.masks import Pattern, magnitude_mask, wanda_mask
from prunelight.pruning.sparsity.swaps import swapped_mask, swapped_solution

AMOUNTS = [0.1, 0.5, 0.9, Pattern(2, 4), Pattern(5, 20)]
any_amount = pytest.mark.parametrize("amount", AMOUNTS, ids=str)


def wanda(amount, columns=COLUMNS):
    return wanda_mask(matrix(columns=columns), hessian(columns).diagonal().sqrt(), amount)


def solution(amount):
    """The best weights of Wanda's places, with the damped Hessian: (weights, places, Hessian)."""
    h = reference.damped(hessian().double())
    mask = wanda(amount)
    return reference.optimum(matrix(), hessian(), mask), ~mask, h


@any_amount
def test_each_round_lowers_the_error_and_keeps_the_number_of_each_row(amount):
    w, h, mask = matrix(), hessian(), wanda(amount)
    masks = [swapped_mask(w, mask, h, amount, rounds) for rounds in (0, 1, 2, 3)]
    assert torch.equal(masks[0], mask)
    errors = [objective(w, w.masked_fill(m, 0), h) for m in masks]
    assert errors[1] < errors[0]
    assert all(later <= earlier for earlier, later in pairwise(errors))
    assert all(torch.equal(m.sum(1), mask.sum(1)) for m in masks)


@pytest.mark.parametrize("text", PATTERNS)
def test_swaps_stay_within_the_groups_of_a_pattern(text):
    pattern = Pattern.parse(text)
    found = swapped_mask(matrix(columns=WIDTH), wanda(pattern, WIDTH), hessian(WIDTH), pattern, 3)
    assert set((~found).view(-1, pattern.of).sum(-1).tolist()) == {pattern.kept}


@pytest.mark.parametrize("amount", [0.5, Pattern(2, 4)], ids=str)
def test_in_the_end_no_swap_is_left_that_helps(amount):
    w, h = matrix(4, 16).double(), hessian(16).double()
    found = swapped_mask(w, wanda_mask(w, norms(16).double(), amount), h, amount, 100)
    for row, pruned in zip(w, found, strict=True):
        least = objective(row[None], row.masked_fill(pruned, 0)[None], h)
        for p, q in product((~pruned).nonzero()[:, 0].tolist(), pruned.nonzero()[:, 0].tolist()):
            if isinstance(amount, Pattern) and p // 4 != q // 4:
                continue
            other = pruned.clone()
            other[p], other[q] = True, False
            assert objective(row[None], row.masked_fill(other, 0)[None], h) >= least * (1 - 1e-5)


def test_independent_inputs_leave_nothing_to_swap():
    scale = norms()
    h = torch.diag(scale.square())
    mask = wanda_mask(matrix(), scale, 0.5)
    assert torch.equal(swapped_mask(matrix(), mask, h, 0.5, 3), mask)


def test_a_poor_mask_of_independent_inputs_becomes_that_of_magnitude():
    w = matrix()
    first = torch.arange(COLUMNS).expand_as(w) < COLUMNS // 2
    rows = torch.cat([magnitude_mask(row[None], 0.5) for row in w])
    assert torch.equal(swapped_mask(w, first, torch.eye(COLUMNS), 0.5, 100), rows)


def test_the_arguments_stay_as_they_were():
    w, h, mask = matrix(), hessian(), wanda(0.5)
    swapped_mask(w, mask, h, 0.5, 1)
    assert torch.equal(w, matrix())
    assert torch.equal(h, hessian())
    assert torch.equal(mask, wanda(0.5))


@any_amount
def test_with_new_weights_the_error_falls_further_and_the_counts_stay(amount):
    w, (sparse, kept, h) = matrix().double(), solution(amount)
    found = [swapped_solution(w, sparse, kept, h, amount, rounds) for rounds in (0, 1, 3)]
    assert torch.equal(found[0], sparse)
    errors = [objective(w, each, h) for each in found]
    assert errors[1] < errors[0]
    assert errors[2] <= errors[1]
    assert all(torch.equal((each != 0).sum(1), kept.sum(1)) for each in found)
    if isinstance(amount, Pattern):
        assert set((found[2] != 0).view(-1, amount.of).sum(-1).tolist()) == {amount.kept}
