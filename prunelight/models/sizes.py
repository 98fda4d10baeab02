"""Sizes of a model: parameters, bytes, and shares of zeros."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunelight.models.families.layers import matrices


def parameter_count(model: torch.nn.Module, *, trainable: bool = False) -> int:
    """Return the number of parameters, tied ones once; only the trainable ones if asked."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def parameter_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of all parameters, tied ones once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


@torch.no_grad()
def zero_share(parameters: Iterable[Tensor]) -> float:
    """Return the share of exact zeros among all weights, tied ones once, in [0, 1].

    0 without any, and where zeros cannot be seen: in packed 4-bit or 8-bit weights.
    """
    found = list({id(parameter): parameter for parameter in parameters}.values())
    if any(not p.is_floating_point() or p.element_size() == 1 or p.is_meta for p in found):
        return 0.0
    total = sum(parameter.numel() for parameter in found)
    filled = sum(int(torch.count_nonzero(parameter)) for parameter in found)
    return (total - filled) / total if total else 0.0


def linear_sparsity(model: PreTrainedModel) -> float:
    """Return the share of zeros in all `architecture.matrices`, in [0, 1].

    0 for a model in which none are found, or whose weights are quantized.
    """
    try:
        found = matrices(model)
    except TypeError:
        return 0.0
    return zero_share(matrix.parameter for matrix in found.values())


def stored_bytes(model: nn.Module) -> int:
    """Return the bytes of all weights with the scales of quantized ones, tied ones once."""
    tensors: dict[int, Tensor] = {t.data_ptr(): t for t in model.state_dict().values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
