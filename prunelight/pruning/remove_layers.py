"""Removes decoder layers in place; the result is a stock model.

More than a list of layers changes. Every layer holds its own index for the cache, configs hold one
entry a layer or count layers, some models hold a table with a part for each layer, and an RWKV's
first block has a norm that no other block has. What the shorter model needs is read off its outline
on the meta device, see `models/families/removable.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from prunelight.models.families.layers import decoder_layers, layers_path
from prunelight.models.families.outline import names_a_layer
from prunelight.models.families.removable import RemovableLayers, removable_layers
from prunelight.models.families.rwkv import EMBEDDING_NORM, restore_rwkv_scale
from prunelight.models.families.shorter_config import cut_config
from prunelight.planning.steps import RemoveLayers
from prunelight.pruning.drop_sublayers import check_leading
from prunelight.pruning.step_kind import StepContext, StepKind


@torch.no_grad()
def remove_layers(model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Remove decoder layers in place, renumber the others and cut the config.

    Raises:
        ValueError: if an index does not exist or is repeated, or no layer would be left; if the
            layers that are left would not be themselves at their new places; if the first layer
            left has no attention.
        TypeError: if the decoder layers cannot be found.
    """
    old_layers = decoder_layers(model)
    RemoveLayers(tuple(layers)).check(len(old_layers))
    if not layers:
        return
    removable = removable_layers(model)
    removable.check(layers)
    check_leading(model, layers)
    restore_rwkv_scale(model)
    kept = [i for i in range(len(old_layers)) if i not in set(layers)]
    first: Any = old_layers[kept[0]]
    if hasattr(old_layers[0], EMBEDDING_NORM) and not hasattr(first, EMBEDDING_NORM):
        setattr(first, EMBEDDING_NORM, getattr(old_layers[0], EMBEDDING_NORM))
    parent, _, name = layers_path(model).rpartition(".")
    layers_left = nn.ModuleList(old_layers[i] for i in kept)
    setattr(model.get_submodule(parent), name, layers_left)
    _describe(model, layers_left, removable, kept)
    cut_config(model.config, kept, len(old_layers), removable.models.rules)


def _describe(
    model: PreTrainedModel, layers: nn.ModuleList, removable: RemovableLayers, kept: Sequence[int]
) -> None:
    """Give all modules the values of the shorter model, and cut tables that span the layers."""
    changes = removable.models.rest(kept)
    for name, dim in changes.tables.items():
        _keep_parts(model, name, dim, kept, removable.total)
    for name, value in changes.values.items():
        _set(model, name, value)
    shorter = removable.models.values(kept)
    for place, (layer, values, old) in enumerate(zip(layers, shorter, kept, strict=True)):
        for name, value in values.items():
            _set(layer, name, value)
        known = removable.models.dense.layers[old]
        for path, module in layer.named_modules():
            for name, value in vars(module).items():
                # BigBird exchanges its attention on short texts: no outline shows the other one.
                if f"{path}.{name}" not in known and names_a_layer(name) and value == old:
                    setattr(module, name, place)


def _keep_parts(
    model: PreTrainedModel, name: str, dim: int, kept: Sequence[int], total: int
) -> None:
    """Keep the parts of some layers in a weight that has a part for each layer, in place."""
    parameter = model.get_parameter(name)
    parts = parameter.data.unflatten(dim, (total, -1))
    places = torch.tensor(kept, device=parameter.device)
    parameter.data = parts.index_select(dim, places).flatten(dim, dim + 1)


def _set(root: nn.Module, name: str, value: Any) -> None:
    """Set a plain value of a module, given as "module.attribute", where the module has it."""
    path, _, attribute = name.rpartition(".")
    module = root.get_submodule(path)
    if attribute in vars(module):
        present = getattr(module, attribute)
        collection = isinstance(present, (list, set))
        setattr(module, attribute, type(present)(value) if collection else value)


def check_removable(model: PreTrainedModel, layers: Sequence[int] | None = None) -> None:
    """Check that these decoder layers of the model can be removed together; None: any layer.

    Raises:
        ValueError: if they cannot; says why, and which can.
        TypeError: if the decoder layers cannot be found.
    """
    if layers is not None and not layers:
        return
    removable = removable_layers(model)
    if layers is not None:
        removable.check(layers)
    elif len(removable.fixed) == removable.total:
        raise ValueError(f"layers of {removable.name} cannot be removed: {removable.what_can_go()}")


def _check(model: PreTrainedModel, step: RemoveLayers, context: StepContext) -> None:
    check_removable(model, step.layers)


def _carry_out(model: PreTrainedModel, step: RemoveLayers, context: StepContext) -> None:
    remove_layers(model, context.renumber(step.layers))


REMOVE_LAYERS = StepKind(_check, _carry_out)
