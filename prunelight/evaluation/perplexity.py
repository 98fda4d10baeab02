"""Perplexity and next-token accuracy of a model in memory, over windows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from prunelight.calibration.shared_windows import group_of
from prunelight.calibration.windows import Windows, check_readable, split_windows
from prunelight.evaluation.quality.batch_logits import batch_logits
from prunelight.evaluation.quality.token_losses import EVALUATION_TOKENS, labelled_batches
from prunelight.losses import next_token_sums
from prunelight.runtime.finite import check_is_model


@dataclass(frozen=True)
class Evaluation:
    """Quality on windows: perplexity, next-token accuracy in [0, 1], number of predicted tokens."""

    perplexity: float
    accuracy: float
    tokens: int


def perplexity(model: PreTrainedModel, windows: Windows) -> float:
    """Return the token-weighted perplexity of windows (N, T); no window sees another one.

    Raises:
        ValueError: if windows are not token ids, or the model cannot read them.
    """
    return evaluate(model, windows).perplexity


def evaluate(model: PreTrainedModel, windows: Windows) -> Evaluation:
    """Evaluate a model on windows (N, T).

    Args:
        model: in any mode and dtype.
        windows: token ids (N, T), or a mapping of input_ids and, where needed, attention_mask and
            labels of the same shape.

    Raises:
        ValueError: if windows are not token ids, the model cannot read them, or nothing is
            predicted.
    """
    check_is_model(model)
    ids, _ = split_windows(windows)
    check_readable(model, windows)
    sums = torch.zeros(3, dtype=torch.float64)
    size, label = EVALUATION_TOKENS, "evaluation"
    with batch_logits(model, windows, tokens=size, label=label) as logits:
        batches = labelled_batches(model, windows, tokens=size, label=label)
        for number, (batch, labels) in enumerate(batches):
            sums += torch.stack(next_token_sums(logits(number, batch), labels)).double()
    nll, correct, tokens = group_of(windows).sum(sums)
    if tokens == 0:
        raise ValueError(
            f"windows of shape {tuple(ids.shape)} predict 0 tokens; each needs two tokens or more, "
            "and labels other than -100"
        )
    return Evaluation((nll / tokens).exp().item(), (correct / tokens).item(), int(tokens))
