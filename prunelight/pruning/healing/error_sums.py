"""Weighted ridge regression from sums over tokens, streamed.

A matrix W with inputs x adds scale * W x to the states that a layer hands on. With r the state that
is missing, divided by the scale, the best change of W minimises

    sum_t w_t ||r_t - D x_t||^2  +  ridge * ||D||^2,    D = C (G + ridge)^-1,

with G = sum w x x^T and C = sum w r x^T. Inputs of several kinds, one behind the other, each have a
ridge in units of their own median energy. The same sums tell the error of any D, so that windows
that were held out can judge it. Zeros of W that an earlier step put there stay: D is then found
over the other places, see `masked_solution`.
"""

# T tokens, O out_features, I in_features

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prunelight.pruning.sparsity.masked_solution import masked_solution
from prunelight.runtime.processes import ProcessGroup


def token_weights(target: Tensor) -> Tensor:
    """Return the weights (...) of tokens in a fit: one over the norm of their target (..., D)."""
    return target.norm(dim=-1).clamp(min=1e-30).reciprocal()


@dataclass
class ErrorSums:
    """Sums over tokens that tell the error of any change of a matrix; all float64.

    Attributes:
        gram: G, weighted inputs x inputs, (I, I).
        cross: C, weighted missing states x inputs, (O, I).
        energy: sum of w ||r||^2: the error of no change.
        kinds: how many inputs are of each kind; the sum is I.
        tokens: how many tokens were added.
    """

    gram: Tensor
    cross: Tensor
    energy: Tensor
    kinds: tuple[int, ...]
    tokens: int = 0

    @classmethod
    def empty(cls, out_features: int, kinds: tuple[int, ...], device: torch.device) -> ErrorSums:
        """Return the sums of no token."""
        in_features = sum(kinds)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(
            zeros(in_features, in_features), zeros(out_features, in_features), zeros(), kinds
        )

    def update(self, inputs: Tensor, missing: Tensor, weights: Tensor) -> None:
        """Add tokens: inputs (T, I), missing states (T, O), weights (T)."""
        place = self.gram.device
        x, r, w = (value.to(place).double() for value in (inputs, missing, weights))
        weighted = x * w[:, None]
        self.gram += x.T @ weighted
        self.cross += r.T @ weighted
        self.energy += (r.square().sum(-1) * w).sum()
        self.tokens += len(x)

    def pool(self, group: ProcessGroup) -> None:
        """Add up the sums of all ranks, in place."""
        self.gram, self.cross = group.sum(self.gram), group.sum(self.cross)
        self.energy = group.sum(self.energy)
        self.tokens = int(group.totals(self.tokens)[0])

    def __add__(self, other: ErrorSums) -> ErrorSums:
        """Return the sums over the tokens of both."""
        return ErrorSums(
            self.gram + other.gram,
            self.cross + other.cross,
            self.energy + other.energy,
            self.kinds,
            self.tokens + other.tokens,
        )

    def of_kinds(self, first: int, last: int) -> ErrorSums:
        """Return the sums of the inputs of some kinds alone; views of these."""
        begin, end = sum(self.kinds[:first]), sum(self.kinds[: last + 1])
        gram, cross = self.gram[begin:end, begin:end], self.cross[:, begin:end]
        return ErrorSums(gram, cross, self.energy, self.kinds[first : last + 1], self.tokens)

    def of_inputs(self, kept: Tensor, weight: Tensor) -> ErrorSums:
        """Return the sums of inputs of one kind that stay, when the matrix loses the others.

        Args:
            kept: indices of the inputs that stay.
            weight: the matrix W (O, I) before.
        """
        gone = torch.ones(len(self.gram), dtype=torch.bool, device=kept.device)
        gone[kept] = False
        lost, products = weight[:, gone], self.gram[gone]
        energy = self.energy + 2 * (lost * self.cross[:, gone]).sum()
        energy = energy + ((lost @ products[:, gone]) * lost).sum()
        cross = self.cross[:, kept] + lost @ products[:, kept]
        return ErrorSums(self.gram[kept][:, kept], cross, energy, (len(kept),), self.tokens)

    def error(self, change: Tensor) -> float:
        """Return sum_t w_t ||r_t - D x_t||^2 of a change D, (O, I)."""
        explained = 2 * (change * self.cross).sum() - ((change @ self.gram) * change).sum()
        return float(self.energy - explained)

    def fit(self, ridge: float, mask: Tensor | None = None) -> Tensor:
        """Return the change D (O, I) of the smallest error, float64.

        Args:
            ridge: pull towards the old weights, in units of the median energy of each kind.
            mask: bool (O, I), False where D must be 0; None lets all places change.
        """
        gram = self.gram.clone()
        for energies in gram.diagonal().split(self.kinds):
            energies.add_(ridge * energies.median().clamp(min=1e-30))
        if mask is not None:
            return masked_solution(gram, self.cross, mask.to(gram.device))
        factor, failed = torch.linalg.cholesky_ex(gram)
        if failed:  # G has rounded to a matrix that is not positive
            return torch.linalg.lstsq(gram, self.cross.T).solution.T
        return torch.cholesky_solve(self.cross.T, factor).T
