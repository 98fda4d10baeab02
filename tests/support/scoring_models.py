"""Models whose scores differ from layer to layer, padded windows, and what a hook leaves behind."""

import torch
from tiny import tiny_model

from prunelight.models.families.layers import decoder_layers


def lively_model(family="llama", **changes):
    """A tiny model whose layers change the hidden states much more than at initialisation."""
    model = tiny_model(family, **changes)
    with torch.no_grad():
        for name, parameter in decoder_layers(model).named_parameters():
            if parameter.ndim >= 2 and "A_log" not in name:
                parameter.mul_(4)
    return model


def padded(windows, *, left=False, padding=4):
    """Return windows with padding on one side, and the mask that says so."""
    fill = torch.zeros(windows.shape[0], padding, dtype=torch.long)
    parts = [(fill, fill), (windows, torch.ones_like(windows))]
    ids, mask = (torch.cat(p, dim=1) for p in zip(*(parts if left else parts[::-1]), strict=True))
    return {"input_ids": ids, "attention_mask": mask}


def hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    return [len(getattr(module, kind)) for module in model.modules() for kind in kinds]
