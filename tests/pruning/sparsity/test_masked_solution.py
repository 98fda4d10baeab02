"""Conjugate gradients under a mask against a dense solve of each row."""

import torch
from small_matrices import hessian, matrix

from prunelight.pruning.sparsity.masked_solution import masked_solution

MASK = matrix(24, 160, seed=7) > 0.3


def system():
    gram = hessian().double()
    gram.diagonal().add_(0.01 * gram.diagonal().mean())
    return gram, matrix().double() @ gram


def error(weight, gram, cross):
    return (((weight @ gram) - 2 * cross) * weight).sum()


def test_each_row_is_the_dense_solve_on_its_places():
    gram, cross = system()
    found = masked_solution(gram, cross, MASK, tolerance=1e-10)
    assert not found[~MASK].any()
    for row, right, places in zip(found, cross, MASK, strict=True):
        expected = torch.linalg.solve(gram[places][:, places], right[places])
        torch.testing.assert_close(row[places], expected)


def test_the_result_is_no_worse_than_the_start():
    gram, cross = system()
    best = masked_solution(gram, cross, MASK, tolerance=1e-12)
    for start in (torch.zeros_like(best), matrix(seed=8).double() * MASK, best):
        given = start.clone()
        found = masked_solution(gram, cross, MASK, start=start)
        assert torch.equal(start, given)
        assert error(found, gram, cross) <= error(start, gram, cross) + 1e-9
