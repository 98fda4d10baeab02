"""What pruning and a recovery keep in memory on each device, told before a weight is read.

The model is built of fake tensors: torch runs its forward in training mode on shapes and types
alone, and autograd says what it keeps until the backward. So no family needs a formula. What
kernels and allocator take for a moment is not counted.
"""

# B sequences of a batch, T tokens of each, D hidden size

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import chain
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from prunelight.losses import chunk_size
from prunelight.models.families.config_fields import vocabulary_size
from prunelight.models.families.layers import decoder_layers
from prunelight.models.families.matrices import Matrix
from prunelight.models.forward import hidden_states_argument
from prunelight.models.loading import resolve_dtype
from prunelight.models.placement import copy_without_values
from prunelight.models.sizes import parameter_count, tensor_bytes
from prunelight.pruning.abilities import unloaded_model
from prunelight.recovery.distillation.language_head import LanguageHead, without_adapters
from prunelight.recovery.lora import LoRA, make_trainable
from prunelight.recovery.prepared_model import RecoverySettings
from prunelight.recovery.quantization import (
    FOUR_BIT,
    BitsAndBytes,
    check_combination,
    quantized_matrices,
)
from prunelight.runtime.arguments import at_least, check_choice, check_fields

STRATEGIES = ("ddp", "fsdp2")
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


def recovery_memory(
    outline: PreTrainedModel,
    settings: RecoverySettings,
    batch: Batch,
    dtype: torch.dtype,
    device: torch.device = torch.device("cuda"),  # noqa: B008 (immutable)
) -> RecoveryMemory:
    """Return what a recovery keeps in memory on each device; no weight is read or made.

    Args:
        outline: the model without weights, on the meta device; it stays as it is.
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
    saved, states = _forward(trained, layers, batch)
    vocabulary = vocabulary_size(model)
    chunk = chunk_size(batch.batch_size * batch.seq_len, vocabulary, device)
    loss = 2 * states.nbytes + _CHUNK_COPIES * 4 * chunk * vocabulary + head_gradient
    buckets = gradients if batch.devices > 1 and shards == 1 else 0
    return RecoveryMemory(
        weights // shards,
        (gradients + buckets) // shards,
        2 * gradients // shards,
        gathered,
        saved.total(checkpointing=settings.gradient_checkpointing),
        loss,
    )


def _forward(
    trained: PreTrainedModel | PeftModel, layers: Iterable[nn.Module], batch: Batch
) -> tuple[_SavedForBackward, Tensor]:
    """Return what a forward of a model on meta would keep, and the input of its head, (B, T, D)."""
    config = without_adapters(trained).config
    with FakeTensorMode(), _no_tracebacks():
        _give_fakes(trained)
        saved = _SavedForBackward(trained, str(config._attn_implementation), batch.seq_len)
        ids = torch.zeros(batch.batch_size, batch.seq_len, dtype=torch.long)
        try:
            with saved.watching([*layers]):
                states = LanguageHead(trained).hidden_states({"input_ids": ids, "use_cache": False})
        except (RuntimeError, NotImplementedError) as error:
            raise TypeError(
                f"what {config.model_type} keeps for its backward cannot be told from shapes and "
                f"types alone: {str(error).splitlines()[0]}"
            ) from error
    return saved, states


@contextmanager
def _no_tracebacks() -> Iterator[None]:
    """Keep torch from logging the traceback of a fake kernel that fails; its error says enough."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _give_fakes(model: nn.Module) -> None:
    """Put fake tensors of the CPU in place of all weights and buffers, which are on meta."""
    fakes: dict[int, Tensor] = {}
    for module in model.modules():
        tensors: Any
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in fakes:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    trained = isinstance(tensor, nn.Parameter)
                    fakes[id(tensor)] = (
                        nn.Parameter(fake, tensor.requires_grad) if trained else fake
                    )
                if tensor is not None:
                    tensors[name] = fakes[id(tensor)]


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


class _SavedForBackward:
    """The memory that autograd keeps of a forward, by the decoder layer that was computing.

    Attributes:
        by_layer: layer -> bytes; None for what is kept outside of all layers.
        inputs: layer -> bytes of its hidden states.
    """

    def __init__(self, model: nn.Module, attention: str, seq_len: int) -> None:
        self.by_layer: Counter[int | None] = Counter()
        self.inputs: dict[int, int] = {}
        self._layer: int | None = None
        self._seq_len = seq_len
        # Masks and weights of T x T: the kernels of a GPU hold none of them.
        self._fused = attention != "eager"
        # Held, so that no other memory gets the address of one that is counted.
        self._known = [t.untyped_storage() for t in chain(model.parameters(), model.buffers())]
        self._addresses = {storage._cdata for storage in self._known}

    @contextmanager
    def watching(self, layers: Sequence[nn.Module]) -> Iterator[None]:
        """Count what forwards inside keep."""
        with ExitStack() as stack:
            for index, layer in enumerate(layers):
                enter = partial(self._enter, index)
                stack.enter_context(layer.register_forward_pre_hook(enter, with_kwargs=True))
                stack.enter_context(layer.register_forward_hook(self._leave))
            stack.enter_context(saved_tensors_hooks(self._count, lambda tensor: tensor))
            yield

    def _enter(self, index: int, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        states = args[0] if args else kwargs[hidden_states_argument(layer)]
        self._layer, self.inputs[index] = index, states.nbytes

    def _leave(self, *_: object) -> None:
        self._layer = None

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        square = tensor.shape[-2:] == (self._seq_len, self._seq_len)
        if storage._cdata not in self._addresses and not (square and self._fused):
            self._known.append(storage)
            self._addresses.add(storage._cdata)
            self.by_layer[self._layer] += storage.nbytes()
        return tensor

    def total(self, *, checkpointing: bool) -> int:
        """Return the bytes that are kept; with checkpointing one layer's, and all inputs."""
        if not checkpointing:
            return self.by_layer.total()
        within = [count for layer, count in self.by_layer.items() if layer is not None]
        return self.by_layer[None] + sum(self.inputs.values()) + max(within, default=0)
