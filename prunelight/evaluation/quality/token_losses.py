"""Losses of single tokens: the sums of each window, pooled over the processes of a measurement."""

# B windows of a batch, T tokens, V vocabulary

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import PreTrainedModel

from prunelight.calibration.shared_windows import own_windows
from prunelight.calibration.windows import Windows, micro_batches, next_token_labels
from prunelight.losses import IGNORED_LABEL

# Tokens of a micro-batch. Its logits (tokens, vocabulary) are the largest tensor of an evaluation.
EVALUATION_TOKENS = 1024
# Tokens whose logits are copied to float32 at a time.
CHUNK = 256


def labelled_batches(
    model: PreTrainedModel, windows: Windows, *, tokens: int, label: str
) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """Yield micro-batches of the windows of this process, with their labels.

    Args:
        model: that reads them.
        windows: (N, T), or a mapping of these, a mask and labels.
        tokens: of a micro-batch.
        label: of the progress bar.

    Yields:
        Keyword arguments of the model, and labels (B, T) on its device: IGNORED_LABEL where none
        counts.
    """
    labels, start = next_token_labels(own_windows(windows)), 0
    for batch in micro_batches(model, windows, tokens=tokens, label=label):
        rows = labels[start : start + len(batch["input_ids"])]
        start += len(rows)
        yield batch, rows.to(model.device)


def token_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the negative log-likelihood of each token, and whether it is the most likely one.

    Args:
        logits: (B, T, V); position t predicts target t.
        targets: (B, T - 1), IGNORED_LABEL where none counts: 0 and False there.

    Returns:
        (B, T - 1) in nats, float64 on the CPU; (B, T - 1) bool on the CPU.
    """
    nll, correct = [], []
    for part, target in chunks(logits, targets):
        losses = cross_entropy(part.float(), target, ignore_index=IGNORED_LABEL, reduction="none")
        nll.append(losses)
        correct.append(part.argmax(-1) == target)
    return of_windows(nll, targets).double(), of_windows(correct, targets)


def chunks(logits: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield logits (M, V) and their targets (M,), a few tokens at a time.

    The last position of each window comes too, with IGNORED_LABEL: to leave it out would copy all
    logits.
    """
    flat, padded = logits.flatten(0, 1), pad(targets, (0, 1), value=IGNORED_LABEL).flatten()
    yield from zip(flat.split(CHUNK), padded.split(CHUNK), strict=True)


def of_windows(parts: list[Tensor], targets: Tensor) -> Tensor:
    """Return what was found of the tokens of chunks, (..., M) each, as (..., B, T - 1)."""
    found = torch.cat(parts, dim=-1).cpu()
    return found.view(*found.shape[:-1], len(targets), -1)[..., :-1]
