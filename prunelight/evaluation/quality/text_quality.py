"""Perplexity and accuracy of a model on a text, window by window, with a bootstrap interval."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from prunelight.calibration.shared_windows import group_of, share_windows
from prunelight.calibration.windows import check_readable
from prunelight.evaluation.quality.batch_logits import batch_logits
from prunelight.evaluation.quality.bootstrap import perplexity_interval
from prunelight.evaluation.quality.results import TextQuality
from prunelight.evaluation.quality.text_windows import TextWindows
from prunelight.evaluation.quality.token_losses import (
    EVALUATION_TOKENS,
    labelled_batches,
    token_losses,
)
from prunelight.losses import IGNORED_LABEL
from prunelight.runtime.finite import check_is_model
from prunelight.runtime.processes import ProcessGroup


@torch.no_grad()
def text_quality(
    model: PreTrainedModel,
    text: TextWindows,
    *,
    batch_tokens: int = EVALUATION_TOKENS,
    group: ProcessGroup | None = None,
) -> TextQuality:
    """Measure a model on a text.

    Args:
        model: in any mode and dtype; both are left as they are.
        text: what `text_windows` gave.
        batch_tokens: tokens of a forward.
        group: processes that share the windows, each with the same model; None for this one alone.

    Returns:
        The same on every process.

    Raises:
        ValueError: if the model cannot read the windows.
    """
    check_is_model(model)
    check_readable(model, text.windows)
    windows = share_windows(text.windows, group or ProcessGroup())
    rows: list[tuple[float, int, int]] = []
    label = f"perplexity of {text.text}"
    with batch_logits(model, windows, tokens=batch_tokens, label=label) as logits:
        batches = labelled_batches(model, windows, tokens=batch_tokens, label=label)
        for number, (batch, labels) in enumerate(batches):
            targets = labels[:, 1:]
            nll, correct = token_losses(logits(number, batch), targets)
            counted = (targets != IGNORED_LABEL).sum(1)
            sums = (nll.sum(1).tolist(), counted.tolist(), correct.sum(1).tolist())
            rows += zip(*sums, strict=True)
    rows = [row for part in group_of(windows).gather(rows) for row in part]
    return quality_of(text, rows)


def quality_of(text: TextWindows, rows: list[tuple[float, int, int]]) -> TextQuality:
    """Return the quality on a text from the sums of each window.

    Args:
        text: that was measured.
        rows: negative log-likelihood, tokens and correct predictions of each window, in order.
    """
    nll, tokens, correct = ([*column] for column in zip(*rows, strict=True))
    return TextQuality(
        text=text.text,
        protocol=text.protocol,
        seq_len=text.seq_len,
        perplexity=perplexity_interval(nll, tokens),
        accuracy=sum(correct) / sum(tokens),
        tokens=sum(tokens),
        window_nll=nll,
        window_tokens=tokens,
        window_correct=correct,
    )
