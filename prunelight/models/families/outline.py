"""The outline of a model: what its config makes of every layer, seen on the meta device.

An outline holds no weights. Per layer it lists the modules, the shapes of their weights, and the
plain values that they keep, such as a head width or the index of the layer. Two layers with equal
outlines compute the same function of their weights, as far as their code asks only those values.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from prunelight.models.families.rwkv import EMBEDDING_NORM
from prunelight.models.loading import quiet_transformers

_PLAIN = (bool, int, float, str, type(None), torch.dtype)

# Which weights are one: a model whose layers share weights sets these by its layers.
_TIES = ("_tied_weights_keys", "all_tied_weights_keys")

# An attribute that holds the index of a layer: its own, or of one whose states it reads.
_NAMES_A_LAYER = re.compile(r"layer.*(id|idx|index|number|map|dic)|(idx|index).*layer")


@dataclass(frozen=True)
class Outline:
    """What a config makes of a model.

    Attributes:
        layers: for each decoder layer, "module.attribute" -> class name, shape or plain value.
        rest: the same of all modules outside the decoder layers, by full name.
        indices: "module.attribute" -> (step, start): in layer i the attribute is step * i + start.
    """

    layers: tuple[dict[str, Any], ...]
    rest: dict[str, Any]
    indices: dict[str, tuple[int, int]] = field(default_factory=dict)


def meta_model(model_class: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """Return the model that a saved config gives, without weights, on the meta device."""
    with quiet_transformers(), torch.device("meta"), no_init_weights():
        return model_class(type(config).from_dict(config.to_dict()))


def outline(
    model_class: type[PreTrainedModel], config: PretrainedConfig, layers_path: str
) -> Outline:
    """Return the outline of the model that a config describes; costs no memory for weights."""
    model = meta_model(model_class, config)
    layers: Any = model.get_submodule(layers_path)
    within = layers_path + "."
    outside = (
        (path, module) for path, module in model.named_modules() if not path.startswith(within)
    )
    facts = tuple(dict(_facts(layer.named_modules())) for layer in layers)
    return Outline(facts, dict(_facts(outside)), _indices(facts))


def _facts(modules: Iterator[tuple[str, nn.Module]]) -> Iterator[tuple[str, Any]]:
    for path, module in modules:
        yield f"{path}.", type(module).__qualname__
        for name, parameter in module._parameters.items():
            yield f"{path}.{name}", _shape("parameter", parameter)
        for name, buffer in module._buffers.items():
            yield f"{path}.{name}", _shape("buffer", buffer)
        for name, value in vars(module).items():
            if (name.startswith("_") and name not in _TIES) or name == "training":
                continue
            if isinstance(value, _PLAIN):
                yield f"{path}.{name}", value
            elif isinstance(value, FunctionType):
                yield f"{path}.{name}", value.__qualname__
            elif isinstance(value, dict) and all(isinstance(x, _PLAIN) for x in value.values()):
                yield f"{path}.{name}", dict(value)
            elif isinstance(value, (list, tuple)) and all(isinstance(x, _PLAIN) for x in value):
                yield f"{path}.{name}", tuple(value)
            elif isinstance(value, (set, frozenset)):
                yield f"{path}.{name}", frozenset(value)


def _shape(kind: str, tensor: torch.Tensor | None) -> tuple[str, tuple[int, ...]] | None:
    return None if tensor is None else (kind, tuple(tensor.shape))


def is_shape(value: Any) -> bool:
    """Return whether a fact of an outline is the shape of a weight or buffer."""
    return isinstance(value, tuple) and len(value) == 2 and value[0] in ("parameter", "buffer")


def _indices(layers: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, int]]:
    """Return the attributes that rise with the index of the layer: name -> (step, start)."""
    values: dict[str, list[tuple[int, int]]] = {}
    for index, facts in enumerate(layers):
        for name, value in facts.items():
            if type(value) is int:
                values.setdefault(name, []).append((index, value))
    indices = {}
    for name, pairs in values.items():
        (first, low), (last, high) = pairs[0], pairs[-1]
        named = names_a_layer(name)
        if first == last:
            if named and low in (first, first + 1):
                indices[name] = (1, low - first)
            continue
        step = (high - low) // (last - first)
        rising = step > 0 and all(value - low == step * (i - first) for i, value in pairs)
        if rising and (named or (step == 1 and len(pairs) > 2)):
            indices[name] = (step, low - step * first)
    return indices


def names_a_layer(name: str) -> bool:
    """Return whether an attribute holds the index of a layer, by its name."""
    return bool(_NAMES_A_LAYER.search(name.rpartition(".")[2]))


def difference(
    dense: Outline, index: int, shorter: Outline, place: int, kept: Sequence[int]
) -> str:
    """Return why a layer of the dense model cannot stand at a place of a shorter one; "" if it can.

    Args:
        dense: outline of the model with all layers.
        index: of the layer in the dense model.
        shorter: outline of the shorter model.
        place: of the layer in the shorter model.
        kept: layers of the dense model that the shorter one has, ascending.
    """
    old, new = dense.layers[index], shorter.layers[place]
    for name in sorted({*old, *new}, key=lambda name: (name.count("."), name)):
        if name.startswith(EMBEDDING_NORM):
            continue
        if name not in old or name not in new:
            part = name.strip(".") or "layer"
            return f"its {part} has no place there" if name in old else f"it lacks {part}"
        expected = _moved(dense, name, old[name], index, place, kept)
        unchanged = isinstance(new[name], tuple) and old[name] == new[name]
        if expected != new[name] and not unchanged:  # a tuple may have L members by chance
            part = name.strip(".") or "class"
            return f"{part} is {_text(old[name])} and would be {_text(new[name])}"
    return ""


def _moved(
    dense: Outline, name: str, value: Any, index: int, place: int, kept: Sequence[int]
) -> Any:
    """Return what a layer's value must be at its new place."""
    if is_shape(value):
        return value
    if name in dense.indices:
        step, start = dense.indices[name]
        return step * place + start
    if isinstance(value, tuple) and len(value) == len(dense.layers):
        return tuple(value[i] for i in kept)
    if isinstance(value, tuple) and names_a_layer(name):
        return tuple(new for new, i in enumerate(kept) if i in value)
    if isinstance(value, dict) and names_a_layer(name):
        return {list(kept).index(i): value[i] for i in value if i in kept}
    if type(value) is int and names_a_layer(name) and 0 <= value < len(dense.layers):
        return list(kept).index(value) if value in kept else f"layer {value}, which is removed"
    return value


def _text(value: Any) -> str:
    return str(value[1]) if is_shape(value) else repr(value)
