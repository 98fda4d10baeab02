"""Block Influence of decoder layers and sublayers (ShortGPT, arXiv:2403.03853).

It costs one forward without the head. Unlike the released code we take the raw output of the last
layer (theirs is after the final norm), leave padding out, and compute in float32 whatever the
model's dtype.
"""

# B sequences, T tokens, D hidden, L layers

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from prunelight.calibration.shared_windows import group_of
from prunelight.calibration.statistics import MeanCosine, check_finite
from prunelight.calibration.windows import (
    Windows,
    counted_positions,
    first_positions,
    micro_batches,
)
from prunelight.models.families.architectures import sublayers_of
from prunelight.models.families.layers import decoder_layers
from prunelight.models.forward import evaluating, forward_without_head, watching_layers


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
            forward_without_head(model, batch)
    found, group = {}, group_of(windows)
    for name, layers in sums.items():
        pooled = [layer.pool(group) for layer in layers]
        means = [1 - layer.result() for layer in pooled]
        found[name] = BlockInfluence(means, [1 - layer.first_result() for layer in pooled])
    return found
