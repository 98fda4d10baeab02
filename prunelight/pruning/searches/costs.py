"""What a model costs as a sum over its decoder layers: parameters, bytes, or seconds.

What costs are of is the caller's: the search for a budget adds them up and compares, nothing else.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from prunelight.models.families.layers import decoder_layers
from prunelight.models.sizes import parameter_bytes, parameter_count
from prunelight.scoring.width_scores import projection_parts, unit_size, widths_of


@dataclass(frozen=True)
class LayerCosts:
    """Costs of the parts of a model, in one unit.

    Attributes:
        rest: of all but the decoder layers.
        layers: of each whole decoder layer.
        neurons: how many MLP neurons each layer has; 0 where none can be pruned.
        neuron: of one neuron of each layer.
    """

    rest: float
    layers: tuple[float, ...]
    neurons: tuple[int, ...]
    neuron: tuple[float, ...]

    def total(self, removed: Collection[int] = (), kept: Mapping[int, int] | None = None) -> float:
        """Return the cost without some layers, and with fewer neurons in others.

        Args:
            removed: layers that are gone.
            kept: layer -> neurons that it keeps; layers that are not named keep all.
        """
        cost = self.rest
        for layer, whole in enumerate(self.layers):
            if layer not in removed:
                gone = self.neurons[layer] - (kept or {}).get(layer, self.neurons[layer])
                cost += whole - gone * self.neuron[layer]
        return cost


def parameter_costs(model: PreTrainedModel) -> LayerCosts:
    """Return the number of parameters of each part; tied ones count once."""
    layers = [parameter_count(layer) for layer in decoder_layers(model)]
    neurons, neuron = _neurons(model)
    rest = parameter_count(model) - sum(layers)
    return LayerCosts(rest, tuple(layers), neurons, neuron)


def byte_costs(model: PreTrainedModel, cache: Sequence[int]) -> LayerCosts:
    """Return the bytes of each part: weights as they are stored now, and a cache.

    Args:
        model: whose weights count.
        cache: bytes of the cache of each decoder layer.
    """
    parameters = parameter_costs(model)
    weights = [parameter_bytes(layer) for layer in decoder_layers(model)]
    each = zip(weights, parameters.layers, parameters.neuron, strict=True)
    return replace(
        parameters,
        rest=parameter_bytes(model) - sum(weights),
        layers=tuple(map(sum, zip(weights, cache, strict=True))),
        neuron=tuple(size * of_layer / count for of_layer, count, size in each),
    )


def time_costs(
    model: PreTrainedModel, rest: float, layers: Sequence[float], mlps: Sequence[float]
) -> LayerCosts:
    """Return the seconds of each part; those of an MLP are taken to go with its neurons.

    Args:
        model: that was timed.
        rest: seconds of all but its decoder layers.
        layers: seconds of each decoder layer.
        mlps: of them, those in the layer's MLP.
    """
    neurons, _ = _neurons(model)
    each = zip(mlps, neurons, strict=True)
    return LayerCosts(
        rest, tuple(layers), neurons, tuple(mlp / count if count else 0.0 for mlp, count in each)
    )


def _neurons(model: PreTrainedModel) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Return how many MLP neurons each layer has that can be pruned, and the parameters of one."""
    nothing = (0,) * len(decoder_layers(model))
    try:
        widths = widths_of(model)
        parts = [projection_parts(model, i, width)["neurons"] for i, width in enumerate(widths)]
    except TypeError:  # the family's MLPs are not known, some were dropped, or weights are packed
        return nothing, nothing
    if not all(parts):  # experts
        return nothing, nothing
    return tuple(width.neurons for width in widths), tuple(map(unit_size, parts))
