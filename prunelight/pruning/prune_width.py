"""Prunes attention heads (whole key-value groups) and MLP neurons, as many in all layers.

The result is a stock model of smaller `num_key_value_heads` and `intermediate_size`. FLAP
(arXiv:2312.11983) makes up for the inputs that are gone by a bias, which stock models lack. Here
the output projection is fitted anew.
"""

# O out_features, I in_features

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunelight.calibration.input_statistics import InputStatistics
from prunelight.calibration.layer_walk import LayerWalk
from prunelight.calibration.statistics import Hessian
from prunelight.calibration.windows import Windows
from prunelight.models.families.architectures import sublayers_of
from prunelight.models.families.layers import decoder_layers
from prunelight.planning.steps import DropSublayers, PruneWidth, renumber
from prunelight.pruning.step_kind import StepContext, StepKind
from prunelight.runtime.devices import float64_device
from prunelight.scoring.width_scores import Widths, allowed_groups, projection_parts, widths_of

_DAMPENING = 0.01  # of the mean diagonal, as in SparseGPT


def check_width(
    model: PreTrainedModel,
    step: PruneWidth,
    windows: Windows | None = None,
    removed: Collection[int] = (),
) -> None:
    """Check a width step against a model.

    Args:
        model: with all layers that the step's plan counts.
        step: which groups and neurons are kept.
        windows: calibration windows; a correction needs them.
        removed: layers that earlier steps of the plan remove.

    Raises:
        ValueError: if an index does not exist, a layer that is left is not named, the config class
            does not accept the number of heads, or windows are missing.
        TypeError: if attention and MLP of the family are not known, weights are quantized, or
            neurons of experts are asked for.
    """
    widths = widths_of(model)
    if step.correction and windows is None:
        raise ValueError("correction=True needs calibration windows; pass them to apply")
    if step.neurons and not sublayers_of(model).neurons:
        raise TypeError(
            f"{model.config.model_type} has experts, whose neurons cannot be pruned; prune heads"
        )
    projection_parts(model, 0, widths)  # refuses quantized weights
    if step.heads:
        count, allowed = len(next(iter(step.heads.values()))), allowed_groups(model)
        if count not in allowed:
            raise ValueError(
                f"num_key_value_heads={count} cannot be kept of the {widths.groups} groups of "
                f"{widths.heads} query heads: {type(model.config).__name__} accepts {allowed}"
            )
    left = {str(i) for i in range(model.config.num_hidden_layers) if i not in removed}
    for kind, kept, total in (
        ("heads", step.heads, widths.groups),
        ("neurons", step.neurons, widths.neurons),
    ):
        if kept and set(kept) != left:
            differing = sorted(set(kept) ^ left, key=int)
            raise ValueError(f"{kind} must name each layer that is left; see layers {differing}")
        for layer, indices in kept.items():
            if not 0 <= indices[0] <= indices[-1] < total or len(set(indices)) < len(indices):
                raise ValueError(
                    f"{kind} of layer {layer} must be different whole numbers in [0, {total - 1}]"
                )


@torch.no_grad()
def prune_width(
    model: PreTrainedModel,
    step: PruneWidth,
    windows: Windows | None = None,
    *,
    removed: Collection[int] = (),
    device: torch.device | None = None,
    offload: bool = False,
) -> None:
    """Carry out a width step that `check_width` passed, in place.

    Args:
        model: after the earlier steps of the plan.
        step: counts the layers of the dense model.
        windows: calibration windows, for the correction.
        removed: layers of the dense model that are gone.
        device: where the layers compute during the correction.
        offload: keep the calibration states on the CPU.

    Raises:
        ValueError: if activations are NaN or Inf during a correction; some layers are cut by then.
    """
    old, num_layers = widths_of(model), len(decoder_layers(model))
    kept = {
        kind: {renumber(int(i), removed): torch.tensor(x) for i, x in layers.items()}
        for kind, layers in (("heads", step.heads), ("neurons", step.neurons))
        if layers
    }
    counts = {kind: len(layers[0]) for kind, layers in kept.items()}
    groups, neurons = counts.get("heads", old.groups), counts.get("neurons", old.neurons)
    new = replace(old, groups=groups, neurons=neurons)
    if not step.correction:
        for index in range(num_layers):
            _narrow(model, index, old, new, kept)
        _describe(model.config, new)
        return
    assert windows is not None  # check_width
    with LayerWalk(model, windows, device=device, offload=offload, label="width") as walk:
        for index, _ in walk.layers():
            parts = projection_parts(model, index, old)
            # The last part of a kind is the output projection.
            inputs = InputStatistics([parts[kind][-1].matrix for kind in kept], Hessian)
            for batch, mask in enumerate(walk.masks):
                with inputs.watching(mask):
                    walk.forward(batch)
            inputs.pool(walk.group)
            _narrow(model, index, old, new, kept, inputs)
            _describe(model.config, new)  # some layers ask the config when they run
            if index + 1 < num_layers:
                walk.advance()
                _describe(model.config, old)


def _describe(config: Any, widths: Widths) -> None:
    """Write widths into a config."""
    for name, value in widths.fields.items():
        setattr(config, name, value)


def _narrow(
    model: PreTrainedModel,
    index: int,
    old: Widths,
    new: Widths,
    kept: Mapping[str, Mapping[int, Tensor]],
    inputs: InputStatistics[Hessian] | None = None,
) -> None:
    """Cut one layer to the groups and neurons that are kept; with inputs, fit its outputs."""
    parts = projection_parts(model, index, old)
    for kind, layers in kept.items():
        for part in parts[kind]:
            # The rows or columns of the groups or neurons, in order.
            places = part.indices[layers[index]].flatten().sort().values
            linear: Any = part.matrix.owner
            if inputs is not None and part.dim == 1:
                _fit(linear.weight.data, places, inputs.of(part.matrix)[0].result())
            _cut(linear, places, part.dim)
    for module in decoder_layers(model)[index].modules():
        for name, value in new.fields.items():  # some modules copy fields of the config
            if isinstance(vars(module).get(name), int):
                setattr(module, name, value)


def _fit(weight: Tensor, kept: Tensor, product: Tensor) -> None:
    """Fit the columns that are kept to the output of all columns, in place.

    Least squares of X_kept W'^T = X W^T, damped towards the old weights: W' = W_kept +
    (W G[:, kept] - W_kept G[kept, kept]) (G[kept, kept] + damping)^-1, with G = X^T X. Zeros of an
    earlier step stay zero.

    Args:
        weight: W, (O, I).
        kept: indices of the columns that are kept.
        product: G, (I, I).
    """
    place = float64_device(weight.device)
    gram, wide, kept = product.to(place).double(), weight.to(place).double(), kept.to(place)
    gram_kept, old = gram[kept][:, kept], wide[:, kept]
    missing = wide @ gram[:, kept] - old @ gram_kept
    gram_kept.diagonal().add_(_DAMPENING * gram_kept.diagonal().mean().clamp(min=1e-30))
    change = torch.cholesky_solve(missing.T, torch.linalg.cholesky(gram_kept)).T
    weight[:, kept.to(weight.device)] = (old + change * (old != 0)).to(weight)


def _cut(linear: nn.Linear, kept: Tensor, dim: int) -> None:
    """Keep some rows (dim 0) or columns (dim 1) of a projection, in place."""
    kept, trained = kept.to(linear.weight.device), linear.weight.requires_grad
    linear.weight = nn.Parameter(linear.weight.data.index_select(dim, kept), trained)
    if dim == 0 and linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.data[kept], linear.bias.requires_grad)
    linear.out_features, linear.in_features = linear.weight.shape


def _check(model: PreTrainedModel, step: PruneWidth, context: StepContext) -> None:
    if any(isinstance(earlier, DropSublayers | PruneWidth) for earlier in context.earlier):
        raise ValueError("prune width once, and before sublayers are dropped")
    check_width(model, step, context.windows, context.removed)


def _carry_out(model: PreTrainedModel, step: PruneWidth, context: StepContext) -> None:
    prune_width(
        model,
        step,
        context.windows,
        removed=context.removed,
        device=context.device,
        offload=context.offload,
    )


PRUNE_WIDTH = StepKind(_check, _carry_out, follows_slicing=True)
