"""Small models of each class of ours, for each family that has one."""

import copy
from functools import cache

import torch
from sliced_models import VARIED, dense_model, sliced
from tiny import NUM_LAYERS, tiny_model

import prunelight
from prunelight.models.families.architectures import ARCHITECTURES
from prunelight.models.families.layers import decoder_layers
from prunelight.models.families.own_classes import dropped_sublayers, layer_widths
from prunelight.models.families.own_classes import sliced as sliced_classes
from prunelight.planning.fingerprints import describe_model
from prunelight.planning.plan import Plan
from prunelight.planning.steps import PruneWidth
from prunelight.pruning.drop_sublayers import drop_sublayers
from prunelight.pruning.healing.gap_operator import put_gap_operators

KINDS = {
    "sliced": sliced_classes,
    "dropped": dropped_sublayers,
    "gaps": dropped_sublayers,
    "widths": layer_widths,
}
EVERY = [(kind, family) for kind, module in KINDS.items() for family in module.FAMILIES]

GROUPS = (2, 1, 1, 2, 1, 2)  # of 2 key-value groups, in each layer
NEURONS = (64, 40, 8, 64, 32, 16)  # of 64


@cache
def lively(family):
    """A dense model whose layers do something, with norms and biases that differ."""
    if family in sliced_classes.FAMILIES:
        return dense_model(family)
    model = tiny_model(family)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in decoder_layers(model).parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.mul_(5)
    return model


def kept(total, counts, layers=range(NUM_LAYERS)):
    """The last `count` of the groups or neurons of each layer."""
    return {str(i): tuple(range(total - counts[i], total)) for i in layers}


def width_step(family, groups=GROUPS, neurons=NEURONS, layers=range(NUM_LAYERS)):
    """A step that leaves layers of different widths."""
    has_neurons = bool(ARCHITECTURES[family].sublayers.neurons)
    return PruneWidth(kept(2, groups, layers), kept(64, neurons, layers) if has_neurons else {})


def plan_by_hand(model, *steps):
    return Plan("by hand", {}, describe_model(model), steps)


def narrowed(family, *steps):
    """A copy of the lively model after width_step, or other steps."""
    model = copy.deepcopy(lively(family))
    return prunelight.apply(model, plan_by_hand(model, *(steps or (width_step(family),))))


@cache
def shared_model(kind, family):
    """A model of our class; tests that change it take a copy."""
    if kind == "sliced":
        return sliced(family, False, VARIED)
    if kind == "dropped":
        return drop_sublayers(copy.deepcopy(lively(family)), [4, 5], [1, 4])
    if kind == "gaps":
        return with_operators(copy.deepcopy(lively(family)), [1, 4])
    return narrowed(family)


def with_operators(model, layers):
    """The model with small random matrices behind some layers."""
    put_gap_operators(model, layers)
    generator = torch.Generator().manual_seed(2)
    for index in layers:
        weight = decoder_layers(model)[index].gap_operator.weight
        weight.data = 0.1 * torch.randn(weight.shape, generator=generator)
    return model


def own_model(kind, family):
    return copy.deepcopy(shared_model(kind, family))
