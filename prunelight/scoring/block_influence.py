"""Block Influence and relative magnitude of decoder layers (ShortGPT, arXiv:2403.03853).

Either costs one forward without the head. Unlike the released code we take the raw output of the
last layer (the released code takes the final norm's), leave padding out, and compute in float32 for
every dtype of the model.
"""

# B sequences, T tokens, D hidden, L layers

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from prunelight.calibration.layer_walk import visit_layers
from prunelight.calibration.shared_windows import group_of
from prunelight.calibration.statistics import TokenMean, check_finite, token_cosine
from prunelight.calibration.windows import (
    Windows,
    counted_positions,
    first_positions,
    micro_batches,
)
from prunelight.models.families.architectures import sublayers_of
from prunelight.models.families.layers import decoder_layers
from prunelight.scoring.remembered import remembered


@dataclass(frozen=True)
class BlockInfluence:
    """Block Influence of every decoder layer, in [0, 2]; 0 means the layer only rescales."""

    mean: list[float]  # over all tokens that count, length L
    # Over the first tokens of all sequences alone, length L. Attention sinks live there: a layer
    # that looks harmless in the mean may create the sink.
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


@remembered
def block_influences(
    model: PreTrainedModel, windows: Windows, *, ignore_first_tokens: int = 0
) -> BlockInfluence:
    """Score every decoder layer by Block Influence; the model is unchanged afterwards.

    The first `ignore_first_tokens` tokens of each sequence do not count.

    Raises:
        ValueError: if the output of a layer, which is named, holds NaN or Inf, or no token counts.
    """
    means = _token_means(model, windows, ignore_first_tokens, ["layer"], lambda x, y: [(x, y)])
    return _influence(means["layer"])


def relative_magnitude(inputs: Tensor, outputs: Tensor) -> Tensor:
    """Relative magnitude of each token's change, ||f(x)|| / ||x + f(x)|| (arXiv:2403.03853, 4.3).

    The paper takes the measure from Samragh et al. (arXiv:2312.09299).

    Args:
        inputs: hidden states x entering the layer, (..., D).
        outputs: hidden states x + f(x) leaving it, same shape.

    Returns:
        (...), at least 0, dimensionless, float32; 0 means that the layer changes nothing.
    """
    x, y = inputs.float(), outputs.float()
    tiny = torch.finfo(torch.float32).tiny
    return (y - x).norm(dim=-1) / y.norm(dim=-1).clamp_min(tiny)


@remembered
def relative_magnitudes(
    model: PreTrainedModel, windows: Windows, *, ignore_first_tokens: int = 0
) -> tuple[list[float], list[float]]:
    """Score every decoder layer by relative magnitude; the model is unchanged afterwards.

    The first `ignore_first_tokens` tokens of each sequence do not count.

    Returns:
        The mean over all tokens that count, and over first tokens alone; both of length L.

    Raises:
        ValueError: if the output of a layer, which is named, holds NaN or Inf, or no token counts.
    """
    means = _token_means(
        model,
        windows,
        ignore_first_tokens,
        ["layer"],
        lambda x, y: [(x, y)],
        measure=relative_magnitude,
    )["layer"]
    return [mean.result() for mean in means], [mean.first_result() for mean in means]


@remembered
def sublayer_influences(
    model: PreTrainedModel, windows: Windows, *, ignore_first_tokens: int = 0
) -> dict[str, BlockInfluence]:
    """Score attention and MLP of every decoder layer by Block Influence; the model is unchanged.

    A sublayer is f in x + f(norm(x)), the norm included (LLM-Drop, arXiv:2406.15786, Section 3.1).
    Its score is 1 - mean cosine similarity of the hidden states before and after it. The first
    `ignore_first_tokens` tokens of each sequence do not count.

    Returns:
        "attention" and "mlp" -> scores of every layer.

    Raises:
        ValueError: if the output of a layer, which is named, holds NaN or Inf, or no token counts.
        TypeError: if attention and MLP of the family are not known.
    """
    mlp_norm = sublayers_of(model).mlp_norm
    after_attention: list[Tensor] = []  # hidden states between attention and MLP of one layer

    def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        after_attention[:] = args[:1]

    def pairs(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [(x, after_attention[0]), (after_attention[0], y)]

    with ExitStack() as hooks:
        for layer in decoder_layers(model):
            hooks.enter_context(layer.get_submodule(mlp_norm).register_forward_pre_hook(record))
        means = _token_means(model, windows, ignore_first_tokens, ["attention", "mlp"], pairs)
    return {name: _influence(cosines) for name, cosines in means.items()}


def _influence(cosines: Sequence[TokenMean]) -> BlockInfluence:
    means = [1 - cosine.result() for cosine in cosines]
    return BlockInfluence(means, [1 - cosine.first_result() for cosine in cosines])


def _token_means(
    model: PreTrainedModel,
    windows: Windows,
    ignore_first_tokens: int,
    names: Sequence[str],
    pairs: Callable[[Tensor, Tensor], Sequence[tuple[Tensor, Tensor]]],
    measure: Callable[[Tensor, Tensor], Tensor] = token_cosine,
) -> dict[str, list[TokenMean]]:
    """Return the mean measure of each name's pair of hidden states, by layer, from one forward.

    Args:
        model: unchanged.
        windows: calibration windows.
        ignore_first_tokens: tokens at the start of each sequence that do not count.
        names: name of each pair that `pairs` returns.
        pairs: called after each layer with the layer's input and output, (B, T, D) each; returns
            the pairs of hidden states to compare.
        measure: gives the value (B, T) of each token of a pair.
    """
    means = {name: [TokenMean() for _ in decoder_layers(model)] for name in names}
    num_layers = len(decoder_layers(model))
    # The largest number after each layer, on the device: NaN or Inf if there is one.
    largest: dict[int, Tensor] = {}
    # Of each micro-batch, on the CPU: the tokens that count, and the first of each sequence.
    tokens: list[tuple[Tensor | None, Tensor | None]] = []
    for batch in micro_batches(model, windows):
        mask = batch.get("attention_mask")
        mask = None if mask is None else mask.cpu()
        counted = counted_positions(mask, batch["input_ids"].shape, ignore_first_tokens)
        tokens.append((counted, first_positions(mask)))

    def visit(number: int, index: int, inputs: Tensor, outputs: Tensor) -> None:
        counted, first = tokens[number]
        for layers, (x, y) in zip(means.values(), pairs(inputs, outputs), strict=True):
            layers[index].add(measure(x, y), counted, first)
        size = torch.linalg.vector_norm(outputs, ord=torch.inf)
        largest[index] = torch.maximum(largest[index], size) if index in largest else size
        if number == 0 and index == num_layers - 1:
            check()  # a model of no use is found early, at the cost of one wait

    def check() -> None:
        for index in sorted(largest):
            for layers in means.values():
                layers[index].settle()
                statistic = layers[index].total + layers[index].first_total
                check_finite(index, statistic, largest[index])

    visit_layers(model, windows, visit, label="layer scores")
    check()
    group = group_of(windows)
    return {name: [mean.pool(group) for mean in layers] for name, layers in means.items()}
