"""The decoder layers of a model: where they are."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from prunelight.models.families.architectures import architecture_of
from prunelight.models.families.config_fields import decoder_config
from prunelight.runtime.finite import check_is_model

# An argument of a layer's forward with such a name is what the layer before it computed.
CARRIED = "prev_"

# Such an argument -> the attribute that says that a layer hands it on instead of computing it.
# A layer that computes it does not read it. Without an entry every layer reads and computes it.
HANDS_ON = {"prev_topk_indices": "self_attn.skip_topk"}


def layers_path(model: PreTrainedModel) -> str:
    """Return the dotted path of the `ModuleList` of decoder layers.

    Raises:
        TypeError: if the family is unknown, and not exactly one `ModuleList` has a member a layer.
    """
    architecture = architecture_of(model)
    if architecture is not None and architecture.layers:
        return architecture.layers
    paths = _stacks(model)
    if len(paths) != 1:
        named = f" ({', '.join(paths)})" if paths else ""
        raise TypeError(
            f"the decoder layers of {model.config.model_type} cannot be found: exactly one "
            f"ModuleList must hold them, and {len(paths)} may{named}. Add the family to "
            "prunelight/models/families/architectures.py, as docs/add-a-family.md says"
        )
    return paths[0]


def _stacks(model: PreTrainedModel) -> list[str]:
    """Return the paths of the module lists that may hold the decoder layers; one if it is clear.

    A list inside another list belongs to a layer. Lists with a member for each hidden layer of the
    text decoder come first, then those nearest to the model: encoders of images lie deeper.
    """
    count = getattr(decoder_config(model.config), "num_hidden_layers", None)
    lists = {path: len(modules) for path, modules in _outer_lists(model, "")}
    fitting = [path for path, length in lists.items() if length == count] or [*lists]
    depth = min((path.count(".") for path in fitting), default=0)
    return [path for path in fitting if path.count(".") == depth]


def _outer_lists(module: nn.Module, path: str) -> Iterator[tuple[str, nn.ModuleList]]:
    """Yield the lists of layers in a module; what is inside such a list is not looked at."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList) and _holds_layers(child):
            yield f"{path}{name}", child
        else:
            yield from _outer_lists(child, f"{path}{name}.")


def _holds_layers(modules: nn.ModuleList) -> bool:
    """Return whether members are made of modules, some with weights, as decoder layers are.

    A decoder layer can lose its attention and its MLP, and with them all weights.
    """
    parts = [[*module.children()] for module in modules]
    weights = (next(part.parameters(), None) for inner in parts for part in inner)
    return all(parts) and any(weight is not None for weight in weights)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the model's decoder layers (Mamba mixers and RWKV blocks included).

    Raises:
        TypeError: if there is no model, or the layers cannot be found, see `layers_path`.
    """
    check_is_model(model)
    layers = model.get_submodule(layers_path(model))
    assert isinstance(layers, nn.ModuleList)
    if next(iter(inspect.signature(layers[0].forward).parameters)).startswith(CARRIED):
        raise TypeError(
            f"the decoder layers of {model.config.model_type} hand on two streams of hidden "
            "states; layers are pruned only where they hand on one"
        )
    return layers


def carried_arguments(layer: nn.Module) -> list[str]:
    """Return the arguments of a layer that the layer before it computed, beside hidden states."""
    return [
        name for name in inspect.signature(layer.forward).parameters if name.startswith(CARRIED)
    ]


def first_tensor(value: Any) -> Tensor:
    """Return the hidden states of a layer's output: the output itself, or its first member."""
    return value[0] if isinstance(value, (tuple, list)) else value
