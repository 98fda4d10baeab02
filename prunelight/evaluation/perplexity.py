"""Perplexity and next-token accuracy of a model in memory, over windows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from prunelight.calibration.shared_windows import group_of, own_windows
from prunelight.calibration.windows import Windows, micro_batches, next_token_labels, split_windows
from prunelight.losses import next_token_sums
from prunelight.models.forward import evaluating

# Logits are the largest tensor of an evaluation: (tokens, vocabulary) in the model's dtype.
_EVALUATION_TOKENS = 1024


@dataclass(frozen=True)
class Evaluation:
    """Quality on held-out windows: perplexity, next-token accuracy in [0, 1], predicted tokens."""

    perplexity: float
    accuracy: float
    tokens: int


def perplexity(model: PreTrainedModel, windows: Windows) -> float:
    """Return the token-weighted perplexity of windows (N, T), each predicted on its own.

    Raises:
        ValueError: if windows are not token ids.
    """
    return evaluate(model, windows).perplexity


def evaluate(model: PreTrainedModel, windows: Windows) -> Evaluation:
    """Evaluate a model on windows (N, T), or a mapping with attention_mask and labels beside them.

    Raises:
        ValueError: if windows are not token ids, or nothing is predicted.
    """
    ids, _ = split_windows(windows)
    labels = next_token_labels(own_windows(windows))
    sums, start = torch.zeros(3, dtype=torch.float64), 0
    with evaluating(model):
        for batch in micro_batches(model, windows, tokens=_EVALUATION_TOKENS, label="evaluation"):
            wanted = labels[start : start + len(batch["input_ids"])]
            start += len(wanted)
            sums += torch.stack(next_token_sums(model(**batch).logits, wanted)).double()
    nll, correct, tokens = group_of(windows).sum(sums)
    if tokens == 0:
        raise ValueError(
            f"windows of shape {tuple(ids.shape)} predict 0 tokens; each needs two tokens or more, "
            "and labels other than -100"
        )
    return Evaluation((nll / tokens).exp().item(), (correct / tokens).item(), int(tokens))
