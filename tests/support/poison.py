"""Models with one number that is none: in each of their tensors in turn, NaN, inf or -inf."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

FAULTS = {"NaN": float("nan"), "inf": float("inf"), "-inf": float("-inf")}


def places(model: nn.Module) -> list[tuple[str, str]]:
    """Every tensor that a model is saved with, and a fault for it: the three take turns."""
    names = [*dict(model.named_parameters()), *_saved_buffers(model)]
    return [(name, [*FAULTS][number % 3]) for number, name in enumerate(names)]


def _saved_buffers(model: nn.Module) -> Iterator[str]:
    parameters = {*dict(model.named_parameters(remove_duplicate=False))}
    for name, value in model.state_dict().items():
        if name not in parameters and value.is_floating_point():
            yield name


def poison(model: nn.Module, name: str, fault: str) -> None:
    """Put one number that is none at the end of a tensor, in place."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        tensors[name].view(-1)[-1] = FAULTS[fault]


def poison_file(file: Path, name: str, fault: str, metadata: dict[str, str] | None = None) -> None:
    """Put one number that is none at the end of a tensor in a safetensors file, in place."""
    tensors = load_file(file)
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[-1] = FAULTS[fault]
    save_file(tensors, file, metadata=metadata or {"format": "pt"})
