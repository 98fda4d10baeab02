"""Which layers of a family could go, by comparing models without weights.

A shorter configuration is the dense one with fewer layers, and with its lists of one entry a layer
cut. If each layer that a model of it has equals the dense layer that would stand there, in names,
shapes, classes and settings, then two layers can be removed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

COUNT_FIELDS = ("num_hidden_layers", "num_layers", "n_layer", "decoder_layers", "num_blocks")
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


def pairs_that_can_go(model: nn.Module, path: str) -> Iterator[tuple[int, int]]:
    """The pairs of layers without which the rest is what a shorter configuration builds."""
    config: Any = model.config
    dense = [description(layer) for layer in model.get_submodule(path)]
    for pair in combinations(range(len(dense)), 2):
        kept = [i for i in range(len(dense)) if i not in pair]
        try:
            with torch.device("meta"):
                shorter = AutoModelForCausalLM.from_config(shorter_config(config, kept, len(dense)))
            found = [description(layer) for layer in shorter.get_submodule(path)]
        except Exception:
            continue
        if found == [dense[i] for i in kept]:
            yield pair
