"""Removes decoder layers in place; the result is a stock model.

More than a list of layers changes. Every layer holds its own index for the cache, configs hold one
entry a layer or count layers, and an RWKV's first block has a norm that no other block has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from prunelight.models.families.architectures import is_sliced
from prunelight.models.families.config_fields import cut_config
from prunelight.models.families.layers import INDEX_ATTRIBUTES, decoder_layers, layers_path
from prunelight.models.families.rwkv import restore_rwkv_scale
from prunelight.planning.steps import RemoveLayers
from prunelight.pruning.drop_sublayers import check_leading
from prunelight.pruning.step_kind import StepContext, StepKind

# Config fields that make layers depend on each other or on their index. Removal is refused.
REFUSED_FIELDS = ("num_kv_shared_layers", "scale_attn_by_inverse_layer_idx")


@torch.no_grad()
def remove_layers(model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Remove decoder layers in place, renumber the others and cut the config.

    Raises:
        ValueError: if an index does not exist or is repeated, or no layer would be left; if the
            config ties layers to their index or to each other; if the first layer left has no
            attention.
        TypeError: if the decoder layers cannot be found.
    """
    old_layers = decoder_layers(model)
    RemoveLayers(tuple(layers)).check(len(old_layers))
    if not layers:
        return
    check_removable(model)
    check_leading(model, layers)
    restore_rwkv_scale(model)
    kept = [i for i in range(len(old_layers)) if i not in set(layers)]
    first: Any = old_layers[kept[0]]
    if hasattr(old_layers[0], "pre_ln") and not hasattr(first, "pre_ln"):  # an RWKV
        first.pre_ln = old_layers[0].pre_ln
    parent, _, name = layers_path(model).rpartition(".")
    layers_left = nn.ModuleList(old_layers[i] for i in kept)
    setattr(model.get_submodule(parent), name, layers_left)
    for index, layer in enumerate(layers_left):
        for module in layer.modules():
            for attribute in INDEX_ATTRIBUTES:
                if isinstance(getattr(module, attribute, None), int):
                    setattr(module, attribute, index)
    cut_config(model.config, kept, len(old_layers))


def check_removable(model: PreTrainedModel) -> None:
    """Check that decoder layers of the model can be removed.

    Raises:
        ValueError: if the model is sliced, or ties layers to their index or to each other.
    """
    if is_sliced(model):
        raise ValueError(
            "this model is sliced: each decoder layer hands on a width and a basis of its own; "
            "remove or merge layers first, then slice"
        )
    for name in REFUSED_FIELDS:
        if getattr(model.config, name, None):
            raise ValueError(
                f"{name}={getattr(model.config, name)} of {model.config.model_type} makes layers "
                "depend on each other or on their index; removing layers would change the others"
            )


def _check(model: PreTrainedModel, step: RemoveLayers, context: StepContext) -> None:
    if step.layers:
        check_removable(model)


def _carry_out(model: PreTrainedModel, step: RemoveLayers, context: StepContext) -> None:
    remove_layers(model, context.renumber(step.layers))


REMOVE_LAYERS = StepKind(_check, _carry_out)
