"""LAMP: how many zeros each matrix gets if all weights of a model compete (arXiv:2010.07611).

The score of a weight is its square over the sum of the squares of those weights of its matrix that
are not smaller (Eq. 2). Each matrix loses those of its weights that are among the lowest scores of
all matrices. Scores need no data, and scaling a matrix does not change them. Each expert of a fused
stack is a matrix of its own.
"""

# W weights of a matrix, N matrices

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunelight.calibration.statistics import finite_values
from prunelight.models.families.layers import decoder_layers
from prunelight.models.families.matrices import Matrix, layer_matrices, naming_matrices
from prunelight.pruning.sparsity.masks import count_zeros

_TOP_BINS = (0x3F80_0000 >> 16) + 1  # upper halves of float32 up to 1, the highest score


@torch.no_grad()
def lamp_shares(
    model: PreTrainedModel,
    target: float,
    *,
    by_matrix: bool = False,
    device: torch.device | None = None,
) -> dict[str, float]:
    """Return the share of zeros that LAMP gives each decoder layer, or matrix.

    Args:
        model: unchanged.
        target: share of zeros over all matrices of the decoder layers, in [0, 1).
        by_matrix: return one share for each matrix, as in the paper, instead of each layer.
        device: where scores are computed, one matrix at a time; None takes the model's own.

    Returns:
        Name of each matrix -> share; without `by_matrix` all matrices of a layer have one share.

    Raises:
        ValueError: if a weight is NaN or Inf; names the matrix.
    """
    layers = [layer_matrices(model, index) for index in range(len(decoder_layers(model)))]
    matrices = [matrix for layer in layers for matrix in layer]
    total = sum(matrix.parameter.numel() for matrix in matrices)
    zeros = _zeros(matrices, count_zeros(total, target), device)
    shares: dict[str, float] = {}
    for group in [[m] for m in matrices] if by_matrix else layers:
        size = sum(matrix.parameter.numel() for matrix in group)
        share = sum(zeros[matrix.name] for matrix in group) / size if size else 0.0
        shares |= dict.fromkeys((matrix.name for matrix in group), share)
    return shares


def lamp_scores(weight: Tensor) -> Tensor:
    """Return the LAMP scores of a matrix in descending order, float32 (W,), in [0, 1].

    Raises:
        ValueError: if a weight is NaN or Inf.
    """
    squares = finite_values(weight).abs().flatten().sort(descending=True).values
    squares = squares.double().square_()
    return squares.div_(squares.cumsum(0).clamp_(min=1e-300)).float()


def _zeros(matrices: Sequence[Matrix], count: int, device: torch.device | None) -> dict[str, int]:
    """Return how many of the `count` lowest scores each matrix has; of equal ones the first do.

    Positive floats have the order of their bit patterns. So two histograms of each matrix, of the
    upper and the lower halves of the bits, find the lowest scores. No two matrices' scores are held
    at once.
    """

    def histograms(pick: Callable[[Tensor], Tensor], bins: int) -> Tensor:  # (N, bins)
        rows = []
        for matrix in matrices:
            row = torch.zeros(bins, dtype=torch.int64)
            for view in matrix.views():
                with naming_matrices(matrix):
                    bits = lamp_scores(view.to(device or view.device)).view(torch.int32)
                row += torch.bincount(pick(bits), minlength=bins).cpu()
            rows.append(row)
        return torch.stack(rows)

    high = histograms(lambda bits: bits >> 16, _TOP_BINS)
    top, zeros = _below(high, count)
    low = histograms(lambda bits: bits[bits >> 16 == top] & 0xFFFF, 1 << 16)
    bottom, more = _below(low, count - int(zeros.sum()))
    zeros = zeros + more
    missing = count - int(zeros.sum())
    for row, equal in enumerate(low[:, bottom].tolist()):
        taken = min(missing, equal)
        zeros[row] += taken
        missing -= taken
    return {matrix.name: number for matrix, number in zip(matrices, zeros.tolist(), strict=True)}


def _below(histograms: Tensor, count: int) -> tuple[int, Tensor]:
    """Return the bin that holds the score of a rank (from 0), and what each row has below it."""
    bin_of_rank = int((histograms.sum(0).cumsum(0) <= count).sum())
    return bin_of_rank, histograms[:, :bin_of_rank].sum(1)
