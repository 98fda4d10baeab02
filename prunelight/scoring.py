"""Pure scores of decoder layers, from what each layer does to the hidden states.

Block Influence (ShortGPT, arXiv:2403.03853) and the angular distance over windows of layers (Gromov
et al., arXiv:2403.17887); for shares of zeros, how the products |W_ij| * ||X_j|| of a layer are
distributed (DLP, OWL). All cost one forward without the head. Unlike the released codes we take
the raw output of the last layer (theirs is after the final norm), leave padding out, and compute in
float32 whatever the model's dtype.
"""

# B sequences, T tokens, D hidden, L layers

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize
from transformers import PreTrainedModel

from prunelight.architecture import Matrix, decoder_layers, layer_matrices, sublayers_of
from prunelight.calibration import (
    Windows,
    counted_positions,
    evaluating,
    first_positions,
    micro_batches,
    run_layers,
    watching_layers,
)
from prunelight.shares import ranks_of
from prunelight.sparsity import wanda_scores
from prunelight.statistics import InputNorm, MeanCosine, exact_median
from prunelight.walk import InputStatistics, LayerWalk

# How the Wanda scores of a layer's weights are summed up: DLP's paper, DLP's released code, OWL.
WeightScore: TypeAlias = Literal["median", "mean", "outlier_ratio"]


@dataclass(frozen=True)
class BlockInfluence:
    """Block Influence of every decoder layer, in [0, 2]; 0 means the layer only rescales."""

    mean: list[float]  # over all counted tokens, length L
    # Of the first token of each sequence alone, length L. Attention sinks live there: a layer can
    # look harmless in the mean and still create the sink.
    first_token: list[float]


def block_influence(inputs: Tensor, outputs: Tensor) -> Tensor:
    """Block Influence of one decoder layer: 1 - mean cosine similarity (arXiv:2403.03853, Eq. 1).

    Args:
        inputs: hidden states entering the layer, (tokens, D).
        outputs: hidden states leaving it, same shape.

    Returns:
        Scalar in [0, 2], dimensionless, float32; 0 means the layer only rescales its input.

    Raises:
        ValueError: if the shapes differ.
    """
    if inputs.shape != outputs.shape:
        raise ValueError(
            f"inputs {tuple(inputs.shape)} and outputs {tuple(outputs.shape)} must have one shape"
        )
    return 1 - cosine_similarity(inputs.float(), outputs.float(), dim=-1).mean()


def block_influences(
    model: PreTrainedModel, windows: Windows, *, ignore_first_tokens: int = 0
) -> BlockInfluence:
    """Score every decoder layer by Block Influence; the model is unchanged afterwards.

    The first `ignore_first_tokens` tokens of each sequence do not count.

    Raises:
        ValueError: if a layer's output holds NaN or Inf (named), or no token counts.
    """
    found = _influences(model, windows, ignore_first_tokens, ["layer"], lambda x, y: [(x, y)])
    return found["layer"]


def sublayer_influences(
    model: PreTrainedModel, windows: Windows, *, ignore_first_tokens: int = 0
) -> dict[str, BlockInfluence]:
    """Score every "attention" and "mlp" by 1 - cosine of the hidden states before and after it.

    A sublayer is f in x + f(norm(x)), the norm included (LLM-Drop, arXiv:2406.15786, Section 3.1).
    As `block_influences`; a TypeError says that the sublayers of the family are not known.
    """
    name = sublayers_of(model).mlp_norm
    between: list[Tensor] = []  # what the attention of the layer at hand left

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        between[:] = args[:1]

    def pairs(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [(x, between[0]), (between[0], y)]

    with ExitStack() as hooks:
        for layer in decoder_layers(model):
            hooks.enter_context(layer.get_submodule(name).register_forward_pre_hook(keep))
        return _influences(model, windows, ignore_first_tokens, ["attention", "mlp"], pairs)


def _influences(
    model: PreTrainedModel,
    windows: Windows,
    ignore_first_tokens: int,
    names: Sequence[str],
    pairs: Callable[[Tensor, Tensor], Sequence[tuple[Tensor, Tensor]]],
) -> dict[str, BlockInfluence]:
    """Compare pairs of hidden states of every decoder layer, one pair a name, in one forward.

    `pairs` is called with a layer's input and output when it has run.
    """
    sums = {name: [MeanCosine() for _ in decoder_layers(model)] for name in names}

    def visit(index: int, inputs: Tensor, outputs: Tensor) -> None:
        for layers, (x, y) in zip(sums.values(), pairs(inputs, outputs), strict=True):
            layers[index].update(x, y, counted, first)
            check_finite(index, layers[index].total + layers[index].first_total, outputs)

    with evaluating(model), watching_layers(model, visit):
        for batch in micro_batches(model, windows, label="block influence"):
            mask = batch.get("attention_mask")
            counted = counted_positions(mask, batch["input_ids"].shape, ignore_first_tokens)
            counted = None if counted is None else counted.to(model.device)
            first = first_positions(mask)
            run_layers(model, batch)
    found, ranks = {}, ranks_of(windows)
    for name, layers in sums.items():
        pooled = [layer.pool(ranks) for layer in layers]
        means = [1 - layer.result() for layer in pooled]
        found[name] = BlockInfluence(means, [1 - layer.first_result() for layer in pooled])
    return found


def angular_distance(x: Tensor, y: Tensor) -> Tensor:
    """Angle between paired vectors (B, D) as a share of pi, in [0, 1] (arXiv:2403.17887)."""
    u, v = normalize(x.float(), dim=-1), normalize(y.float(), dim=-1)
    # Not arccos of the cosine: near 1 it is off by 1e-4 in float32, and NaN beyond.
    return 2 * torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1)) / math.pi


def angular_distances(model: PreTrainedModel, windows: Windows, size: int) -> list[float]:
    """Score every contiguous window of `size` decoder layers by angular distance.

    The distance is taken between the window's input and output at each sequence's last token that
    is not padding, and averaged over sequences (arXiv:2403.17887).

    Returns:
        Score of the window that starts at layer i, for i = 0 .. L - size; the model is unchanged.

    Raises:
        ValueError: if a layer's output holds NaN or Inf (named), or all is padding.
    """
    totals = torch.zeros(len(decoder_layers(model)) - size + 1, dtype=torch.float64)
    num_samples = 0
    states: list[Tensor] = []  # the last token's, before layer 0 and after each layer, (B, D)

    def visit(index: int, inputs: Tensor, outputs: Tensor) -> None:
        states.extend(state[last] for state in (inputs, outputs)[index > 0 :])
        check_finite(index, states[-1].float().norm().item(), outputs)

    with evaluating(model), watching_layers(model, visit):
        for batch in micro_batches(model, windows, label="angular distance"):
            last = last_positions(batch)
            num_samples += len(last[0])
            states.clear()
            run_layers(model, batch)
            starts, ends = torch.stack(states[: len(totals)]), torch.stack(states[size:])
            totals += angular_distance(starts, ends).sum(1).cpu().double()
    ranks = ranks_of(windows)
    (samples,), totals = ranks.totals(num_samples), ranks.sum(totals)
    if samples == 0:
        raise ValueError("0 tokens were counted; mask less")
    return (totals / samples).tolist()


def last_positions(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return (rows, columns) of the last token of each sequence that is not all padding."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids))
    positions = torch.arange(ids.shape[1], device=ids.device)
    rows = mask.any(dim=1).nonzero().squeeze(1)
    return rows, (mask * positions).argmax(dim=1)[rows]


def check_finite(index: int, statistic: float, outputs: Tensor) -> None:
    """Raise ValueError, naming the layer, if a statistic of its outputs is NaN or Inf."""
    if not math.isfinite(statistic):
        what = "NaN" if bool(outputs.isnan().any()) else "Inf"
        raise ValueError(
            f"{what} in the hidden states after decoder layer {index} (dtype {outputs.dtype}); "
            "load the model in bfloat16 or float32, or check its weights"
        )


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
            seen.pool(walk.ranks)
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
