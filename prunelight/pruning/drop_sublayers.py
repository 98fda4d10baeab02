"""Drops the attention or the MLP of decoder layers, in place (LLM-Drop, arXiv:2406.15786).

The first attention of each kind of layer must stay: transformers counts the tokens of the cache in
that layer.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from transformers import PreTrainedModel

from prunelight.models.families.architectures import is_sliced, sublayers_of
from prunelight.models.families.layers import decoder_layers
from prunelight.models.families.matrices import layer_matrices
from prunelight.models.families.own_classes.dropped_sublayers import (
    CLASSES,
    FAMILIES,
    NAMES,
    SUBLAYERS,
    dropped,
    take_out,
)
from prunelight.models.families.own_classes.layer_widths import PREFIX as WIDTHS_PREFIX
from prunelight.models.families.own_classes.registration import family_of, take_class
from prunelight.planning.steps import DropSublayers, PruneWidth
from prunelight.pruning.step_kind import StepContext, StepKind

_DIFFERENT_WIDTHS = (
    "no class describes layers of different widths, some without attention or MLP; keep equal "
    "numbers of heads and neurons (allocation='uniform'), then drop"
)


def check_droppable(model: PreTrainedModel) -> None:
    """Check that sublayers of the model can be dropped.

    Raises:
        TypeError: if the family has no registered class, the model is sliced, its layers have
            different widths, or weights are quantized.
    """
    if is_sliced(model):
        raise TypeError("this model is sliced: its sublayers cannot be dropped; drop, or slice")
    if model.config.model_type.startswith(WIDTHS_PREFIX):
        raise TypeError(_DIFFERENT_WIDTHS)
    if not sublayers_of(model).droppable:
        raise TypeError(
            f"{model.config.model_type} has norms after its sublayers, which cannot be dropped "
            f"alone; families that can: {', '.join(sorted(FAMILIES))}"
        )
    layer_matrices(model, 0)  # refuses quantized weights


def check_leading(
    model: PreTrainedModel, removed: Collection[int] = (), attention: Collection[int] = ()
) -> None:
    """Check that the first attention of each kind of layer stays; the cache counts tokens there.

    Args:
        model: before the removal.
        removed: layers that are removed.
        attention: layers that lose their attention, beside those that have none.

    Raises:
        ValueError: if one of them would go; names the layers.
    """
    without_attention = dropped(model, "attention") | set(attention)
    if leading := sorted(leading_attentions(model, removed) & without_attention):
        raise ValueError(
            f"attention={leading} must stay: it is the first that is left of its kind, and the "
            "cache counts its tokens there"
        )


def leading_attentions(model: PreTrainedModel, removed: Collection[int] = ()) -> set[int]:
    """Return the layers whose attention leads the cache: of each kind the first one left."""
    num_layers = len(decoder_layers(model))
    kinds = getattr(model.config, "layer_types", None) or ["all"] * num_layers
    left = [i for i in range(num_layers) if i not in removed]
    return {next(i for i in left if kinds[i] == kinds[other]) for other in left}


def fixed_sublayers(model: PreTrainedModel, name: str) -> set[int]:
    """Return the layers whose "attention" or "mlp" cannot be dropped.

    Either the layer has none any more, or its attention leads the cache.
    """
    return dropped(model, name) | (leading_attentions(model) if name == "attention" else set())


@torch.no_grad()
def drop_sublayers(
    model: PreTrainedModel, attention: Collection[int], mlp: Collection[int]
) -> PreTrainedModel:
    """Drop sublayers in place; model and config take the family's registered class.

    Without layers nothing changes.

    Raises:
        TypeError: see `check_droppable`.
        ValueError: see `check_leading`.
    """
    check_droppable(model)
    check_leading(model, attention=attention)
    if not (attention or mlp):
        return model
    config: Any = model.config
    for name, layers in zip(SUBLAYERS, (attention, mlp), strict=True):
        without = dropped(model, name) | set(layers)
        setattr(config, f"drop_{name}", [i in without for i in range(config.num_hidden_layers)])
    sublayers = sublayers_of(model)
    names = {name: getattr(sublayers, name) for name in NAMES}
    config.sublayer_names = None if names == NAMES else names
    take_class(model, CLASSES[family_of(config.model_type)])
    take_out(model)
    return model


def _check(model: PreTrainedModel, step: DropSublayers, context: StepContext) -> None:
    if any(isinstance(other, PruneWidth) and other.leaves_own_class for other in context.earlier):
        raise TypeError(_DIFFERENT_WIDTHS)
    check_droppable(model)


def _carry_out(model: PreTrainedModel, step: DropSublayers, context: StepContext) -> None:
    drop_sublayers(model, context.renumber(step.attention), context.renumber(step.mlp))


DROP_SUBLAYERS = StepKind(_check, _carry_out)
