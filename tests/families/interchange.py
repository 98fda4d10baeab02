"""Which layers of a family could go, by comparing models without weights.

A shorter configuration is the dense one with fewer layers, and with its lists of one entry a layer
cut. If each layer that a model of it has equals the dense layer that would stand there, in names,
shapes, classes and settings, then layers look interchangeable. With the dense weights the shorter
model must give what the dense model gives that skips the removed layers.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

COUNT_FIELDS = ("num_hidden_layers", "num_layers", "n_layer", "decoder_layers", "num_blocks")
INDEX_LIST = re.compile(r"_(ids|idxs|indices|layers)$")  # a list of layers
NOT_COMPARED = ("layer_idx", "layer_id", "layer_index", "layer_number", "idx", "index", "training")


def shorter_config(config: PretrainedConfig, kept: list[int], count: int) -> PretrainedConfig:
    """A copy of a configuration for the kept layers, read anew as from a file."""
    values = copy.deepcopy(config).to_dict()
    cut(values, kept, count, dict(config.attribute_map))
    if isinstance(values.get("text_config"), dict):
        cut(values["text_config"], kept, count, {})
    return type(config).from_dict(values)


def cut(values: dict[str, Any], kept: list[int], count: int, aliases: dict[str, str]) -> None:
    """Cut the counts of layers and the lists of one entry a layer, in place."""
    names = {aliases.get(name, name) for name in COUNT_FIELDS}
    for name, value in list(values.items()):
        if name in names and value == count:
            values[name] = len(kept)
        elif isinstance(value, (list, tuple)) and len(value) == count:
            values[name] = [value[i] for i in kept]
        elif isinstance(value, list) and INDEX_LIST.search(name):
            values[name] = [kept.index(i) for i in value if i in kept]
    per_layer = values.get("per_layer_config")
    if isinstance(per_layer, dict):
        places = {old: new for new, old in enumerate(kept)}
        values["per_layer_config"] = {
            places[int(i)]: x for i, x in per_layer.items() if int(i) in places
        }


def description(layer: nn.Module) -> dict[str, Any]:
    """What a layer is: names, shapes, classes and plain settings, but not its index."""
    described: dict[str, Any] = {}
    for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
        described[f"{name} shape"] = tuple(tensor.shape)
    for name, module in layer.named_modules():
        described[f"{name} class"] = type(module).__name__
        for key, value in vars(module).items():
            plain = isinstance(value, (bool, int, float, str, type(None)))
            if plain and not key.startswith("_") and key not in NOT_COMPARED:
                described[f"{name}.{key}"] = value
    return described


def shorter_model(
    model: nn.Module, path: str, removed: Sequence[int], *, device: str = "cpu"
) -> Any:
    """What transformers builds from the shorter configuration."""
    count = len(model.get_submodule(path))
    kept = [i for i in range(count) if i not in removed]
    config: Any = model.config
    with torch.device(device):
        return type(model)(shorter_config(config, kept, count)).eval()


def looks_the_same(model: nn.Module, path: str, removed: Sequence[int]) -> bool:
    """Whether each layer that is left is what the shorter configuration builds at its place."""
    try:
        shorter = shorter_model(model, path, removed, device="meta")
    except Exception:  # the class refuses this configuration
        return False
    left = [x for i, x in enumerate(model.get_submodule(path)) if i not in removed]
    found = [description(layer) for layer in shorter.get_submodule(path)]
    return found == [description(layer) for layer in left]


def with_weights_of(model: nn.Module, path: str, removed: Sequence[int]) -> Any:
    """The shorter model with the weights of the layers that are left."""
    shorter = shorter_model(model, path, removed)
    kept = [i for i in range(len(model.get_submodule(path))) if i not in removed]
    places = {f"{path}.{old}.": f"{path}.{new}." for new, old in enumerate(kept)}
    weights = {}
    for name, tensor in model.state_dict().items():
        prefix = f"{path}.{name[len(path) + 1 :].split('.')[0]}."
        if not name.startswith(f"{path}."):
            weights[name] = tensor
        elif prefix in places:
            weights[places[prefix] + name[len(prefix) :]] = tensor
    shorter.load_state_dict(weights)
    return shorter
