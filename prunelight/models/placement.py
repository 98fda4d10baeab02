"""Where the weights of a model lie and where they compute; copies that copy no numbers.

A model that fits on no device as a whole stays where it is, and its layers compute on the device
one at a time: `compute_device` says where. Weights that `load` read lie in the mapped files, so
that a layer takes memory only while it is used.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunelight.models.families.layers import decoder_layers
from prunelight.models.sizes import is_quantized, parameter_bytes
from prunelight.runtime.devices import free_memory

log = logging.getLogger(__name__)

# Attribute of a model whose layers compute one at a time: the device on which they do.
_STREAMED_ON = "_prunelight_streamed_on"


def to_device(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Move a model to a device, in place, and return it."""
    vars(model).pop(_STREAMED_ON, None)
    movable: Any = model  # transformers decorates `to`, which hides its type from type checkers
    return movable.to(device)


def how_computed(model: PreTrainedModel, device: torch.device | None = None) -> dict[str, str]:
    """Return what numbers depend on beside the weights: dtype, kind of device and attention.

    Args:
        model: that computes.
        device: where; None takes `compute_device` of the model.
    """
    return {
        "dtype": str(model.dtype),
        "device": (device or compute_device(model)).type,
        "attention": str(getattr(model.config, "_attn_implementation", None)),
    }


def with_index(device: torch.device) -> torch.device:
    """Return a device with its number, as tensors there name it: cuda:0 for cuda, but cpu."""
    return device if device.type == "cpu" else torch.empty(0, device=device).device


def has_room(model: PreTrainedModel, device: torch.device) -> bool:
    """Return whether a device has memory for a model and a fifth more; only GPUs are asked."""
    if device.type != "cuda" or model.device == with_index(device):
        return True
    return 1.2 * parameter_bytes(model) <= free_memory(device)


def device_for(model: PreTrainedModel, device: torch.device) -> torch.device:
    """Return where a model will compute that `move_if_it_fits` moves to `device`."""
    return device if has_room(model, device) or _can_stream(model) else model.device


def move_if_it_fits(
    model: PreTrainedModel, device: torch.device, *, offload: bool = False
) -> PreTrainedModel:
    """Move a model to a device that has memory for it, in place; return the model, moved or not.

    A model that does not fit is streamed: it stays where it is, and computes on the device with one
    layer there at a time. Only gradients of all layers are computed where the model is.

    Args:
        model: the model.
        device: where it should compute.
        offload: stream the model even if it fits.
    """
    device = with_index(device)
    fits = has_room(model, device)
    if offload and (device == model.device or not _can_stream(model)):
        why = "the model is there" if device == model.device else "its layers cannot go there alone"
        log.warning("offload=True has no effect with device=%s: %s", device, why)
        offload = False
    if fits and not offload:
        return to_device(model, device)
    if not _can_stream(model):
        log.warning("the model does not fit on %s; it runs on %s instead", device, model.device)
        return model
    if not offload:
        log.warning(
            "the model (%.1f GB) does not fit on %s (%.1f GB free): its layers go there one at a "
            "time",
            parameter_bytes(model) / 1e9,
            device,
            free_memory(device) / 1e9,
        )
    setattr(model, _STREAMED_ON, device)
    return model


def place_like(model: PreTrainedModel, other: PreTrainedModel) -> PreTrainedModel:
    """Move a model, in place, to where another one is; stream it where that one is streamed."""
    if is_streamed(other):
        return move_if_it_fits(model, compute_device(other), offload=True)
    return to_device(model, other.device)


def _can_stream(model: PreTrainedModel) -> bool:
    """Return whether layers of a model can go to a device alone: packed weights cannot."""
    try:
        return not is_quantized(model) and len(decoder_layers(model)) > 0
    except TypeError:
        return False


def is_streamed(model: PreTrainedModel) -> bool:
    """Return whether the layers of a model compute one at a time, see `move_if_it_fits`."""
    return _STREAMED_ON in vars(model)


def compute_device(model: PreTrainedModel) -> torch.device:
    """Return where the layers of a model compute: on its own device, unless it is streamed."""
    device: torch.device = vars(model).get(_STREAMED_ON, model.device)
    return device


@contextmanager
def streaming(model: PreTrainedModel) -> Iterator[None]:
    """Let each forward of a streamed model compute on its device, one layer there at a time.

    Nothing changes for any other model.
    """
    if not is_streamed(model):
        yield
        return
    device = compute_device(model)
    with rest_on_device(model, device), layers_arriving(model, device):
        yield


@contextmanager
def rest_on_device(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """Keep all of a model but its decoder layers on a device: embeddings, last norm, head."""
    if device == model.device:
        yield
        return
    inside = {*decoder_layers(model).modules()}
    with on_device([module for module in model.modules() if module not in inside], device):
        yield


@contextmanager
def layers_arriving(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """Bring each decoder layer to a device when it is called, and back after its forward."""

    def arriving(layer: nn.Module) -> Callable[..., Any]:
        own = layer.forward

        @wraps(own)  # its arguments are asked for by name
        def forward(*args: Any, **kwargs: Any) -> Any:
            with on_device(layer.modules(), device):
                return own(*args, **kwargs)

        return forward

    layers = decoder_layers(model)
    if all(tensor.device == device for tensor in layers.parameters()):
        yield
        return
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(replaced_forward(layer, arriving(layer)))
        yield


@contextmanager
def replaced_forward(
    module: nn.Module, forward: Callable[..., Any]
) -> Iterator[Callable[..., Any]]:
    """Replace the forward of a module; yield the original forward, and restore it on exit."""
    original = module.forward
    on_instance = vars(module).get("forward")  # accelerate sets a forward on the instance
    module.forward = forward
    try:
        yield original
    finally:
        del module.forward
        if on_instance is not None:
            module.forward = on_instance


@contextmanager
def on_device(modules: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Keep the weights and buffers that modules hold themselves on a device; back on exit.

    A weight that did not change gets its old memory back, so that nothing is copied and mapped
    files stay mapped. One that was replaced or written over is copied to where it was.

    Args:
        modules: `layer.modules()` for all of a layer.
        device: where they are inside.
    """
    modules = [*modules]
    elsewhere = [tensor for _, _, tensor in _tensors_in(modules) if tensor.device != device]
    if not elsewhere:
        yield
        return
    home_device = elsewhere[0].device
    homes = [Home(tensor) for tensor in dict.fromkeys(elsewhere)]
    known = {id(tensor) for _, _, tensor in _tensors_in(modules)}
    try:
        for home in homes:
            home.leave(home.data.to(device))
        yield
    finally:
        for home in homes:
            home.take_back()
        for _, _, tensor in _tensors_in(modules):
            if id(tensor) not in known and tensor.device == device:  # it replaced another
                assign_memory(tensor, tensor.data.to(home_device))


class Home:
    """The memory of a weight or buffer, while its numbers are in other memory."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.data = tensor, tensor.data
        self._before = self._now()

    def leave(self, data: Tensor) -> None:
        """Give the tensor other memory, in place."""
        assign_memory(self.tensor, data)
        self._before = self._now()

    @property
    def changed(self) -> bool:
        """Return whether the tensor was written over, or got other memory, since it left."""
        return self._now() != self._before

    def take_back(self) -> None:
        """Give the tensor its old memory back if its numbers are the same, else a copy of them."""
        numbers = self.tensor.data.to(self.data.device) if self.changed else self.data
        assign_memory(self.tensor, numbers)

    def _now(self) -> tuple[int, int]:
        """Return what changes when the tensor is written over, and when it gets other memory."""
        return self.tensor._version, self.tensor.untyped_storage()._cdata


def _tensors_in(modules: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Yield owner, name and tensor of each weight and buffer of modules."""
    for module in modules:
        named = chain(
            module.named_parameters(recurse=False, remove_duplicate=False),
            module.named_buffers(recurse=False, remove_duplicate=False),
        )
        yield from ((module, name, tensor) for name, tensor in named)


def assign_memory(tensor: Tensor, data: Tensor) -> None:
    """Give a tensor, which keeps its identity, other memory, as `nn.Module.to` does, in place."""
    if not torch.__future__.get_swap_module_params_on_conversion():
        tensor.data = data
        return
    parameter = isinstance(tensor, nn.Parameter)
    other = nn.Parameter(data, tensor.requires_grad) if parameter else data
    torch.utils.swap_tensors(tensor, other)


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
