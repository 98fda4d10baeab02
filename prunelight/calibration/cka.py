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

    The estimate is debiased: HSIC is estimated without bias from kernels with zero diagonals (Song
    et al. 2012, Eq. 5), and summed over chunks of tokens (Nguyen et al., arXiv:2010.15327, Eq. 3).
    The biased estimator, which SLM's released code approximates, gives almost 1 for independent
    features once there are more features than tokens. Kernels are in float32, sums in float64.

    Args:
        count: M.
        kernel: "linear", or "rbf", whose width is the chunk's median distance times `bandwidth`.
        bandwidth: factor of the median distance; without effect for "linear".
        chunk: fewest tokens in a kernel. The kernels of one representation hold `chunk` to twice
            `chunk` numbers a token.
    """

    def __init__(
        self, count: int, kernel: str = "linear", bandwidth: float = 1.0, chunk: int = 256
    ) -> None:
        self.kernel, self.bandwidth, self.chunk = kernel, bandwidth, chunk
        self.sums = torch.zeros(count, count, dtype=torch.float64)

    def kernels(self, states: Tensor) -> Tensor:
        """Return the kernels of one representation (tokens, D): (chunks, n, n), diagonals zero.

        Neighbouring tokens, which depend on each other, go to different chunks.
        """
        chunks = max(1, len(states) // self.chunk)
        size = len(states) // chunks
        if size < 4:  # the unbiased estimate divides by n - 3
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
        """Add one micro-batch, given the kernels of each of its M representations."""
        for chunk in zip(*kernels, strict=True):
            self.sums += _hsic(torch.stack([kernel.cpu().double() for kernel in chunk]))

    def update(self, states: Iterable[Tensor]) -> None:
        """Add one micro-batch, given its M representations, each (tokens, D)."""
        self.add([self.kernels(state) for state in states])

    def pool(self, group: ProcessGroup) -> None:
        """Add up the sums of all ranks, in place."""
        self.sums = group.sum(self.sums)

    def result(self) -> Tensor:
        """Return the CKA of every pair, (M, M) float64, about 0 (independent) to 1 (alike).

        Raises:
            ValueError: if a representation is constant, NaN or Inf, or too few tokens were added.
        """
        norms = self.sums.diagonal()  # HSIC of each representation with itself
        if not bool((norms > 0).all()):  # written so that NaN fails
            raise ValueError(
                "CKA needs states that are finite and differ from token to token, on 4 tokens or "
                "more; use more text, or load the model in bfloat16 or float32"
            )
        sums = (self.sums + self.sums.T) / 2  # rounding makes the sums slightly asymmetric
        return sums / torch.sqrt(norms[:, None] * norms)


def _hsic(kernels: Tensor) -> Tensor:
    """Return the unbiased HSIC of every pair of kernels (M, n, n) with zero diagonals, (M, M)."""
    n = kernels.shape[1]
    flat, rows = kernels.flatten(1), kernels.sum(2)
    totals = rows.sum(1)
    traces = flat @ flat.T
    products = totals[:, None] * totals / ((n - 1) * (n - 2))
    return (traces + products - 2 / (n - 2) * rows @ rows.T) / (n * (n - 3))
