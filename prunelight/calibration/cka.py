"""Centred kernel alignment (CKA) of hidden states, accumulated over micro-batches."""

# T tokens, D hidden, M representations, n tokens of a chunk

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from prunelight.runtime.devices import allowing_nondeterministic_ties
from prunelight.runtime.processes import ProcessGroup


class CKA:
    """Centred kernel alignment of every pair of M representations of the same tokens.

    Debiased: HSIC by its unbiased estimator, whose kernels have zero diagonals (Song et al. 2012,
    Eq. 5), summed over chunks of tokens (Nguyen et al., arXiv:2010.15327, Eq. 3). Rows are tokens.
    The biased estimator, which SLM's released code comes close to, gives almost 1 for independent
    features once there are more features than rows. In float32, sums in float64.

    Args:
        count: M.
        kernel: "linear", or "rbf" with the median distance of the chunk times `bandwidth`.
        bandwidth: factor of the median distance; without effect for "linear".
        chunk: fewest tokens in a kernel; the kernels of a micro-batch, of which there are M, have
            together up to twice as many numbers a token.
    """

    def __init__(
        self, count: int, kernel: str = "linear", bandwidth: float = 1.0, chunk: int = 256
    ) -> None:
        self.kernel, self.bandwidth, self.chunk = kernel, bandwidth, chunk
        self.sums = torch.zeros(count, count, dtype=torch.float64)

    def kernels(self, states: Tensor) -> Tensor:
        """Return the kernels of one representation (tokens, D), (chunks, n, n), diagonals zero.

        Neighbouring tokens, which depend on each other, go to different chunks.
        """
        chunks = max(1, len(states) // self.chunk)
        size = len(states) // chunks
        if size < 4:  # too few for an estimate
            return states.new_zeros(0, 0, 0)
        x = states[: size * chunks].float()
        x = x.view(size, chunks, -1).transpose(0, 1)  # (chunks, n, D)
        if self.kernel == "linear":
            kernels = x @ x.transpose(1, 2)
        else:
            squares = torch.cdist(x, x).square()
            with allowing_nondeterministic_ties():
                medians = squares.flatten(1).median(1).values
            scale = medians[:, None, None] * self.bandwidth**2
            kernels = (-squares / (2 * scale)).exp()
        kernels.diagonal(dim1=1, dim2=2).zero_()
        return kernels

    def add(self, kernels: Sequence[Tensor]) -> None:
        """Add the kernels of all M representations of one micro-batch."""
        for chunk in zip(*kernels, strict=True):
            self.sums += _hsic(torch.stack([kernel.cpu().double() for kernel in chunk]))

    def update(self, states: Iterable[Tensor]) -> None:
        """Add all M representations of one micro-batch, each (tokens, D)."""
        self.add([self.kernels(state) for state in states])

    def pool(self, group: ProcessGroup) -> None:
        """Add up the sums of all ranks, in place."""
        self.sums = group.sum(self.sums)

    def result(self) -> Tensor:
        """Return the CKA of every pair, (M, M) float64, about 0 (independent) to 1 (alike).

        Raises:
            ValueError: if a representation is constant, NaN or Inf, or too few tokens were added.
        """
        own = self.sums.diagonal()
        if not bool((own > 0).all()):  # not if NaN
            raise ValueError(
                "CKA needs states that are finite and differ from token to token, on 4 tokens or "
                "more; use more text, or load the model in bfloat16 or float32"
            )
        sums = (self.sums + self.sums.T) / 2  # products of matrices are symmetric but for rounding
        return sums / torch.sqrt(own[:, None] * own)


def _hsic(kernels: Tensor) -> Tensor:
    """Return the unbiased HSIC of every pair of kernels (M, n, n) with zero diagonals, (M, M)."""
    n = kernels.shape[1]
    flat, rows = kernels.flatten(1), kernels.sum(2)
    totals = rows.sum(1)
    traces = flat @ flat.T
    products = totals[:, None] * totals / ((n - 1) * (n - 2))
    return (traces + products - 2 / (n - 2) * rows @ rows.T) / (n * (n - 3))
