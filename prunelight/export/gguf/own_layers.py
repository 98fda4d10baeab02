"""Layers that differ, of Llama and Mistral, in llama.cpp's architecture deci.

Its keys hold a number of heads, key-value heads and neurons for each layer. A layer without
attention has no heads. A layer without neurons would lose its attention there too, so a dropped MLP
becomes a few neurons with weights of zero, which compute the same: nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from prunelight.export.gguf.families import GgufFamily, Keys
from prunelight.models.families.own_classes.layer_widths import widths_of_layer
from prunelight.models.families.own_classes.registration import PREFIX

DECI_FAMILIES = ("llama", "mistral")
DECI = GgufFamily("DECI", permutes=True)
ZERO_NEURONS = 32  # a block of q8_0


def is_uneven(config: PretrainedConfig) -> bool:
    """Return whether the layers of a model differ in their sublayers or widths."""
    return config.model_type.startswith(PREFIX)


def deci_keys(config: Any) -> Keys:
    """Return the keys with one number a layer."""
    heads, groups, neurons = [], [], []
    attention = getattr(config, "drop_attention", None) or [False] * config.num_hidden_layers
    mlp = getattr(config, "drop_mlp", None) or [False] * config.num_hidden_layers
    for layer in range(config.num_hidden_layers):
        widths = widths_of_layer(config, layer)
        dropped = attention[layer]
        heads.append(
            0 if dropped else widths.get("num_attention_heads", config.num_attention_heads)
        )
        groups.append(
            0 if dropped else widths.get("num_key_value_heads", config.num_key_value_heads)
        )
        width = widths.get("intermediate_size", config.intermediate_size)
        neurons.append(ZERO_NEURONS if mlp[layer] else width)
    return {"head_count": heads, "head_count_kv": groups, "feed_forward_length": neurons}


def with_zero_neurons(config: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights with neurons of zero where an MLP was dropped."""
    width = config.hidden_size
    added: dict[str, Tensor] = {}
    for layer, dropped in enumerate(getattr(config, "drop_mlp", None) or []):
        if not dropped:
            continue
        before = f"model.layers.{layer}"
        added[f"{before}.post_attention_layernorm.weight"] = torch.ones(width)
        for name in ("gate_proj", "up_proj"):
            added[f"{before}.mlp.{name}.weight"] = torch.zeros(ZERO_NEURONS, width)
        added[f"{before}.mlp.down_proj.weight"] = torch.zeros(width, ZERO_NEURONS)
    return {**weights, **added}
