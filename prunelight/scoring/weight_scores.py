"""Scores of decoder layers, summaries of |W_ij| * ||X_j|| over their weights (DLP, OWL, Wanda)."""

# O out_features, I in_features

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunelight.calibration.layer_inputs.input_statistics import InputStatistics
from prunelight.calibration.layer_readers import LayerReader, read_layers
from prunelight.calibration.shared_windows import group_of
from prunelight.calibration.statistics import InputNorm, exact_median, finite_values
from prunelight.calibration.windows import Windows, counted_tokens
from prunelight.models.families.matrices import Matrix, layer_matrices, naming_matrices
from prunelight.scoring.remembered import remembered

# Summary of the Wanda scores of a layer's weights: those that DLP's paper compares. The paper takes
# the median, its released code the mean.
Statistic: TypeAlias = Literal["median", "mean", "sum", "max", "std", "var"]

# The same, and OWL's.
WeightScore: TypeAlias = Statistic | Literal["outlier_ratio"]


@remembered
@torch.no_grad()
def weight_scores(
    model: PreTrainedModel,
    windows: Windows,
    score: WeightScore,
    *,
    outlier_factor: float = 5.0,
    by_matrix: bool = False,
    device: torch.device | None = None,
    offload: bool = False,
) -> dict[str, float]:
    """Score each decoder layer, or matrix, of the dense model by A_ij = |W_ij| * ||X_j||.

    The norm is the root mean square over tokens, so that a score does not depend on the number of
    tokens. "median" is that of A as in DLP's paper (arXiv:2505.23807), "mean" follows DLP's
    released code, and the other statistics are those of the paper's ablation; "std" and "var"
    divide by the number of weights. "outlier_ratio" is the share of A above `outlier_factor` times
    the mean of A (OWL, arXiv:2310.05175).

    Args:
        model: unchanged.
        windows: calibration windows, which give the norms.
        score: the summary of A: a `Statistic`, or "outlier_ratio".
        outlier_factor: OWL's M.
        by_matrix: return one score for each matrix instead of each layer.
        device: see `LayerWalk`.
        offload: see `LayerWalk`.

    Returns:
        Name of each matrix -> score; without `by_matrix` all matrices of a layer have one score.

    Raises:
        ValueError: if an activation is NaN or Inf; names the matrix.
        TypeError: if the layers cannot be run one by one.
    """
    reader = WeightReader(model, windows, [score], [by_matrix], outlier_factor=outlier_factor)
    read_layers(model, windows, [reader], device=device, offload=offload, label=f"{score} score")
    return reader.scores[by_matrix][score]


class WeightReader(LayerReader):
    """Reads what `weight_scores` returns, of several summaries.

    Attributes:
        scores: whether by matrix -> summary -> scores.

    Args:
        model: whose layers are read.
        windows: all that will be read.
        summaries: which are computed.
        by_matrix: False for scores of layers, True for scores of matrices.
        outlier_factor: OWL's M.
    """

    by_layer = True

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Windows,
        summaries: Collection[WeightScore],
        by_matrix: Collection[bool],
        *,
        outlier_factor: float = 5.0,
    ) -> None:
        self._model, self._group, self._factor = model, group_of(windows), outlier_factor
        self._tokens = counted_tokens(windows)
        self._statistics: InputStatistics[InputNorm] | None = None  # of the layer that is read
        self.scores: dict[bool, dict[WeightScore, dict[str, float]]] = {
            each: {summary: {} for summary in summaries} for each in by_matrix
        }

    def watching(self, mask: Tensor | None, index: int | None) -> AbstractContextManager[None]:
        """Add the inputs of a layer's matrices."""
        assert index is not None  # by_layer
        if self._statistics is None:
            self._statistics = InputStatistics(layer_matrices(self._model, index), InputNorm)
        return self._statistics.watching(mask)

    def leave(self, index: int) -> None:
        """Summarize the weights of a layer.

        Raises:
            ValueError: if an activation is NaN or Inf; names the matrix.
        """
        statistics, self._statistics = self._statistics, None
        assert statistics is not None  # a walk has micro-batches
        statistics.pool(self._group)
        matrices = statistics.matrices
        for by_matrix, of_summary in self.scores.items():
            # A layer whose attention and MLP were both dropped has no matrices.
            for group in [[m] for m in matrices] if by_matrix or not matrices else [matrices]:
                parts = partial(_wanda_parts, group, statistics, self._tokens)
                names = [matrix.name for matrix in group]
                for summary, of_matrix in of_summary.items():
                    of_matrix |= dict.fromkeys(names, _summary(parts, summary, self._factor))


def _wanda_parts(
    group: Sequence[Matrix], statistics: InputStatistics[InputNorm], tokens: int
) -> Iterator[Tensor]:
    """Yield A of each matrix, or expert, of a group; all of them may not fit in memory at once."""
    idle = statistics.idle() if len(group) > 1 else []  # they weigh nothing in their layer
    for matrix in [matrix for matrix in group if matrix not in idle]:
        for view, statistic in zip(matrix.views(), statistics.of(matrix), strict=True):
            with naming_matrices(matrix):
                statistic.norms()  # raises if an input was NaN or Inf
                mean_squares = statistic.squares.to(view.device) / tokens  # 0 without any token
                scores = wanda_scores(view, mean_squares.sqrt())
            yield scores


def _summary(
    parts: Callable[[], Iterable[Tensor]], score: WeightScore, outlier_factor: float
) -> float:
    """Return a statistic, or the outlier ratio, of all numbers in the parts, one part at a time."""
    if score == "median":
        return exact_median(parts)
    if score == "max":
        return max(part.max().item() for part in parts())
    sums = [(part.sum().item(), part.numel()) for part in parts()]
    num_weights = sum(count for _, count in sums)
    mean = math.fsum(part_sum for part_sum, _ in sums) / num_weights
    if score == "mean":
        return mean
    if score == "sum":
        return mean * num_weights
    if score in ("std", "var"):
        deviations = ((part - mean).square_() for part in parts())
        variance = math.fsum(part.sum(dtype=torch.float64).item() for part in deviations)
        variance /= num_weights
        return variance if score == "var" else math.sqrt(variance)
    return sum(int((part > outlier_factor * mean).sum()) for part in parts()) / num_weights


def wanda_scores(weight: Tensor, norms: Tensor) -> Tensor:
    """Return |W_ij| * ||X_j||, float32 (O, I) (arXiv:2306.11695, Eq. 1)."""
    return finite_values(weight).abs() * finite_values(norms, "norms of the inputs")
