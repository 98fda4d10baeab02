"""How the products |W_ij| * ||X_j|| of a decoder layer are distributed (DLP, OWL, Wanda)."""

# O out_features, I in_features

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunelight.calibration.input_statistics import InputStatistics
from prunelight.calibration.layer_walk import LayerWalk
from prunelight.calibration.statistics import InputNorm, exact_median, finite_values
from prunelight.calibration.windows import Windows
from prunelight.models.families.layers import Matrix, layer_matrices

# How the Wanda scores of a layer's weights are summed up: DLP's paper, DLP's released code, OWL.
WeightScore: TypeAlias = Literal["median", "mean", "outlier_ratio"]


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
    """Sum up A_ij = |W_ij| * ||X_j|| over the matrices of each decoder layer of the dense model.

    The norm is the root mean square over tokens, so that a score does not depend on how many there
    were. "median" is DLP's paper (arXiv:2505.23807), "mean" its released code, "outlier_ratio" the
    share of A above `outlier_factor` times its mean (OWL, arXiv:2310.05175).

    Args:
        model: unchanged.
        windows: for the norms.
        score: how A is summed up.
        outlier_factor: OWL's M.
        by_matrix: one score for each matrix instead of each layer.
        device: of a `LayerWalk`.
        offload: of a `LayerWalk`.

    Returns:
        Name of each matrix -> score; without `by_matrix` those of a layer have one score.

    Raises:
        ValueError: if an activation is NaN or Inf; names the matrix.
        TypeError: if the layers cannot be run one by one.
    """
    scores: dict[str, float] = {}
    with LayerWalk(model, windows, device=device, offload=offload, label=f"{score} score") as walk:
        tokens = walk.counted()
        for index, _ in walk.layers():
            found = layer_matrices(model, index)
            seen = InputStatistics(found, InputNorm)
            for batch, mask in enumerate(walk.masks):
                with seen.watching(mask):
                    walk.states[batch] = walk.forward(batch).to(walk.store)
            seen.pool(walk.group)
            for group in [[matrix] for matrix in found] if by_matrix else [found]:
                parts = partial(_wanda_parts, group, seen, tokens)
                scores |= dict.fromkeys(
                    (matrix.name for matrix in group), _summed_up(parts, score, outlier_factor)
                )
    return scores


def _wanda_parts(
    group: list[Matrix], seen: InputStatistics[InputNorm], tokens: int
) -> Iterator[Tensor]:
    """Yield A of each matrix (or expert), computed anew at each call: all of them may not fit."""
    for matrix in group:
        for view, statistic in zip(matrix.views(), seen.of(matrix), strict=True):
            try:
                statistic.norms()  # checks
                mean_squares = statistic.squares.to(view.device) / tokens  # 0 if none was seen
                yield wanda_scores(view, mean_squares.sqrt())
            except ValueError as error:
                raise ValueError(f"{matrix.name}: {error}") from error


def _summed_up(
    parts: Callable[[], Iterable[Tensor]], score: WeightScore, outlier_factor: float
) -> float:
    if score == "median":
        return exact_median(parts)
    sums = [(part.sum().item(), part.numel()) for part in parts()]
    total = sum(count for _, count in sums)
    mean = math.fsum(value for value, _ in sums) / total
    if score == "mean":
        return mean
    return sum(int((part > outlier_factor * mean).sum()) for part in parts()) / total


def wanda_scores(weight: Tensor, norms: Tensor) -> Tensor:
    """Return |W_ij| * ||X_j||, float32 (O, I) (arXiv:2306.11695, Eq. 1)."""
    return finite_values(weight).abs() * finite_values(norms, "norms of the inputs")
