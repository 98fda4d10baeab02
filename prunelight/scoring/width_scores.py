"""Scores of attention heads (whole key-value groups) and MLP neurons.

Three scores of a group or neuron are possible:
    taylor       sum of |W * dL/dW| over all its weights (LLM-Pruner, arXiv:2305.11627, Eq. 4)
    wanda        sum of |W| ||X|| over its columns of the output projection (Wanda,
                 arXiv:2306.11695, as a structured sum)
    fluctuation  sum over its columns of the output projection of ||W||^2 times the variance of the
                 input (FLAP, arXiv:2312.11983, Eq. 5)

`standardised_scores` are fluctuations that compare across layers, and across heads and neurons.
"""

# I in_features, O out_features, G key-value groups, F neurons

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunelight.calibration.layer_inputs.input_statistics import InputStatistics
from prunelight.calibration.layer_readers import LayerReader, read_layers
from prunelight.calibration.shared_windows import group_of
from prunelight.calibration.statistics import InputVariance
from prunelight.calibration.windows import Windows
from prunelight.models.families.architectures import sublayers_of
from prunelight.models.families.config_fields import config_accepts, head_dim
from prunelight.models.families.matrices import Matrix, layer_matrices
from prunelight.models.families.own_classes.dropped_sublayers import dropped, gap_layers
from prunelight.scoring.importance import saliencies
from prunelight.scoring.remembered import remembered
from prunelight.scoring.weight_scores import wanda_scores

KINDS = ("heads", "neurons")

SCORES = ("taylor", "wanda", "fluctuation")


@dataclass(frozen=True)
class Widths:
    """Widths of a decoder layer."""

    groups: int  # key-value groups
    heads: int  # query heads in each group
    head_dim: int  # width of a head
    neurons: int  # of the MLP

    @property
    def fields(self) -> dict[str, int]:
        """Return the config fields of these widths; modules may keep copies of the fields."""
        return {
            "num_key_value_heads": self.groups,
            "num_attention_heads": self.groups * self.heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.neurons,
        }


@dataclass(frozen=True)
class ProjectionPart:
    """The rows or columns of one projection that belong to each group or neuron."""

    matrix: Matrix
    dim: int  # 0 if rows of the weight (O, I) belong to a group or neuron, 1 if columns do
    indices: Tensor  # indices of the rows or columns of each group or neuron, (G or F, ...)

    def sums(self, weights: Tensor) -> Tensor:
        """Sum the scores of weights for each group or neuron.

        Args:
            weights: score of each weight (O, I), or of each row (O,) or column (I,).

        Returns:
            Sums, (G,) or (F,), on the CPU.
        """
        line_scores = weights if weights.ndim == 1 else weights.sum(1 - self.dim)
        return line_scores.cpu()[self.indices].sum(1)


def unit_size(parts: Sequence[ProjectionPart]) -> float:
    """Return how many parameters one group or neuron has: weights, and biases of its rows.

    Args:
        parts: of all projections of one layer's attention or MLP.
    """
    size = 0
    for part in parts:
        weight, bias = part.matrix.parameter, getattr(part.matrix.owner, "bias", None)
        size += weight.numel() if part.dim or bias is None else weight.numel() + bias.numel()
    return size / len(parts[0].indices)


def widths_of(model: PreTrainedModel) -> list[Widths]:
    """Return the widths of each decoder layer.

    Raises:
        TypeError: if attention and MLP of the family are not known, sublayers were dropped, or
            matrices stand at gaps.
    """
    sublayers_of(model)  # raises for a family without known sublayers
    if dropped(model, "attention") | dropped(model, "mlp"):
        raise TypeError("sublayers of this model were dropped; prune its width first, then drop")
    if gap_layers(model.config):
        raise TypeError(
            "matrices stand at gaps of this model; prune its width first, then remove layers with "
            "heal='operator'"
        )
    layers = []
    for config in model.config.per_layer_config:
        heads = config.num_attention_heads
        groups = config.num_key_value_heads or heads
        width = Widths(groups, heads // groups, head_dim(model.config), config.intermediate_size)
        layers.append(width)
    return layers


def allowed_groups(model: PreTrainedModel) -> list[int]:
    """Return the numbers of key-value groups that all layers of a stock model can have.

    Llama's config class demands that `hidden_size` is a multiple of the number of query heads.
    """
    narrowest = min(widths_of(model), key=lambda widths: widths.groups)
    fewer = [replace(narrowest, groups=groups) for groups in range(1, narrowest.groups + 1)]
    return [w.groups for w in fewer if config_accepts(model.config, **w.fields)]


def projection_parts(
    model: PreTrainedModel, index: int, widths: Widths
) -> dict[str, list[ProjectionPart]]:
    """Return the parts of a decoder layer's projections that make up its groups and neurons.

    Args:
        model: of a family whose attention and MLP are known.
        index: of the decoder layer.
        widths: of that layer.

    Returns:
        "heads" -> parts of the attention's projections, "neurons" -> parts of the MLP's
        projections; no neurons for experts.
    """
    names = sublayers_of(model)
    matrices = {tuple(m.name.rsplit(".", 2)[1:]): m for m in layer_matrices(model, index)}
    query = torch.arange(widths.groups * widths.heads * widths.head_dim).view(widths.groups, -1)
    key_or_value = torch.arange(widths.groups * widths.head_dim).view(widths.groups, -1)
    rows = [query, key_or_value, key_or_value]
    if len(names.heads) == 1:  # one projection holds the rows of query, key and value in turn
        starts = (0, query.numel(), query.numel() + key_or_value.numel())
        rows = [torch.cat([part + s for part, s in zip(rows, starts, strict=True)], 1)]
    heads = [
        ProjectionPart(matrices[names.attention, name], 0, indices)
        for name, indices in zip(names.heads, rows, strict=True)
    ]
    heads.append(ProjectionPart(matrices[names.attention, names.head_output], 1, query))
    neurons = []
    for name in (*names.neurons, names.neuron_output) if names.neurons else ():
        matrix, dim = matrices[names.mlp, name], int(name == names.neuron_output)
        # A projection that holds both gate and up has the rows of all neurons twice, in turn.
        indices = torch.arange(matrix.parameter.shape[dim]).view(-1, widths.neurons).T
        neurons.append(ProjectionPart(matrix, dim, indices))
    return {"heads": heads, "neurons": neurons}


@remembered
@torch.no_grad()
def width_scores(
    model: PreTrainedModel, windows: Windows, score: str, kinds: Collection[str] = KINDS
) -> dict[str, list[Tensor]]:
    """Score the key-value groups and the neurons of every decoder layer; the model is unchanged.

    Args:
        model: of a family whose attention and MLP are known.
        windows: calibration windows.
        score: "taylor", "wanda" or "fluctuation".
        kinds: "heads", "neurons" or both.

    Returns:
        Kind -> scores of each layer, (G,) for "heads" and (F,) for "neurons", float32 on the CPU.
        Layers of experts have no neurons and are left out there.

    Raises:
        ValueError: if activations or gradients are NaN or Inf.
        TypeError: if attention and MLP of the family are not known, or weights are quantized.
    """
    if score == "taylor":
        layers = _layer_parts(model)
        parts = [part for layer in layers for kind in kinds for part in layer[kind]]
        parameters: dict[str, Any] = {part.matrix.name: part.matrix.parameter for part in parts}
        return _summed(layers, kinds, saliencies(model, windows, parameters))
    reader = WidthReader(model, windows, kinds)
    read_layers(model, windows, [reader], label=score)
    return reader.result(score, kinds)


def _layer_parts(model: PreTrainedModel) -> list[dict[str, list[ProjectionPart]]]:
    return [projection_parts(model, i, widths) for i, widths in enumerate(widths_of(model))]


def _summed(
    layers: Sequence[Mapping[str, list[ProjectionPart]]],
    kinds: Collection[str],
    scores: Mapping[str, Tensor],
) -> dict[str, list[Tensor]]:
    """Return kind -> scores of the groups or neurons of each layer, of scores of weights by name.

    Layers of experts have no neurons and are left out there.
    """

    def summed(parts: list[ProjectionPart]) -> Tensor:
        sums = [part.sums(scores[part.matrix.name]) for part in parts if part.matrix.name in scores]
        return torch.stack(sums).sum(0)

    return {kind: [summed(layer[kind]) for layer in layers if layer[kind]] for kind in kinds}


@remembered
@torch.no_grad()
def standardised_scores(
    model: PreTrainedModel, windows: Windows, kinds: Collection[str] = KINDS
) -> dict[str, list[Tensor]]:
    """Score groups and neurons so that all layers and both kinds can be ranked together (FLAP).

    The fluctuation of each column of an output projection is standardised over the columns of that
    projection: less their mean, by their standard deviation (arXiv:2312.11983). A group's score is
    the mean over its columns. FLAP's released code squares the fluctuations of attention first; we
    follow the paper, which does not.

    Args:
        model: of a family whose attention and MLP are known.
        windows: calibration windows.
        kinds: "heads", "neurons" or both.

    Returns:
        Kind -> scores of each layer, (G,) for "heads" and (F,) for "neurons", float32 on the CPU,
        dimensionless, of both signs.

    Raises:
        ValueError: if activations are NaN or Inf.
        TypeError: if attention and MLP of the family are not known, or weights are quantized.
    """
    reader = WidthReader(model, windows, kinds)
    read_layers(model, windows, [reader], label="fluctuation")
    return reader.standardised(kinds)


class WidthReader(LayerReader):
    """Reads what `width_scores` returns by wanda and by fluctuation, and `standardised_scores`.

    Args:
        model: whose layers are read.
        windows: all that will be read.
        kinds: "heads", "neurons" or both.

    Raises:
        TypeError: if attention and MLP of the family are not known, or weights are quantized.
    """

    def __init__(
        self, model: PreTrainedModel, windows: Windows, kinds: Collection[str] = KINDS
    ) -> None:
        self._group, self._layers = group_of(windows), _layer_parts(model)
        # Of each layer; the last part of a kind is the output projection.
        outputs = [[x[kind][-1].matrix for kind in kinds if x[kind]] for x in self._layers]
        self._statistics = [InputStatistics(x, InputVariance) for x in outputs]
        self._columns: dict[str, dict[str, Tensor]] = {}  # by score and matrix

    @contextmanager
    def watching(self, mask: Tensor | None, index: int | None) -> Iterator[None]:
        """Add the inputs of output projections."""
        with ExitStack() as stack:
            for one in self._statistics if index is None else [self._statistics[index]]:
                stack.enter_context(one.watching(mask))
            yield

    def finish(self) -> None:
        """Add up the sums of all ranks."""
        for statistics in self._statistics:
            statistics.pool(self._group)

    def result(self, score: str, kinds: Collection[str]) -> dict[str, list[Tensor]]:
        """Return the scores by "wanda" or "fluctuation".

        Raises:
            ValueError: if an input was NaN or Inf.
        """
        return _summed(self._layers, kinds, self._column_scores(score))

    def standardised(self, kinds: Collection[str]) -> dict[str, list[Tensor]]:
        """Return the standardised scores.

        Raises:
            ValueError: if an input was NaN or Inf.
        """
        columns = self._column_scores("fluctuation")

        def mean(part: ProjectionPart) -> Tensor:
            scores = columns[part.matrix.name]
            standardised = (scores - scores.mean()) / scores.std().clamp(min=1e-30)
            return part.sums(standardised) / part.indices.shape[1]

        outputs = {kind: [x[kind][-1] for x in self._layers if x[kind]] for kind in kinds}
        return {kind: [mean(part) for part in parts] for kind, parts in outputs.items()}

    def _column_scores(self, score: str) -> dict[str, Tensor]:
        """Return name -> scores of the columns (I,) of each output projection."""
        if score not in self._columns:
            self._columns[score] = {
                matrix.name: _column_scores(matrix, statistics.of(matrix)[0], score)
                for statistics in self._statistics
                for matrix in statistics.matrices
            }
        return self._columns[score]


def _column_scores(matrix: Matrix, statistic: InputVariance, score: str) -> Tensor:
    """Return the scores of the columns (I,) of an output projection."""
    weight, norms = matrix.parameter, statistic.norms()  # raises if an input was NaN or Inf
    if score == "wanda":
        return wanda_scores(weight, norms.to(weight.device)).sum(0)
    return weight.float().square().sum(0) * statistic.variance().to(weight.device)
