"""Calibration windows: checks, micro-batches, and the tokens in them that count."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunelight.calibration.shared_windows import MICRO_BATCH_TOKENS, group_of, own_windows
from prunelight.losses import IGNORED_LABEL
from prunelight.models.families.config_fields import vocabulary_size
from prunelight.models.sizes import longest_sequence
from prunelight.runtime.progress import show_progress

# Token ids (N, T), or a mapping of input_ids (N, T) and attention_mask (N, T) with 0 on padding.
Windows: TypeAlias = Tensor | Mapping[str, Tensor]


def split_windows(windows: Windows) -> tuple[Tensor, Tensor | None]:
    """Return (input_ids (N, T), attention_mask (N, T)); the mask is None without padding.

    Raises:
        ValueError: if the ids are not whole numbers of shape (N, T), or the mask has another shape
            or other numbers than 0 and 1.
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
    if mask is not None and not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(
            f"attention_mask holds {mask[(mask != 0) & (mask != 1)][0].item()}; it must be 1 on "
            "tokens and 0 on padding"
        )
    return ids, None if mask is None or bool(mask.all()) else mask


def check_windows(model: PreTrainedModel, windows: Windows) -> None:
    """Check that the model can read the windows.

    Raises:
        ValueError: if windows are longer than the model allows, or a token id or label is none of
            the model's.
    """
    check_length(model, split_windows(windows)[0].shape[1])
    _check_ids(model, windows)


def check_ignored(windows: Windows, ignore_first_tokens: int) -> None:
    """Check that tokens are left where the first ones of each window do not count.

    Raises:
        ValueError: if the windows are not longer than `ignore_first_tokens`.
    """
    length = split_windows(windows)[0].shape[1]
    if ignore_first_tokens >= length:
        raise ValueError(
            f"ignore_first_tokens={ignore_first_tokens} must be below {length}, the tokens of a "
            "calibration window; ignore fewer, or raise seq_len"
        )


def check_readable(model: PreTrainedModel, windows: Windows) -> None:
    """Check that no forward of the windows fails.

    Models with rotary positions read windows longer than they allow, and lose quality by it.

    Raises:
        ValueError: if windows are longer than learned positions, or a token id or label is none
            of the model's.
    """
    if getattr(model.config, "rope_parameters", None) is None:
        check_length(model, split_windows(windows)[0].shape[1])
    _check_ids(model, windows)


def _check_ids(model: PreTrainedModel, windows: Windows) -> None:
    ids, _ = split_windows(windows)
    size = vocabulary_size(model)
    worst = int(ids.max()) if int(ids.min()) >= 0 else int(ids.min())
    if not 0 <= worst < size:
        raise ValueError(
            f"token id {worst} must lie in [0, {size - 1}], the model's vocabulary; use the "
            "model's own tokenizer"
        )
    labels = windows.get("labels") if isinstance(windows, Mapping) else None
    if labels is None:
        return
    counted = labels[labels != IGNORED_LABEL]
    outside = counted[(counted < 0) | (counted >= size)]
    if len(outside):
        raise ValueError(
            f"label {int(outside[0])} must lie in [0, {size - 1}], the model's vocabulary, or be "
            f"{IGNORED_LABEL} where no token is predicted"
        )


def check_length(model: PreTrainedModel, seq_len: int, *, name: str = "seq_len") -> None:
    """Check that the model allows sequences of `seq_len` tokens; `name` is what a user calls them.

    Raises:
        ValueError: if `seq_len` is longer than the model allows.
    """
    limit = longest_sequence(model)
    if limit is not None and seq_len > limit:
        raise ValueError(f"{name}={seq_len} must be at most {limit}, which the model allows")


def micro_batches(
    model: PreTrainedModel, windows: Windows, *, tokens: int = MICRO_BATCH_TOKENS, label: str = ""
) -> Iterator[dict[str, Any]]:
    """Yield keyword arguments of the model for micro-batches of `tokens` tokens, on its device.

    Of shared windows only this rank's rows are yielded, so sums over micro-batches must be pooled.
    A progress bar named `label` is shown.
    """
    ids, mask = split_windows(own_windows(windows))
    size = max(1, tokens // ids.shape[1])
    starts = range(0, ids.shape[0], size)
    quiet = not label or group_of(windows).rank > 0
    for start in show_progress(starts, label, unit="batches", quiet=quiet):
        batch = {"input_ids": ids[start : start + size].to(model.device)}
        if mask is not None:
            batch["attention_mask"] = mask[start : start + size].to(model.device)
        yield batch


def counted_tokens(windows: Windows) -> int:
    """Return how many tokens of all ranks' windows are no padding; every rank must call it."""
    ids, mask = split_windows(own_windows(windows))
    tokens = ids.numel() if mask is None else int(mask.sum())
    return int(group_of(windows).totals(tokens)[0])


def first_positions(mask: Tensor | None) -> Tensor | None:
    """Return which tokens are the first of their sequence, bool (B, T).

    None, for a mask that is None, means the tokens of column 0.
    """
    return None if mask is None else (mask.cumsum(dim=1) == 1) & mask.bool()


def counted_positions(mask: Tensor | None, shape: torch.Size, ignore_first: int) -> Tensor | None:
    """Return which tokens count, bool (B, T); None, if all count.

    Padding does not count, nor do the first `ignore_first` tokens of a sequence.
    """
    if mask is None and ignore_first == 0:
        return None
    mask = torch.ones(shape, dtype=torch.bool) if mask is None else mask.bool()
    return mask & (mask.cumsum(dim=1) > ignore_first)


def next_token_labels(windows: Windows) -> Tensor:
    """Return the labels (N, T) of windows; windows without labels predict all their real tokens.

    Those labels are the ids, with -100 on padding and, in windows with padding, on first tokens.
    """
    ids, mask = split_windows(windows)
    if isinstance(windows, Mapping) and windows.get("labels") is not None:
        return windows["labels"]
    if mask is None:
        return ids
    # A left padding token must not predict the first token of its sequence.
    predicted = mask.bool() & (mask.cumsum(dim=1) > 1)
    return ids.masked_fill(~predicted, IGNORED_LABEL)


def last_positions(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return (rows, columns) of the last real token of each sequence; all padding is left out."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids))
    positions = torch.arange(ids.shape[1], device=ids.device)
    rows = mask.any(dim=1).nonzero().squeeze(1)
    return rows, (mask * positions).argmax(dim=1)[rows]


def first_windows(windows: Windows, count: int) -> Windows:
    """Return the first `count` windows, with all their fields."""
    if isinstance(windows, torch.Tensor):
        return windows[:count]
    return {name: value[:count] for name, value in windows.items()}
