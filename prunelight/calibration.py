"""Feeding calibration windows through a model: micro-batches, modes, and hooks on decoder layers.

Each layer is seen with the very hidden states it gets from the model, so positions, masks and layer
types need no rebuilding, and the state after the last layer is the raw one, not transformers'
`hidden_states[-1]`, which is after the final norm. Layer by layer: see walk.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from prunelight.architecture import (
    decoder_layers,
    first_tensor,
    maximum_length,
    restore_rwkv_scale,
    vocabulary_size,
)
from prunelight.shares import MICRO_BATCH_TOKENS, own_windows, ranks_of
from prunelight.windows import IGNORED_LABEL

# Token ids (N, T), or those with an attention_mask of the same shape (0 = padding).
Windows: TypeAlias = Tensor | Mapping[str, Tensor]
# Called as visit(layer index, input (B, T, D), output (B, T, D)).
Visit: TypeAlias = Callable[[int, Tensor, Tensor], None]

# Config fields that make a model give more than hidden states and logits.
_SIDE_OUTPUTS = ("use_cache", "output_router_logits")


def split_windows(windows: Windows) -> tuple[Tensor, Tensor | None]:
    """Return (input_ids (N, T), attention_mask (N, T) or None where nothing is padding).

    Raises:
        ValueError: if windows are not two-dimensional whole numbers, or the mask does not fit.
    """
    ids, mask = (
        (windows, None)
        if isinstance(windows, Tensor)
        else (windows["input_ids"], windows.get("attention_mask"))
    )
    if ids.ndim != 2 or ids.is_floating_point() or ids.numel() == 0:
        raise ValueError(
            f"windows of shape {tuple(ids.shape)} and type {ids.dtype} must be token ids of shape "
            "(num_samples, seq_len); see prunelight.calibration_windows"
        )
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask of shape {tuple(mask.shape)} must have the shape of input_ids, "
            f"{tuple(ids.shape)}"
        )
    return ids, None if mask is None or bool(mask.all()) else mask


def check_windows(model: PreTrainedModel, windows: Windows) -> None:
    """Check that the model can read the windows.

    Raises:
        ValueError: if they are longer than the model allows or hold ids that it does not have.
    """
    ids, _ = split_windows(windows)
    check_length(model, ids.shape[1])
    rows = vocabulary_size(model)
    worst = int(ids.max()) if int(ids.min()) >= 0 else int(ids.min())
    if not 0 <= worst < rows:
        raise ValueError(
            f"token id {worst} must lie in [0, {rows - 1}], the model's vocabulary; use the "
            "model's own tokenizer"
        )


def check_length(model: PreTrainedModel, seq_len: int) -> None:
    """Check that the model allows sequences of `seq_len` tokens.

    Raises:
        ValueError: if it does not.
    """
    limit = maximum_length(model.config)
    if limit is not None and seq_len > limit:
        raise ValueError(f"seq_len={seq_len} must be at most {limit}, which the model allows")


def micro_batches(
    model: PreTrainedModel, windows: Windows, *, tokens: int = MICRO_BATCH_TOKENS, label: str = ""
) -> Iterator[dict[str, Any]]:
    """Yield keyword arguments for the model: `tokens` tokens a time, on the model's device.

    Of shared windows those of this rank: what is summed over micro-batches must be pooled. Shows a
    progress bar named `label` on a terminal.
    """
    ids, mask = split_windows(own_windows(windows))
    size = max(1, tokens // ids.shape[1])
    starts = range(0, ids.shape[0], size)
    quiet = not label or ranks_of(windows).rank > 0
    for start in tqdm(starts, desc=label, disable=quiet or None, leave=False):
        batch = {"input_ids": ids[start : start + size].to(model.device)}
        if mask is not None:
            batch["attention_mask"] = mask[start : start + size].to(model.device)
        yield batch


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Put the model in eval mode, without gradients, cache and router losses; undo all on exit."""
    training = {module: module.training for module in model.modules()}
    names = [name for name in _SIDE_OUTPUTS if hasattr(model.config, name)]
    settings = {name: getattr(model.config, name) for name in names}
    try:
        model.eval()
        for name in settings:
            setattr(model.config, name, False)
        with torch.no_grad():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for name, value in settings.items():
            setattr(model.config, name, value)
        restore_rwkv_scale(model)


@contextmanager
def watching_layers(model: PreTrainedModel, visit: Visit) -> Iterator[None]:
    """Call `visit` with the input and output of every decoder layer of each forward."""
    handles = [
        layer.register_forward_hook(_hook(index, layer, visit), with_kwargs=True)
        for index, layer in enumerate(decoder_layers(model))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replaced_forward(
    module: nn.Module, forward: Callable[..., Any]
) -> Iterator[Callable[..., Any]]:
    """Let a module compute something else; yields its own forward, and puts it back on exit."""
    own, instance = module.forward, vars(module).get("forward")  # accelerate puts one there
    module.forward = forward
    try:
        yield own
    finally:
        del module.forward
        if instance is not None:
            module.forward = instance


def hidden_name(layer: nn.Module) -> str:
    """Return the name of the argument by which a decoder layer takes its hidden states."""
    return next(iter(inspect.signature(layer.forward).parameters))


def _hook(index: int, layer: nn.Module, visit: Visit) -> Callable[..., None]:
    name = hidden_name(layer)

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        visit(index, args[0] if args else kwargs[name], first_tensor(output))

    return hook


def run_layers(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> None:
    """Run the model up to its last decoder layer's consumer, without the language-model head."""
    model.base_model(**batch)


def first_positions(mask: Tensor | None) -> Tensor | None:
    """Return which tokens are the first of their sequence, bool (B, T); None means column 0."""
    return None if mask is None else (mask.cumsum(dim=1) == 1) & mask.bool()


def counted_positions(mask: Tensor | None, shape: torch.Size, ignore_first: int) -> Tensor | None:
    """Return which tokens count: no padding, not the first `ignore_first`; None counts all."""
    if mask is None and ignore_first == 0:
        return None
    mask = torch.ones(shape, dtype=torch.bool) if mask is None else mask.bool()
    return mask & (mask.cumsum(dim=1) > ignore_first)


def next_token_labels(windows: Windows) -> Tensor:
    """Return the labels (N, T); without any, the ids themselves, padding left out."""
    ids, mask = split_windows(windows)
    if isinstance(windows, Mapping) and windows.get("labels") is not None:
        return windows["labels"]
    if mask is None:
        return ids
    # Left padding must not predict the first token of its sequence: only from the second on.
    second_on = mask.bool() & (mask.cumsum(dim=1) > 1)
    return ids.masked_fill(~second_on, IGNORED_LABEL)
