"""Block Influence and relative magnitude of decoder layers (ShortGPT, arXiv:2403.03853).

Either costs one forward without the head. Unlike the released code we take the raw output of the
last layer (the released code takes the final norm's), leave padding out, and compute in float32 for
every dtype of the model.
"""

# B sequences, T tokens, D hidden, L layers

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from prunelight.calibration.layer_readers import LayerReader, read_layers
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
    reader = BlockInfluenceReader(model, windows, ignore_first_tokens=ignore_first_tokens)
    read_layers(model, windows, [reader], label="layer scores")
    return reader.result()


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
    reader = RelativeMagnitudeReader(model, windows, ignore_first_tokens=ignore_first_tokens)
    read_layers(model, windows, [reader], label="layer scores")
    return reader.result()


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
    reader = SublayerInfluenceReader(model, windows, ignore_first_tokens=ignore_first_tokens)
    read_layers(model, windows, [reader], label="layer scores")
    return reader.result()


class _TokenMeans(LayerReader):
    """Means of a measure over tokens, of pairs of hidden states in each decoder layer.

    Attributes:
        names: name of each pair.
        means: name of a pair -> its mean in each layer.

    Args:
        model: whose layers are read.
        windows: all that will be read.
        ignore_first_tokens: tokens at the start of each sequence that do not count.
    """

    names: Sequence[str] = ("layer",)

    def __init__(
        self, model: PreTrainedModel, windows: Windows, *, ignore_first_tokens: int = 0
    ) -> None:
        self._group, self._num_layers = group_of(windows), len(decoder_layers(model))
        self.means = {name: [TokenMean() for _ in range(self._num_layers)] for name in self.names}
        # The largest number after each layer, on the device: NaN or Inf if there is one.
        self._largest: dict[int, Tensor] = {}
        # Of each micro-batch, on the CPU: the tokens that count, and the first of each sequence.
        self._tokens: list[tuple[Tensor | None, Tensor | None]] = []
        for batch in micro_batches(model, windows):
            mask = batch.get("attention_mask")
            mask = None if mask is None else mask.cpu()
            counted = counted_positions(mask, batch["input_ids"].shape, ignore_first_tokens)
            self._tokens.append((counted, first_positions(mask)))

    def pairs(self, inputs: Tensor, outputs: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        """Return the pairs of a layer with this input and output, (B, T, D) each."""
        return [(inputs, outputs)]

    def measure(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the value (B, T) of each token of a pair."""
        return token_cosine(x, y)

    def visit(self, batch: int, index: int, inputs: Tensor, outputs: Tensor) -> None:
        """Add the tokens of a micro-batch."""
        counted, first = self._tokens[batch]
        for layers, (x, y) in zip(self.means.values(), self.pairs(inputs, outputs), strict=True):
            layers[index].add(self.measure(x, y), counted, first)
        size, largest = torch.linalg.vector_norm(outputs, ord=torch.inf), self._largest
        largest[index] = torch.maximum(largest[index], size) if index in largest else size
        if batch == 0 and index == self._num_layers - 1:
            self._check()  # a model of no use is found early, at the cost of one wait

    def leave(self, index: int) -> None:
        """Check a layer as soon as it is read.

        Raises:
            ValueError: if its output holds NaN or Inf.
        """
        self._check(index)

    def finish(self) -> None:
        """Take the means over all tokens of all ranks.

        Raises:
            ValueError: if the output of a layer, which is named, holds NaN or Inf.
        """
        self._check()
        for layers in self.means.values():
            for mean in layers:
                mean.pool(self._group)

    def _check(self, only: int | None = None) -> None:
        for index in sorted(self._largest) if only is None else [only]:
            for layers in self.means.values():
                layers[index].settle()
                statistic = layers[index].total + layers[index].first_total
                check_finite(index, statistic, self._largest[index])


class BlockInfluenceReader(_TokenMeans):
    """Reads what `block_influences` returns."""

    def result(self) -> BlockInfluence:
        """Return the scores."""
        return _influence(self.means["layer"])


class RelativeMagnitudeReader(_TokenMeans):
    """Reads what `relative_magnitudes` returns."""

    def measure(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the relative magnitude (B, T) of each token."""
        return relative_magnitude(x, y)

    def result(self) -> tuple[list[float], list[float]]:
        """Return the scores over all tokens, and over first tokens alone."""
        means = self.means["layer"]
        return [mean.result() for mean in means], [mean.first_result() for mean in means]


class SublayerInfluenceReader(_TokenMeans):
    """Reads what `sublayer_influences` returns.

    Raises:
        TypeError: if attention and MLP of the family are not known.
    """

    names = ("attention", "mlp")

    def __init__(
        self, model: PreTrainedModel, windows: Windows, *, ignore_first_tokens: int = 0
    ) -> None:
        mlp_norm = sublayers_of(model).mlp_norm
        super().__init__(model, windows, ignore_first_tokens=ignore_first_tokens)
        self._norms = [layer.get_submodule(mlp_norm) for layer in decoder_layers(model)]
        self._between: Tensor  # hidden states between attention and MLP of the last layer

    @contextmanager
    def watching(self, mask: Tensor | None, index: int | None) -> Iterator[None]:
        """Note the hidden states that the norm before the MLP gets."""

        def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._between = args[0]

        with ExitStack() as hooks:
            for norm in self._norms if index is None else [self._norms[index]]:
                hooks.enter_context(norm.register_forward_pre_hook(note))
            yield

    def pairs(self, inputs: Tensor, outputs: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        """Return the states around attention, and around the MLP."""
        return [(inputs, self._between), (self._between, outputs)]

    def result(self) -> dict[str, BlockInfluence]:
        """Return the scores of attention and MLP."""
        return {name: _influence(means) for name, means in self.means.items()}


def _influence(cosines: Sequence[TokenMean]) -> BlockInfluence:
    means = [1 - cosine.result() for cosine in cosines]
    return BlockInfluence(means, [1 - cosine.first_result() for cosine in cosines])
