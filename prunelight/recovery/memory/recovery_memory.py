"""What a recovery keeps in memory on each device, told before it begins.

Weights, gradients and the optimizer are counted, activations are told by `saved_tensors.py`. What
kernels and allocator take for a moment is not counted.
"""

# B sequences of a batch, T tokens of each, D hidden size

from __future__ import annotations

import logging
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunelight.losses import chunk_size
from prunelight.models.families.config_fields import vocabulary_size
from prunelight.models.families.layers import decoder_layers
from prunelight.models.families.matrices import Matrix
from prunelight.models.placement import copy_without_values
from prunelight.models.sizes import parameter_count, tensor_bytes
from prunelight.recovery.distillation.language_head import without_adapters
from prunelight.recovery.lora import make_trainable
from prunelight.recovery.memory.saved_tensors import saved_by_forward
from prunelight.recovery.prepared_model import RecoverySettings
from prunelight.recovery.quantization import (
    FOUR_BIT,
    check_combination,
    quantized_matrices,
)
from prunelight.runtime.arguments import at_least, check_choice, check_fields

log = logging.getLogger(__name__)

STRATEGIES = ("ddp", "fsdp2")
_USABLE = 0.9  # of the memory that is free: kernels and the allocator take some
_FAR_MORE = 64  # bytes a number that is kept, or a weight: four times what training takes
_CHUNK_COPIES = 5  # of a chunk's logits in float32, see losses.py
_GATHERED_LAYERS = 2  # FSDP2 holds the layer that computes, and gathers the next
# Bytes of a weight in 4 bits: the scale of each 64 weights in float32, or in 8 bits with a float32
# for each 256 scales (QLoRA, arXiv:2305.14314, Section 3).
_SINGLE, _DOUBLE = 0.5 + 4 / 64, 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class Batch:
    """What a device computes at once, and with how many others.

    Attributes:
        batch_size: windows of a micro-batch on each device.
        seq_len: tokens of a window.
        devices: number of devices.
        strategy: "ddp" (each holds the model) or "fsdp2" (each holds a part of it).

    Raises:
        ValueError: if a value is out of range.
    """

    batch_size: int = 1
    seq_len: int = 2048
    devices: int = 1
    strategy: str = "ddp"

    def __post_init__(self) -> None:
        """Check the values."""
        check_fields(self, batch_size=at_least(1), seq_len=at_least(2), devices=at_least(1))
        check_choice("strategy", self.strategy, STRATEGIES)

    @property
    def shards(self) -> int:
        """Return into how many parts weights are cut."""
        return self.devices if self.strategy == "fsdp2" else 1


@dataclass(frozen=True)
class RecoveryMemory:
    """Bytes on each device while a model is recovered.

    Attributes:
        weights: all weights and buffers, adapters too.
        gradients: of the weights that are trained; under DDP also its buckets.
        optimizer: AdamW's two states of each.
        gathered: what FSDP2 holds whole: embeddings, head and two decoder layers.
        activations: what the forward keeps until the backward.
        loss: the hidden states before the head and their gradient, and a chunk's logits.
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    loss: int

    @property
    def total(self) -> int:
        """Return the bytes of all parts: gradients and activations are at once if steps add up."""
        return sum(getattr(self, part.name) for part in fields(self))


def needs_checkpointing(
    model: PreTrainedModel,
    settings: RecoverySettings,
    batch: Batch,
    device: torch.device,
    free: int,
) -> bool:
    """Return whether activations must be computed again for a recovery to fit on a device.

    Where it is not told by the settings, checkpointing is worth a third more time only if memory
    lacks without it. A warning says so where memory lacks even with it.

    Args:
        model: before it is prepared; it stays as it is.
        settings: of the recovery.
        batch: its size on the device, and the devices.
        device: which computes.
        free: bytes that are free on it, the model's own weights not yet there.
    """
    if settings.recovery == "none" or not model.supports_gradient_checkpointing:
        return False
    try:
        if _surely_fits(model, batch, free):
            return False
        off, on = (replace(settings, gradient_checkpointing=x) for x in (False, True))
        without = recovery_memory(model, off, batch, model.dtype, device).total
        if without <= _USABLE * free:
            return False
        with_it = recovery_memory(model, on, batch, model.dtype, device).total
    except Exception as error:  # an estimate ends no run; what is wrong is told where it is used
        log.info("%s; set model.gradient_checkpointing if memory runs short", error)
        return False
    log.warning(
        "gradient checkpointing is on: the recovery needs about %.1f GB on %s without it and "
        "%.1f GB with it, and %.1f GB are free; model.gradient_checkpointing=false turns it off%s",
        without / 1e9,
        device,
        with_it / 1e9,
        free / 1e9,
        "" if with_it <= _USABLE * free else "; even so memory may run short: lower batch_size",
    )
    return True


def _surely_fits(model: PreTrainedModel, batch: Batch, free: int) -> bool:
    """Return whether far more than any recovery takes is free, so that nobody need count."""
    tokens = batch.batch_size * batch.seq_len
    layers = decoder_layers(model)
    activations = sum(max(p.shape) for p in layers.parameters() if p.ndim) * tokens * _FAR_MORE
    square = len(layers) * batch.seq_len * tokens * _FAR_MORE  # of attention, however many heads
    logits = vocabulary_size(model) * tokens * _FAR_MORE
    return _FAR_MORE * parameter_count(model) + activations + square + logits < free


def recovery_memory(
    outline: PreTrainedModel,
    settings: RecoverySettings,
    batch: Batch,
    dtype: torch.dtype,
    device: torch.device = torch.device("cuda"),  # noqa: B008 (immutable)
) -> RecoveryMemory:
    """Return what a recovery keeps in memory on each device; no weight is read or made.

    Args:
        outline: the model, on the meta device or with weights; it stays as it is.
        settings: recovery, adapters, quantization and gradient checkpointing.
        batch: its size on a device, and the devices.
        dtype: of the weights.
        device: which computes; the loss takes smaller chunks on a CPU.

    Raises:
        ValueError: if nothing is trained, settings exclude each other, or LoRA's targets fit no
            module.
        TypeError: if the forward depends on more than shapes and types.
    """
    check_choice("recovery", settings.recovery, ("lora", "full"))
    check_combination(settings.quantization, settings.bitsandbytes, settings.recovery)
    model = copy_without_values(outline)
    nn.Module.to(model, dtype)
    layers = decoder_layers(model)
    quantized = {id(m.parameter) for m in _quantized(model, settings)}
    trained = make_trainable(model, settings.recovery, settings.lora).train()
    sizes = {id(p): _stored(p, settings, id(p) in quantized) for p in trained.parameters()}
    weights = sum(sizes.values()) + tensor_bytes(trained.buffers())
    by_layer = [sum(sizes[id(p)] for p in layer.parameters()) for layer in layers]
    gradients = tensor_bytes(p for p in trained.parameters() if p.requires_grad)
    head = without_adapters(trained).get_output_embeddings()
    head_gradient = 4 * head.weight.numel() if head.weight.requires_grad else 0
    shards = batch.shards
    gathered = weights - sum(by_layer) + _GATHERED_LAYERS * max(by_layer) if shards > 1 else 0
    saved, states = saved_by_forward(trained, layers, batch.batch_size, batch.seq_len)
    vocabulary = vocabulary_size(model)
    chunk = chunk_size(batch.batch_size * batch.seq_len, vocabulary, device)
    loss = 2 * states.nbytes + _CHUNK_COPIES * 4 * chunk * vocabulary + head_gradient
    buckets = gradients if batch.devices > 1 and shards == 1 else 0
    return RecoveryMemory(
        weights // shards,
        (gradients + buckets) // shards,
        2 * gradients // shards,
        gathered,
        saved.total(checkpointing=bool(settings.gradient_checkpointing)),
        loss,
    )


def _quantized(model: PreTrainedModel, settings: RecoverySettings) -> list[Matrix]:
    return [] if settings.quantization == "none" else quantized_matrices(model)


def _stored(weight: Tensor, settings: RecoverySettings, quantized: bool) -> int:
    """Return the bytes of a weight, in fewer bits if it is quantized."""
    if not quantized:
        return weight.nbytes
    if settings.quantization in FOUR_BIT:
        share = _DOUBLE if settings.bitsandbytes.use_double_quant else _SINGLE
        return round(weight.numel() * share)
    return weight.numel() + 4 * len(weight)  # a float32 for each row
