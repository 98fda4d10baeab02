"""Tiny models whose layers differ in the size of their weights."""

import torch
from tiny import tiny_model
from transformers import PreTrainedModel

from prunelight.models.families.layers import decoder_layers


def uneven_model(family: str = "llama", **changes: object) -> PreTrainedModel:
    """A model whose layers differ, so that their shares do too."""
    model = tiny_model(family, **changes)
    with torch.no_grad():
        for factor, layer in zip((4, 1, 6, 0.5, 5, 2), decoder_layers(model), strict=True):
            for parameter in layer.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(factor)
    return model
