"""Layers that differ, as vLLM's DeciLM says it: `block_configs`, and heads of zeros.

DeciLM has one number of query heads for all layers, and a layer's key-value heads divide it. So a
layer with fewer heads gets heads whose weights are zero, which compute the same: nothing. MLPs have
any width. An attention or an MLP may be missing, but not the attention of the first layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

from prunelight.models.families.config_fields import head_dim
from prunelight.models.families.own_classes.layer_widths import widths_of_layer

# D hidden, H query heads, K key-value heads, G query heads of a group, d width of a head


@dataclass(frozen=True)
class LayerShape:
    """What one decoder layer has.

    Attributes:
        heads: query heads; 0 for a layer without attention.
        key_value_heads: which divides `heads`; 0 for a layer without attention.
        neurons: of the MLP; 0 for a layer without.
    """

    heads: int
    key_value_heads: int
    neurons: int

    @property
    def group(self) -> int:
        """Query heads that share a key-value head."""
        return self.heads // self.key_value_heads


def layer_shapes(config: Any) -> list[LayerShape]:
    """Return what each layer of a model has, of a class of our own or of transformers."""
    layers = range(config.num_hidden_layers)
    without = {
        name: getattr(config, f"drop_{name}", None) or [False] * len(layers)
        for name in ("attention", "mlp")
    }
    shapes = []
    for layer in layers:
        widths = widths_of_layer(config, layer)
        heads, groups, neurons = (
            widths.get(name, getattr(config, name))
            for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size")
        )
        if without["attention"][layer]:
            heads = groups = 0
        shapes.append(LayerShape(heads, groups, 0 if without["mlp"][layer] else neurons))
    return shapes


def filled_shapes(shapes: Sequence[LayerShape]) -> list[LayerShape]:
    """Return the shapes with as many heads as DeciLM needs: the same number in each layer.

    It is the smallest number for which each layer finds key-value heads that divide it. A layer
    gets as few key-value heads as possible, for they cost memory in the cache.
    """
    attentions = [shape for shape in shapes if shape.heads]
    for heads in count(max(shape.heads for shape in attentions)):
        groups = [_key_value_heads(shape, heads) for shape in attentions]
        if all(groups):
            break
    filled = iter(groups)
    return [
        LayerShape(heads, next(filled), shape.neurons) if shape.heads else shape for shape in shapes
    ]


def _key_value_heads(shape: LayerShape, heads: int) -> int:
    """Return the fewest key-value heads that hold a layer among so many query heads; 0 for none."""
    return next(
        (k for k in range(shape.key_value_heads, heads // shape.group + 1) if heads % k == 0), 0
    )


def block_configs(shapes: Sequence[LayerShape]) -> list[dict[str, dict[str, Any]]]:
    """Return the settings of each layer as vLLM reads them."""
    return [
        {
            "attention": {
                "no_op": not shape.heads,
                "n_heads_in_group": shape.group if shape.heads else None,
            },
            "ffn": {"no_op": not shape.neurons, "intermediate_size": shape.neurons or None},
        }
        for shape in shapes
    ]


def filled_weights(config: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights with heads of zeros where a layer has fewer than DeciLM needs.

    Args:
        config: of the source.
        weights: by their names in the source; the names of `model.layers.I.self_attn` are Llama's.
    """
    shapes, width = layer_shapes(config), head_dim(config)
    filled = dict(weights)
    for layer, (old, new) in enumerate(zip(shapes, filled_shapes(shapes), strict=True)):
        if old == new:
            continue
        before = f"model.layers.{layer}.self_attn"
        for name in ("q_proj", "k_proj", "v_proj"):
            grouped = name == "q_proj"
            for kind in ("weight", "bias"):
                if (weight := weights.get(f"{before}.{name}.{kind}")) is not None:
                    filled[f"{before}.{name}.{kind}"] = _filled(weight, old, new, width, grouped)
        output = weights[f"{before}.o_proj.weight"].T
        filled[f"{before}.o_proj.weight"] = _filled(output, old, new, width, True).T.contiguous()
    return filled


def _filled(weight: Tensor, old: LayerShape, new: LayerShape, width: int, grouped: bool) -> Tensor:
    """Return a weight whose rows are heads, with more of them.

    Args:
        weight: (heads * d, ...); heads are H in K groups if `grouped`, K otherwise.
        old: of the layer.
        new: of the layer in DeciLM.
        width: d.
        grouped: whether the heads are query heads.
    """
    rest = weight.shape[1:]
    sizes = [
        (shape.key_value_heads, shape.group if grouped else 1, width, *rest) for shape in (old, new)
    ]
    filled = torch.zeros(sizes[1], dtype=weight.dtype)
    filled[: sizes[0][0], : sizes[0][1]] = weight.reshape(sizes[0])
    return filled.reshape(-1, *rest)
