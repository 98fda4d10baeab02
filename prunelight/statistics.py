"""Streaming accumulators: `update` with the tokens of one micro-batch, `result` at the end.

They hold running sums, never a list of states, so memory does not grow with the calibration set.
Padding is masked by the caller. `pool` replaces the sums by those of all ranks that share the
windows; it comes once, after the last update.
"""

# B sequences, T tokens, D hidden, I in_features, M representations, n tokens of a chunk

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from prunelight.shares import Ranks


@contextmanager
def ties_in_any_order() -> Iterator[None]:
    """Allow kthvalue, median and cumsum, which torch's deterministic mode refuses on CUDA.

    What may differ there is which one of equal elements an index names, and no index is used.
    """
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("default")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)


class MeanCosine:
    """Mean over tokens of the cosine similarity of two streams of hidden states."""

    def __init__(self) -> None:
        self.total = 0.0
        self.first_total = 0.0
        self.count = 0
        self.first_count = 0

    def update(self, x: Tensor, y: Tensor, mask: Tensor | None, first: Tensor | None) -> None:
        """Add the tokens of one micro-batch.

        Args:
            x: hidden states, (B, T, D).
            y: the other hidden states, same shape.
            mask: tokens that count, bool (B, T); None counts all.
            first: the first token of each sequence, bool (B, T), summed apart because
                attention sinks live there; None takes position 0.
        """
        cosine = token_cosine(x, y)  # (B, T)
        heads = cosine[:, 0] if first is None else cosine[first]
        counted = cosine if mask is None else cosine[mask]
        self.total += counted.cpu().double().sum().item()
        self.count += counted.numel()
        self.first_total += heads.cpu().double().sum().item()
        self.first_count += heads.numel()

    def pool(self, ranks: Ranks) -> MeanCosine:
        """Add up the sums of all ranks, in place."""
        mine = (self.total, self.count, self.first_total, self.first_count)
        self.total, count, self.first_total, first_count = ranks.totals(*mine)
        self.count, self.first_count = int(count), int(first_count)
        return self

    def result(self) -> float:
        """Return the mean cosine over all counted tokens, in [-1, 1].

        Raises:
            ValueError: if no token was counted.
        """
        if self.count == 0:
            raise ValueError("0 tokens were counted; ignore fewer tokens or mask less")
        return self.total / self.count

    def first_result(self) -> float:
        """Return the mean cosine of the first tokens alone."""
        return self.first_total / max(1, self.first_count)


def token_cosine(x: Tensor, y: Tensor) -> Tensor:
    """Return the cosine similarity of each token's two states, (B, T, D) x 2 -> (B, T).

    In float32 whatever the input: float16 overflows on massive activations. Not by the (T, T)
    product of which the released ShortGPT code takes the diagonal. One sequence at a time, so
    that the float32 copies stay small.
    """
    rows = [cosine_similarity(a.float(), b.float(), dim=-1) for a, b in zip(x, y, strict=True)]
    return torch.stack(rows)


class InputNorm:
    """Squared norms of the input features of a weight, over tokens; float32 on the inputs' device.

    Attributes:
        tokens: how many were seen.
        squares: sum of x_j^2, (I,); a tensor of zeros on the CPU before the first token.
    """

    def __init__(self, in_features: int) -> None:
        self.tokens = 0
        self.squares = torch.zeros(in_features)

    def update(self, x: Tensor) -> None:
        """Add tokens (T, I)."""
        self.tokens += len(x)
        self.squares = self.squares.to(x.device) + x.float().square().sum(0)

    def pool(self, ranks: Ranks) -> None:
        """Add up the sums of all ranks, in place."""
        self.tokens = int(ranks.totals(self.tokens)[0])
        self.squares = ranks.sum(self.squares)

    def norms(self) -> Tensor:
        """Return ||X_j||_2 over all tokens, (I,); ones if all are zero, which ranks by |W|.

        Raises:
            ValueError: if an input was NaN or Inf.
        """
        if not bool(self.squares.isfinite().all()):
            raise ValueError(
                "inputs are NaN or Inf; load the model in bfloat16 or float32, or check its weights"
            )
        seen = bool(self.squares.any())  # in another process perhaps, so not self.tokens
        return self.squares.sqrt() if seen else torch.ones_like(self.squares)


class InputVariance(InputNorm):
    """Variance of the input features of a weight over tokens, beside their squared norms.

    Chunks are joined by their own means and squared deviations (Chan et al.), which unlike a
    difference of two large sums loses no digits.
    """

    def __init__(self, in_features: int) -> None:
        super().__init__(in_features)
        self.mean = torch.zeros(in_features)
        self.deviations = torch.zeros(in_features)

    def update(self, x: Tensor) -> None:
        """Add tokens (T, I)."""
        if not len(x):
            return
        before = self.tokens
        super().update(x)
        x = x.float()
        mean = x.mean(0)
        shift = mean - self.mean.to(x.device)
        self.mean = self.mean.to(x.device) + shift * (len(x) / self.tokens)
        self.deviations = self.deviations.to(x.device) + (x - mean).square().sum(0)
        self.deviations += shift.square() * (before * len(x) / self.tokens)

    def pool(self, ranks: Ranks) -> None:
        """Join the means and squared deviations of all ranks, in place."""
        own, mean = self.tokens, self.mean
        super().pool(ranks)
        self.mean = ranks.sum(mean * (own / max(1, self.tokens)))
        self.deviations = ranks.sum(self.deviations + own * (mean - self.mean).square())

    def variance(self) -> Tensor:
        """Return the variance of each feature, (I,)."""
        return self.deviations / max(1, self.tokens)


class Hessian(InputNorm):
    """X^T X of the inputs of a weight, beside their squared norms; float32 on the inputs' device.

    Only blocks on and above the diagonal are computed: the product is symmetric.
    """

    _BLOCK = 512
    _DTYPE = torch.float32

    def __init__(self, in_features: int) -> None:
        super().__init__(in_features)
        self.product: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Add tokens (T, I)."""
        x = x.to(self._DTYPE)
        self.tokens += len(x)
        if self.product is None:
            self.product = x.new_zeros(x.shape[1], x.shape[1])
        for start in range(0, x.shape[1], self._BLOCK):
            block = slice(start, start + self._BLOCK)
            self.product[block, start:].addmm_(x[:, block].T, x[:, start:])
        self.squares = self.product.diagonal()

    def pool(self, ranks: Ranks) -> None:
        """Add up the products of all ranks, in place."""
        self.tokens = int(ranks.totals(self.tokens)[0])
        if self.tokens:
            if self.product is None:  # tokens of other ranks alone reached this expert
                self.product = torch.zeros(*self.squares.shape * 2, dtype=self._DTYPE)
            self.product = ranks.sum(self.product)
            self.squares = self.product.diagonal()

    def result(self) -> Tensor:
        """Return X^T X, (I, I); the identity if no token was seen, which ranks by |W|.

        Raises:
            ValueError: if an input was NaN or Inf.
        """
        self.norms()  # checks
        if self.product is None:
            return torch.eye(len(self.squares))
        upper = self.product.triu()
        return upper + upper.triu(1).T


def float64_device(device: torch.device) -> torch.device:
    """Return the device, or the CPU instead of MPS, which has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


class Gram(Hessian):
    """X^T X in float64, whose eigenvectors float32 would not give (SliceGPT, Tables 4 and 5)."""

    _DTYPE = torch.float64


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
            with ties_in_any_order():
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

    def pool(self, ranks: Ranks) -> None:
        """Add up the sums of all ranks, in place."""
        self.sums = ranks.sum(self.sums)

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


def exact_median(parts: Callable[[], Iterable[Tensor]], ranks: Ranks | None = None) -> float:
    """Return the lower median over parts without joining them, as torch.median of all would.

    Two histograms of 16 bits each: non-negative floats are ordered as their bit patterns are.

    Args:
        parts: gives the same non-negative float32 tensors each time it is called.
        ranks: whose parts count; None means that this one has them all.
    """
    ranks = ranks or Ranks()

    def histogram(pick: Callable[[Tensor], Tensor]) -> Tensor:
        counts = (torch.bincount(pick(_bits(part)), minlength=1 << 16) for part in parts())
        return ranks.sum(reduce(torch.add, counts))

    high = histogram(lambda bits: bits >> 16)
    top, rank = _bin_of(high, (int(high.sum()) - 1) // 2)
    bottom, _ = _bin_of(histogram(lambda bits: bits[bits >> 16 == top] & 0xFFFF), rank)
    return torch.tensor(top << 16 | bottom, dtype=torch.int32).view(torch.float32).item()


def _bits(values: Tensor) -> Tensor:
    return values.float().contiguous().view(torch.int32).flatten()


def _bin_of(histogram: Tensor, rank: int) -> tuple[int, int]:
    """Return the bin that holds the element of a rank (from 0), and its rank within that bin."""
    cumulative = histogram.cumsum(0)
    found = int((cumulative <= rank).sum())
    return found, rank - (int(cumulative[found - 1]) if found else 0)
