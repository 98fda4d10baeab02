"""Small random weights, and the statistics of inputs that masks are chosen by."""

import torch

ROWS, COLUMNS = 24, 160  # one whole block of SparseGPT and a narrow one
WIDTH = 96  # divided by every M below
PATTERNS = ["1:2", "1:4", "2:4", "3:4", "2:8", "4:8", "1:3", "5:12", "48:96", "1:96", "95:96"]


def matrix(rows=ROWS, columns=COLUMNS, *, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def norms(columns=COLUMNS):
    return matrix(1, columns, seed=2)[0].abs() + 0.1


def hessian(columns=COLUMNS, *, tokens=None):
    """X^T X of correlated inputs, whose columns differ in scale."""
    tokens = tokens or 4 * columns
    common = matrix(tokens, 4, seed=3) @ matrix(4, columns, seed=4)
    x = (matrix(tokens, columns, seed=5) + common) * norms(columns)
    return x.T @ x


def same(first, second):
    """The share of entries on which two masks agree."""
    return (first == second).double().mean().item()
