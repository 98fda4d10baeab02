"""Where the weights of a model lie: moving it to a device, and copies that copy no numbers."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunelight.models.sizes import parameter_bytes
from prunelight.runtime.devices import free_memory

log = logging.getLogger(__name__)


def to_device(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Move a model to a device, in place, and return it."""
    movable: Any = model  # transformers decorates `to`, which hides its type from type checkers
    return movable.to(device)


def device_with_room(model: PreTrainedModel, device: torch.device) -> torch.device:
    """Return `device` if it has memory for the model, else the model's present device."""
    if device.type == "cuda" and 1.2 * parameter_bytes(model) > free_memory(device):
        log.warning("the model does not fit on %s; it runs on the CPU instead", device)
        return model.device
    return device


def move_if_it_fits(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Move a model to a device that has memory for it, in place; return the model, moved or not."""
    return to_device(model, device_with_room(model, device))


def copy_without_values(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model on the meta device: modules, shapes and config, but no numbers."""
    return _copy_with(model, lambda tensor: tensor.to("meta"))


def copy_of_same_memory(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model whose weights lie where the model's lie.

    A weight that is replaced in one of both stays in the other; one that is written over does not.
    """
    return _copy_with(model, lambda tensor: tensor)


def _copy_with(model: PreTrainedModel, other: Callable[[Tensor], Tensor]) -> PreTrainedModel:
    """Return a copy of a model, its weights and buffers made of the model's own by `other`."""
    tensors: dict[int, Tensor] = {}
    for tensor in chain(model.parameters(), model.buffers()):
        replacement = other(tensor.detach())
        if isinstance(tensor, nn.Parameter):
            replacement = nn.Parameter(replacement, tensor.requires_grad)
        tensors[id(tensor)] = replacement
    copied: PreTrainedModel = copy.deepcopy(model, tensors)
    return copied
