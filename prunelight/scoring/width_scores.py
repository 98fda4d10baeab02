"""Scores of attention heads (whole key-value groups) and MLP neurons.

A group or neuron is scored by |W * dL/dW| over all its weights (LLM-Pruner, arXiv:2305.11627,
Eq. 4), by |W| ||X|| over its columns of the output projection (Wanda, arXiv:2306.11695, as a
structured sum), or by the variance of its inputs times ||W||^2 (FLAP, arXiv:2312.11983, Eq. 5).
"""

# I in_features, O out_features, G key-value groups, F neurons

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunelight.calibration.input_statistics import InputStatistics
from prunelight.calibration.shared_windows import group_of
from prunelight.calibration.statistics import InputVariance
from prunelight.calibration.windows import Windows, micro_batches
from prunelight.models.families.architectures import sublayers_of
from prunelight.models.families.config_fields import accepts, head_dim
from prunelight.models.families.dropped_sublayers import dropped
from prunelight.models.families.layers import Matrix, decoder_layers, layer_matrices
from prunelight.models.forward import evaluating, forward_without_head
from prunelight.scoring.importance import saliencies
from prunelight.scoring.weight_scores import wanda_scores

KINDS = ("heads", "neurons")

SCORES = ("taylor", "wanda", "fluctuation")


@dataclass(frozen=True)
class Widths:
    """Widths of a decoder layer: key-value groups, query heads in each, their width, neurons."""

    groups: int
    heads: int
    head_dim: int
    neurons: int

    @property
    def fields(self) -> dict[str, int]:
        """Return the config fields that say so; modules may keep copies of them."""
        return {
            "num_key_value_heads": self.groups,
            "num_attention_heads": self.groups * self.heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.neurons,
        }


@dataclass(frozen=True)
class ProjectionPart:
    """The part of groups or neurons that one projection holds."""

    matrix: Matrix
    dim: int  # 0 if they are rows of its weight (O, I), 1 if columns
    places: Tensor  # rows or columns of each group or neuron, (G or F, ...)

    def sums(self, weights: Tensor) -> Tensor:
        """Sum numbers like the weight (O, I), or like its rows or columns, (G,) or (F,)."""
        line = weights if weights.ndim == 1 else weights.sum(1 - self.dim)
        return line.cpu()[self.places].sum(1)


def widths_of(model: PreTrainedModel) -> Widths:
    """Return the widths of a model whose layers are all alike.

    Raises:
        TypeError: if attention and MLP of the family are not known, or sublayers were dropped.
    """
    sublayers_of(model)
    config: Any = model.config
    if dropped(model, "attention") | dropped(model, "mlp"):
        raise TypeError("sublayers of this model were dropped; prune its width first, then drop")
    heads = config.num_attention_heads
    groups = config.num_key_value_heads or heads
    return Widths(groups, heads // groups, head_dim(config), config.intermediate_size)


def allowed_groups(model: PreTrainedModel) -> list[int]:
    """Return the numbers of key-value groups that the model's config class accepts.

    Llama wants `hidden_size` to be a multiple of the number of query heads.
    """
    widths = widths_of(model)
    fewer = [replace(widths, groups=groups) for groups in range(1, widths.groups + 1)]
    return [w.groups for w in fewer if accepts(model.config, **w.fields)]


def projection_parts(
    model: PreTrainedModel, index: int, widths: Widths
) -> dict[str, list[ProjectionPart]]:
    """Return what a decoder layer's groups and neurons consist of; no neurons for experts."""
    names = sublayers_of(model)
    found = {tuple(m.name.rsplit(".", 2)[1:]): m for m in layer_matrices(model, index)}
    query = torch.arange(widths.groups * widths.heads * widths.head_dim).view(widths.groups, -1)
    shared = torch.arange(widths.groups * widths.head_dim).view(widths.groups, -1)
    rows = [query, shared, shared]
    if len(names.heads) == 1:  # one below the other
        starts = (0, query.numel(), query.numel() + shared.numel())
        rows = [torch.cat([part + s for part, s in zip(rows, starts, strict=True)], 1)]
    heads = [
        ProjectionPart(found[names.attention, name], 0, places)
        for name, places in zip(names.heads, rows, strict=True)
    ]
    heads.append(ProjectionPart(found[names.attention, names.head_output], 1, query))
    neurons = []
    for name in (*names.neurons, names.neuron_output) if names.neurons else ():
        matrix, dim = found[names.mlp, name], int(name == names.neuron_output)
        # In runs where one projection holds gate and up, say.
        places = torch.arange(matrix.parameter.shape[dim]).view(-1, widths.neurons).T
        neurons.append(ProjectionPart(matrix, dim, places))
    return {"heads": heads, "neurons": neurons}


@torch.no_grad()
def width_scores(
    model: PreTrainedModel, windows: Windows, score: str, kinds: Collection[str] = KINDS
) -> dict[str, list[Tensor]]:
    """Score the key-value groups and the neurons of every decoder layer; the model is unchanged.

    Returns:
        "heads", one (G,) a layer, and "neurons", one (F,); float32 on the CPU; none for experts.

    Raises:
        ValueError: if activations or gradients are NaN or Inf.
        TypeError: if attention and MLP of the family are not known, or weights are quantized.
    """
    widths = widths_of(model)
    layers = [projection_parts(model, i, widths) for i in range(len(decoder_layers(model)))]
    members = [member for layer in layers for kind in kinds for member in layer[kind]]
    if score == "taylor":
        known: dict[str, Any] = {m.matrix.name: m.matrix.parameter for m in members}
        found = saliencies(model, windows, known)
    else:
        outputs = [member.matrix for member in members if member.dim == 1]
        found = dict(_column_scores(model, windows, outputs, score))

    def told(members: list[ProjectionPart]) -> Tensor:
        parts = [m.sums(found[m.matrix.name]) for m in members if m.matrix.name in found]
        return torch.stack(parts).sum(0)

    return {kind: [told(layer[kind]) for layer in layers if layer[kind]] for kind in kinds}


def _column_scores(
    model: PreTrainedModel, windows: Windows, outputs: list[Matrix], score: str
) -> Iterator[tuple[str, Tensor]]:
    """Yield the score of each column of the output projections (I,), from one forward."""
    seen = InputStatistics(outputs, InputVariance)
    with evaluating(model):
        for batch in micro_batches(model, windows, label=score):
            mask = batch.get("attention_mask")
            with seen.watching(None if mask is None else mask.bool()):
                forward_without_head(model, batch)
    seen.pool(group_of(windows))
    for matrix in outputs:
        (statistic,), weight = seen.of(matrix), matrix.parameter
        norms = statistic.norms()  # checks
        if score == "wanda":
            yield matrix.name, wanda_scores(weight, norms).sum(0)
        else:
            yield matrix.name, weight.float().square().sum(0) * statistic.variance()
