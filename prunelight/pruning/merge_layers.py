"""Merges neighbouring decoder layers into one: the rules of SLM (arXiv:2502.19159), and a mean.

- "difference_sum", the paper: theta_l + sum_k (theta_k - theta_l), over the layers k of a window
  above its lowest layer l.
- "released", the released code: it adds each difference to a running copy. The sum telescopes to
  the highest layer's projections under the lowest layer's norms and biases.
- "top" keeps the highest layer whole; "mean" is the mean of all weights.
- "lowest" keeps the lowest layer whole: the ablation "delete" of the released code, which says by
  that name that the layers above the lowest are deleted and nothing is merged.

All rules but "top" need layers of one kind, because what they give stands at the highest layer's
place. Experts of different layers are not aligned, so experts are never mixed.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunelight.models.families.layers import decoder_layers, layers_path
from prunelight.models.families.matrices import layer_matrices, matrices
from prunelight.models.families.outline import Outline, difference, outline
from prunelight.planning.steps import MergeLayers
from prunelight.pruning.remove_layers import check_removable, remove_layers
from prunelight.pruning.step_kind import StepContext, StepKind


@torch.no_grad()
def merge_layers(
    model: PreTrainedModel, groups: Sequence[Sequence[int]], merge: str = "top"
) -> None:
    """Merge windows of decoder layers in place, each into its highest layer.

    Args:
        model: whose layers are merged.
        groups: the layers of each window, neighbours in ascending order.
        merge: a rule, see the top of this file.

    Raises:
        TypeError: see `check_mergeable`.
        ValueError: see `remove_layers`.
    """
    check_mergeable(model, merge, groups)
    check_removable(model, [index for group in groups for index in group[:-1]])
    layers = decoder_layers(model)
    for group in groups:
        layers[group[-1]] = merged_layer(model, group, merge)
    remove_layers(model, [index for group in groups for index in group[:-1]])


@torch.no_grad()
def merged_weights(
    layers: Sequence[nn.Module], merge: str, projections: Collection[str] = ()
) -> dict[str, Tensor]:
    """Return the parameters of the layer that stands for a window, in the layers' own dtype.

    Args:
        layers: of the window, from the lowest to the highest; all of one kind.
        merge: "difference_sum", "mean", "released", "lowest" or "top".
        projections: names of the parameters that "released" takes from the highest layer.
    """
    parameters: list[dict[str, Tensor]] = [dict(layer.named_parameters()) for layer in layers]
    if merge == "top":
        return parameters[-1]
    if merge == "lowest":
        return parameters[0]
    if merge == "released":
        highest = parameters[-1]
        return {n: highest[n] if n in projections else p for n, p in parameters[0].items()}
    weights, count = {}, len(parameters)
    for name, lowest in parameters[0].items():
        total = torch.zeros_like(lowest, dtype=torch.float32)
        for of_layer in parameters:
            total += of_layer[name]
        mixed = total / count if merge == "mean" else total - (count - 1) * lowest.float()
        weights[name] = mixed.to(lowest.dtype)
    return weights


@torch.no_grad()
def merged_layer(model: PreTrainedModel, group: Sequence[int], merge: str) -> nn.Module:
    """Return the layer that stands for a window: for "top" the highest itself, else a new one."""
    layers = [decoder_layers(model)[index] for index in group]
    if merge == "top":
        return layers[-1]
    weights = merged_weights(layers, merge, projection_names(model, group[0]))
    layer = copy.deepcopy(layers[-1])
    for name, parameter in layer.named_parameters():
        parameter.copy_(weights[name])
    return layer


def projection_names(model: PreTrainedModel, index: int) -> list[str]:
    """Return the names, within a decoder layer, of its weights that can be sparsified."""
    prefix = f"{layers_path(model)}.{index}."
    projections = [matrix for matrix in layer_matrices(model, index) if not matrix.fused]
    return [f"{m.name.removeprefix(prefix)}.{m.parameter_name}" for m in projections]


def check_mergeable(
    model: PreTrainedModel, merge: str, groups: Sequence[Sequence[int]] | None = None
) -> None:
    """Check that a rule can merge layers.

    Args:
        model: whose layers are merged.
        merge: the rule.
        groups: the windows; None checks any window of neighbours.

    Raises:
        TypeError: if weights are quantized, or experts or layers of different kinds would be mixed;
            names the layers.
    """
    matrices(model)  # refuses quantized weights
    if merge == "top":
        return
    dense = outline(type(model), model.config, layers_path(model))
    for group in [range(len(decoder_layers(model)))] if groups is None else groups:
        for low, high in pairwise(group):
            if difference := _difference(dense, low, high, mixes=merge != "lowest"):
                raise TypeError(
                    f"decoder layers {low} and {high} of {model.config.model_type} cannot be mixed "
                    f"by merge={merge!r}: {difference}; take merge='top', which mixes no weights"
                )


def _difference(dense: Outline, low: int, high: int, *, mixes: bool) -> str:
    """Return why two layers cannot be mixed, or one put at the other's place; "" if they can."""
    old, new = dense.layers[low], dense.layers[high]
    for name in sorted({*old, *new}):
        part = name.strip(".")
        if mixes and ".experts." in f".{name}.":
            return f"{part} belongs to experts, which are not aligned from layer to layer"
        if name not in old or name not in new:
            return f"only one of them has {part}"
    return difference(dense, low, dense, high, range(len(dense.layers)))


def _check(model: PreTrainedModel, step: MergeLayers, context: StepContext) -> None:
    check_removable(model, step.removed)
    check_mergeable(model, step.merge, step.groups)


def _carry_out(model: PreTrainedModel, step: MergeLayers, context: StepContext) -> None:
    merge_layers(model, [context.renumber(group) for group in step.groups], step.merge)


MERGE_LAYERS = StepKind(_check, _carry_out)
