"""What pruning and a recovery of a model keep in memory on each device, by its config alone."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from transformers import PreTrainedModel

from prunelight.models.families.layers import decoder_layers
from prunelight.models.loading import resolve_dtype
from prunelight.models.sizes import parameter_count
from prunelight.pruning.abilities import unloaded_model
from prunelight.recovery.lora import LoRA
from prunelight.recovery.memory.recovery_memory import Batch, recovery_memory
from prunelight.recovery.prepared_model import RecoverySettings
from prunelight.recovery.quantization import BitsAndBytes


def estimate(
    model: str,
    *,
    recovery: str = "lora",
    lora: LoRA = LoRA(),  # noqa: B008 (frozen)
    quantization: str = "none",
    bitsandbytes: BitsAndBytes = BitsAndBytes(),  # noqa: B008 (frozen)
    gradient_checkpointing: bool = False,
    batch_size: int = 1,
    seq_len: int = 2048,
    devices: int = 1,
    strategy: str = "ddp",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> dict[str, int]:
    """Return the bytes that pruning and a recovery keep on each device; only a config is read.

    Args:
        model: hub id, directory, GGUF file, bundled name or model type.
        recovery: lora or full.
        lora: settings of the adapters.
        quantization: bits of the weights under adapters: nf4, fp4, int8 or none.
        bitsandbytes: settings of the quantization.
        gradient_checkpointing: compute activations again in the backward.
        batch_size: windows of a micro-batch on each device.
        seq_len: tokens of a window.
        devices: number of devices.
        strategy: ddp, where each device holds the model, or fsdp2, where each holds a part.
        dtype: of the weights: auto, float32, bfloat16 or float16.
        trust_remote_code: run Python code that comes with the model; only of authors whom you
            trust.

    Returns:
        "whole" and "streamed" of `pruning_memory`, the parts of `RecoveryMemory`, and "total", the
        sum of these parts.

    Raises:
        ValueError: if there is no such model, or a setting is wrong.
        TypeError: if the forward depends on more than shapes and types.
    """
    settings = RecoverySettings(
        recovery=recovery,
        lora=lora,
        gradient_checkpointing=gradient_checkpointing,
        quantization=quantization,
        bitsandbytes=bitsandbytes,
    )
    batch = Batch(batch_size, seq_len, devices, strategy)
    asked = resolve_dtype(dtype)
    outline = unloaded_model(model, trust_remote_code=trust_remote_code)
    stored: Any = asked if asked != "auto" else outline.config.dtype or torch.float32
    memory = recovery_memory(outline, settings, batch, stored)
    return {**pruning_memory(outline, stored), **asdict(memory), "total": memory.total}


def pruning_memory(outline: PreTrainedModel, dtype: torch.dtype) -> dict[str, int]:
    """Return the bytes of a model's weights on a device while it is scored or pruned.

    Args:
        outline: the model without weights, on the meta device.
        dtype: of the weights.

    Returns:
        "whole" and, for a model that is streamed, "streamed": all but the decoder layers, and the
        largest of these. Hidden states and a solver's matrices come on top.
    """
    whole = parameter_count(outline)
    layers = [parameter_count(layer) for layer in decoder_layers(outline)]
    streamed = whole - sum(layers) + max(layers)
    return {"whole": whole * dtype.itemsize, "streamed": streamed * dtype.itemsize}
