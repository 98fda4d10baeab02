"""Moving a model to a device that has memory for it."""

from __future__ import annotations

import logging
from typing import Any

import torch
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
