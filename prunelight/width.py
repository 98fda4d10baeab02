"""Width pruning: attention heads (whole key-value groups) and MLP neurons, as many in all layers.

Uniform widths make a stock model of smaller `num_key_value_heads` and `intermediate_size`. A group
or neuron is scored by |W * dL/dW| over all its weights (LLM-Pruner, arXiv:2305.11627, Eq. 4), by
|W| ||X|| over its columns of the output projection (Wanda, arXiv:2306.11695, as a structured sum),
or by the variance of its inputs times ||W||^2 (FLAP, arXiv:2312.11983, Eq. 5). FLAP makes up for
what is gone by a bias, which no stock model has; here the output projection is fitted anew.
"""

# I in_features, O out_features, G key-value groups, F neurons

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunelight.architecture import (
    Matrix,
    accepts,
    decoder_layers,
    head_dim,
    layer_matrices,
    sublayers_of,
)
from prunelight.calibration import Windows, evaluating, micro_batches, run_layers
from prunelight.importance import saliencies
from prunelight.shares import ranks_of
from prunelight.sparsity import wanda_scores
from prunelight.statistics import Hessian, InputVariance, float64_device
from prunelight.steps import PruneWidth, renumber
from prunelight.sublayers import dropped
from prunelight.walk import InputStatistics, LayerWalk

KINDS = ("heads", "neurons")
SCORES = ("taylor", "wanda", "fluctuation")
_DAMPENING = 0.01  # of the mean diagonal, as in SparseGPT


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
class Member:
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


def members_of(model: PreTrainedModel, index: int, widths: Widths) -> dict[str, list[Member]]:
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
        Member(found[names.attention, name], 0, places)
        for name, places in zip(names.heads, rows, strict=True)
    ]
    heads.append(Member(found[names.attention, names.head_output], 1, query))
    neurons = []
    for name in (*names.neurons, names.neuron_output) if names.neurons else ():
        matrix, dim = found[names.mlp, name], int(name == names.neuron_output)
        # In runs where one projection holds gate and up, say.
        places = torch.arange(matrix.parameter.shape[dim]).view(-1, widths.neurons).T
        neurons.append(Member(matrix, dim, places))
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
    layers = [members_of(model, i, widths) for i in range(len(decoder_layers(model)))]
    members = [member for layer in layers for kind in kinds for member in layer[kind]]
    if score == "taylor":
        known: dict[str, Any] = {m.matrix.name: m.matrix.parameter for m in members}
        found = saliencies(model, windows, known)
    else:
        outputs = [member.matrix for member in members if member.dim == 1]
        found = dict(_column_scores(model, windows, outputs, score))

    def told(members: list[Member]) -> Tensor:
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
                run_layers(model, batch)
    seen.pool(ranks_of(windows))
    for matrix in outputs:
        (statistic,), weight = seen.of(matrix), matrix.parameter
        norms = statistic.norms()  # checks
        if score == "wanda":
            yield matrix.name, wanda_scores(weight, norms).sum(0)
        else:
            yield matrix.name, weight.float().square().sum(0) * statistic.variance()


def check_width(
    model: PreTrainedModel,
    step: PruneWidth,
    windows: Windows | None = None,
    removed: Collection[int] = (),
) -> None:
    """Check a width step against a model, in its numbering; `removed` layers go before the step.

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
    members_of(model, 0, widths)  # refuses quantized weights
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
            odd = sorted(set(kept) ^ left, key=int)
            raise ValueError(f"{kind} must name each layer that is left; see layers {odd}")
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

    The step counts the layers of the dense model, of which `removed` are gone. For the correction
    the layers compute on `device`; `offload` keeps the calibration states on the CPU.

    Raises:
        ValueError: if activations are NaN or Inf during a correction; some layers are cut by then.
    """
    old, total = widths_of(model), len(decoder_layers(model))
    kept = {
        kind: {renumber(int(i), removed): torch.tensor(x) for i, x in layers.items()}
        for kind, layers in (("heads", step.heads), ("neurons", step.neurons))
        if layers
    }
    counts = {kind: len(layers[0]) for kind, layers in kept.items()}
    groups, neurons = counts.get("heads", old.groups), counts.get("neurons", old.neurons)
    new = replace(old, groups=groups, neurons=neurons)
    if not step.correction:
        for index in range(total):
            _narrow(model, index, old, new, kept)
        _describe(model.config, new)
        return
    assert windows is not None  # check_width
    with LayerWalk(model, windows, device=device, offload=offload, label="width") as walk:
        for index, _ in walk.layers():
            members = members_of(model, index, old)
            seen = InputStatistics([members[kind][-1].matrix for kind in kept], Hessian)
            for batch, mask in enumerate(walk.masks):
                with seen.watching(mask):
                    walk.forward(batch)
            seen.pool(walk.ranks)
            _narrow(model, index, old, new, kept, seen)
            _describe(model.config, new)  # some layers ask the config when they run
            if index + 1 < total:
                walk.advance()
                _describe(model.config, old)


def _describe(config: Any, widths: Widths) -> None:
    for name, value in widths.fields.items():
        setattr(config, name, value)


def _narrow(
    model: PreTrainedModel,
    index: int,
    old: Widths,
    new: Widths,
    kept: Mapping[str, Mapping[int, Tensor]],
    seen: InputStatistics[Hessian] | None = None,
) -> None:
    """Cut one layer to the groups and neurons that are kept; fit where inputs were seen."""
    members = members_of(model, index, old)
    for kind, layers in kept.items():
        for member in members[kind]:
            # The rows or columns of the groups or neurons, in order.
            places = member.places[layers[index]].flatten().sort().values
            linear: Any = member.matrix.owner
            if seen is not None and member.dim == 1:
                _fit(linear.weight.data, places, seen.of(member.matrix)[0].result())
            _cut(linear, places, member.dim)
    for module in decoder_layers(model)[index].modules():
        for name, value in new.fields.items():  # some modules keep copies
            if isinstance(vars(module).get(name), int):
                setattr(module, name, value)


def _fit(weight: Tensor, kept: Tensor, product: Tensor) -> None:
    """Fit the columns (O, I) that are kept to what all gave, in place, by X^T X (I, I).

    Least squares of X_kept W'^T = X W^T, damped towards the old weights: W' = W_kept +
    (W G[:, kept] - W_kept G[kept, kept]) (G[kept, kept] + damping)^-1. Zeros that an earlier step
    put there stay.
    """
    place = float64_device(weight.device)
    gram, wide, kept = product.to(place).double(), weight.to(place).double(), kept.to(place)
    own, old = gram[kept][:, kept], wide[:, kept]
    missing = wide @ gram[:, kept] - old @ own
    own.diagonal().add_(_DAMPENING * own.diagonal().mean().clamp(min=1e-30))
    change = torch.cholesky_solve(missing.T, torch.linalg.cholesky(own)).T
    weight[:, kept.to(weight.device)] = (old + change * (old != 0)).to(weight)


def _cut(linear: nn.Linear, kept: Tensor, dim: int) -> None:
    """Keep some rows (dim 0) or columns (dim 1) of a projection, in place."""
    kept, trained = kept.to(linear.weight.device), linear.weight.requires_grad
    linear.weight = nn.Parameter(linear.weight.data.index_select(dim, kept), trained)
    if dim == 0 and linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.data[kept], linear.bias.requires_grad)
    linear.out_features, linear.in_features = linear.weight.shape
