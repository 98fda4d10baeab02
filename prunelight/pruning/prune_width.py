"""Prunes attention heads (whole key-value groups) and MLP neurons of decoder layers.

Where all layers keep equal numbers, the result is a stock model of smaller `num_key_value_heads`
and `intermediate_size`. Else it is one of the family's registered class, see
models/families/own_classes/layer_widths.py. What is gone is made up for in one of two ways. The
output projection is fitted anew, or it gets a bias: the mean of the inputs that are gone, times
their columns (FLAP, arXiv:2312.11983). Stock models lack that bias, so those are of our class too.
"""

# O out_features, I in_features

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunelight.calibration.layer_inputs.input_statistics import InputStatistics
from prunelight.calibration.layer_walk import LayerWalk
from prunelight.calibration.statistics import Hessian, InputVariance
from prunelight.calibration.windows import Windows
from prunelight.models.families.architectures import is_sliced, sublayers_of
from prunelight.models.families.config_fields import config_accepts
from prunelight.models.families.layers import decoder_layers
from prunelight.models.families.own_classes.layer_widths import (
    BIASED,
    CLASSES,
    LISTS,
    LayerConfig,
    give_bias,
    share_config,
)
from prunelight.models.families.own_classes.registration import family_of, take_class
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
            does not accept a number of heads that all layers have, or windows are missing.
        TypeError: if attention and MLP of the family are not known, weights are quantized, neurons
            of experts are asked for, or the layers of a sliced model keep different numbers or get
            biases.
    """
    widths = widths_of(model)
    if step.correction and windows is None:
        raise ValueError(
            f"correction={step.correction} needs calibration windows; pass them to apply"
        )
    if step.neurons and not sublayers_of(model).neurons:
        raise TypeError(
            f"{model.config.model_type} has experts, whose neurons cannot be pruned; prune heads"
        )
    projection_parts(model, 0, widths[0])  # refuses quantized weights
    if is_sliced(model) and step.correction == "bias":
        raise TypeError(
            f"the class of {model.config.model_type} holds no bias of its output projections; set "
            "correction=True"
        )
    if is_sliced(model) and step.leaves_own_class:
        raise TypeError(
            "this model is sliced: all its layers must keep the same number of heads and of "
            "neurons; keep equal numbers, or prune the dense model and do not slice it"
        )
    if step.heads and len(set(map(len, step.heads.values()))) == 1:
        count, allowed = len(next(iter(step.heads.values()))), allowed_groups(model)
        if count not in allowed:
            fewest = min(widths, key=lambda of_layer: of_layer.groups)
            raise ValueError(
                f"num_key_value_heads={count} cannot be kept of the {fewest.groups} groups of "
                f"{fewest.heads} query heads: {type(model.config).__name__} accepts {allowed}"
            )
    left = {str(i) for i in range(model.config.num_hidden_layers) if i not in removed}
    for kind, kept in (("heads", step.heads), ("neurons", step.neurons)):
        if kept and set(kept) != left:
            differing = sorted(set(kept) ^ left, key=int)
            raise ValueError(f"{kind} must name each layer that is left; see layers {differing}")
        for layer, indices in kept.items():
            of_layer = widths[int(layer)]
            total = of_layer.groups if kind == "heads" else of_layer.neurons
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

    Where layers then differ, or have biases, model and config take the family's registered class. A
    model of that class whose layers no longer differ becomes a stock one again.

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
    old, kept = widths_of(model), _kept(step, removed)
    new = [_widths(widths, kept, index) for index, widths in enumerate(old)]
    if step.correction == "bias":
        assert windows is not None  # check_width
        means = _mean_inputs(model, old, [*kept], windows, device=device, offload=offload)
        _give_biases(model, old, kept, means)
    if step.correction is True:
        assert windows is not None  # check_width
        _narrow_and_fit(model, old, new, kept, windows, device=device, offload=offload)
    else:
        for index, change in enumerate(zip(old, new, strict=True)):
            _narrow(model, index, *change, kept)
    _describe(model, new)


def _widths(old: Widths, kept: Mapping[str, Mapping[int, Tensor]], index: int) -> Widths:
    """Return the widths of a layer after a step."""
    counts = {kind: len(layers[index]) for kind, layers in kept.items()}
    groups, neurons = counts.get("heads", old.groups), counts.get("neurons", old.neurons)
    return replace(old, groups=groups, neurons=neurons)


def _kept(step: PruneWidth, removed: Collection[int]) -> dict[str, dict[int, Tensor]]:
    """Return what is kept: kind -> layer as the model counts it now -> groups or neurons."""
    return {
        kind: {renumber(int(i), removed): torch.tensor(x) for i, x in layers.items()}
        for kind, layers in (("heads", step.heads), ("neurons", step.neurons))
        if layers
    }


def _narrow_and_fit(
    model: PreTrainedModel,
    old: Sequence[Widths],
    new: Sequence[Widths],
    kept: Mapping[str, Mapping[int, Tensor]],
    windows: Windows,
    *,
    device: torch.device | None,
    offload: bool,
) -> None:
    """Cut one layer after another, and fit its outputs to what it gave with all inputs, in place.

    The inputs of a layer are those after the narrow layers before it.
    """
    with LayerWalk(model, windows, device=device, offload=offload, label="width") as walk:
        for index, _ in walk.layers():
            parts = projection_parts(model, index, old[index])
            # The last part of a kind is the output projection.
            inputs = InputStatistics([parts[kind][-1].matrix for kind in kept], Hessian)
            for batch, mask in enumerate(walk.masks):
                with inputs.watching(mask):
                    walk.forward(batch)
            inputs.pool(walk.group)
            _narrow(model, index, old[index], new[index], kept, inputs)
            if index + 1 < len(old):
                walk.advance()


def _mean_inputs(
    model: PreTrainedModel,
    widths: Sequence[Widths],
    kinds: Collection[str],
    windows: Windows,
    *,
    device: torch.device | None,
    offload: bool,
) -> dict[str, Tensor]:
    """Return the mean input (I,) of each output projection, by name, over all tokens.

    All layers are dense meanwhile, as in FLAP's released code.

    Raises:
        ValueError: if an input is NaN or Inf.
    """
    means = {}
    with LayerWalk(model, windows, device=device, offload=offload, label="means") as walk:
        for index, _ in walk.layers():
            parts = projection_parts(model, index, widths[index])
            outputs = [parts[kind][-1].matrix for kind in kinds]
            inputs = InputStatistics(outputs, InputVariance)
            for batch, mask in enumerate(walk.masks):
                with inputs.watching(mask):
                    walk.states[batch] = walk.forward(batch).to(walk.store)
            inputs.pool(walk.group)
            for matrix in outputs:
                (statistic,) = inputs.of(matrix)
                statistic.norms()  # raises if an input was NaN or Inf
                means[matrix.name] = statistic.mean
    return means


def _give_biases(
    model: PreTrainedModel,
    layers: Sequence[Widths],
    kept: Mapping[str, Mapping[int, Tensor]],
    means: Mapping[str, Tensor] | None,
) -> None:
    """Give output projections the bias that makes up for what is gone, in place (FLAP).

    The bias b of W x + b grows by the sum over the columns j that go of W_j mean(x_j).

    Args:
        model: not yet cut.
        layers: its widths.
        kept: kind -> layer -> groups or neurons that are kept.
        means: mean input (I,) of each output projection; None leaves new biases zero.
    """
    for index, widths in enumerate(layers):
        parts = projection_parts(model, index, widths)
        for kind, indices in kept.items():
            output = parts[kind][-1]
            linear: Any = output.matrix.owner
            give_bias(linear)
            if means is None:
                continue
            gone = torch.ones(linear.in_features, dtype=torch.bool)
            gone[output.indices[indices[index]].flatten()] = False
            place = float64_device(linear.weight.device)
            lost = means[output.matrix.name].to(place).double() * gone.to(place)
            bias = linear.bias.data.to(place).double() + linear.weight.to(place).double() @ lost
            linear.bias.data = bias.to(linear.bias.data)
    names = sublayers_of(model)
    paths = {
        "heads": f"{names.attention}.{names.head_output}",
        "neurons": f"{names.mlp}.{names.neuron_output}",
    }
    config: Any = model.config
    biased = {*(getattr(config, BIASED, None) or ()), *(paths[kind] for kind in kept)}
    setattr(config, BIASED, sorted(biased))


def _describe(model: Any, layers: Sequence[Widths]) -> None:
    """Write the widths of all layers into the config, and take the class that they need, in place.

    A number that all layers share is written into the field of the stock config, if it accepts it.
    """
    config = model.config
    lists = {name: [widths.fields[field] for widths in layers] for name, field in LISTS.items()}
    heads = [name for name in lists if name != "layer_intermediate_sizes"]
    for names in (heads, ["layer_intermediate_sizes"]):
        shared = {LISTS[name]: lists[name][0] for name in names if len(set(lists[name])) == 1}
        if len(shared) == len(names) and config_accepts(config, **shared):
            for name in names:
                setattr(config, LISTS[name], shared[LISTS[name]])
                del lists[name]
    config.head_dim = layers[0].head_dim  # explicit, for readers that divide widths
    own = CLASSES[family_of(config.model_type)]
    stock = own.__bases__[-1]
    biased = getattr(config, BIASED, None)
    differs = bool(lists or biased)
    for name, value in {**dict.fromkeys(LISTS), **lists, BIASED: biased}.items():
        if differs:
            setattr(config, name, value)
        else:
            vars(config).pop(name, None)
    if differs != isinstance(model, own):
        take_class(model, own if differs else stock)
        vars(config).pop("auto_map", None)  # of the class before
    share_config(model)


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
    config: Any = LayerConfig(model.config, new.fields)
    for module in decoder_layers(model)[index].modules():
        if "config" in vars(module):  # some modules ask it when they run
            module.config = config
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


def _rehearse(model: PreTrainedModel, step: PruneWidth, context: StepContext) -> None:
    if step.correction == "bias":
        _give_biases(model, widths_of(model), _kept(step, context.removed), None)
    prune_width(model, replace(step, correction=False), removed=context.removed)


PRUNE_WIDTH = StepKind(
    _check,
    _carry_out,
    follows_slicing=True,
    needs_windows=lambda step: bool(step.correction),
    rehearse=_rehearse,
    changes_weights=True,
)
