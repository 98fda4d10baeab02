"""How far a model is from a reference in its next-token distributions, on the same windows.

KL(reference || model) of a token is the sum of p (ln p - ln q) + (q - p): the last part is 0 for
exact distributions, and takes away what rounding does to their sums. Logits are held for one
micro-batch of each model.
"""

# B windows of a batch, T tokens, V vocabulary, M tokens of a chunk

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunelight.calibration.shared_windows import group_of, share_windows
from prunelight.calibration.windows import check_readable
from prunelight.evaluation.quality.batch_logits import batch_logits
from prunelight.evaluation.quality.bootstrap import mean_interval, paired_difference
from prunelight.evaluation.quality.reference_memory import ReferenceMemory
from prunelight.evaluation.quality.results import Divergence, TextQuality
from prunelight.evaluation.quality.text_quality import quality_of
from prunelight.evaluation.quality.text_windows import TextWindows
from prunelight.evaluation.quality.token_losses import (
    EVALUATION_TOKENS,
    chunks,
    labelled_batches,
    of_windows,
)
from prunelight.losses import IGNORED_LABEL
from prunelight.models.families.config_fields import vocabulary_size
from prunelight.runtime.finite import check_is_model
from prunelight.runtime.processes import ProcessGroup

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)

# Rows of what is found of a token.
FOUND = ("kl", "same_top1", "nll", "reference_nll", "correct", "reference_correct")
_KL, _SAME_TOP1, _NLL, _REFERENCE_NLL, _CORRECT, _REFERENCE_CORRECT = range(len(FOUND))


def check_same_vocabulary(model_tokens: int, reference_tokens: int) -> None:
    """Check that two models give logits over as many tokens.

    Raises:
        ValueError: if they do not.
    """
    if model_tokens != reference_tokens:
        raise ValueError(
            f"the model gives logits of {model_tokens} tokens and its reference of "
            f"{reference_tokens}; a reference must have the same tokenizer: give the model that "
            "was pruned"
        )


@torch.no_grad()
def against_reference(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    text: TextWindows,
    *,
    batch_tokens: int = EVALUATION_TOKENS,
    group: ProcessGroup | None = None,
    memory: ReferenceMemory | None = None,
) -> tuple[TextQuality, TextQuality, Divergence]:
    """Measure a model and its reference on a text, and how far the model is from the reference.

    Args:
        model: in any mode and dtype; both are left as they are.
        reference: usually the dense model; with the same tokenizer.
        text: what `text_windows` gave.
        batch_tokens: tokens of a forward.
        group: processes that share the windows, each with the same models; None: this one alone.
        memory: of this reference, where it is asked for these texts again; None keeps nothing.

    Returns:
        Quality of the model, quality of the reference, divergence; the same on every process.

    Raises:
        ValueError: if a model cannot read the windows, or they have other vocabularies.
    """
    for each in (model, reference):
        check_is_model(each)
        check_readable(each, text.windows)
    check_same_vocabulary(vocabulary_size(model), vocabulary_size(reference))
    windows = share_windows(text.windows, group or ProcessGroup())
    memory = memory or ReferenceMemory(0)
    tokens: list[Tensor] = []  # of each window (6, T - 1); NaN where no token counts
    label, other = f"divergence on {text.text}", f"reference on {text.text}"
    with (
        batch_logits(model, windows, tokens=batch_tokens, label=label) as logits,
        batch_logits(reference, windows, tokens=batch_tokens, label=other) as reference_logits,
    ):
        batches = labelled_batches(model, windows, tokens=batch_tokens, label=label)
        for number, (batch, labels) in enumerate(batches):
            ours = logits(number, batch)
            theirs = memory.logits(text.text, number, partial(reference_logits, number, batch))
            tokens += compare_logits(ours, theirs.to(ours.device), labels[:, 1:]).unbind(1)
    tokens = [window for part in group_of(windows).gather(tokens) for window in part]
    found = torch.stack(tokens).numpy()  # (N, 6, T - 1)
    qualities = [
        quality_of(text, [*zip(*_window_sums(found, nll, correct), strict=True)])
        for nll, correct in ((_NLL, _CORRECT), (_REFERENCE_NLL, _REFERENCE_CORRECT))
    ]
    return qualities[0], qualities[1], divergence_of(found)


def compare_logits(logits: Tensor, reference_logits: Tensor, targets: Tensor) -> Tensor:
    """Return what is found of each token of a batch.

    Args:
        logits: (B, T, V) of the model, in any floating-point dtype.
        reference_logits: the same of the reference.
        targets: (B, T - 1), IGNORED_LABEL where none counts.

    Returns:
        (6, B, T - 1), float64 on the CPU: KL, same top-1, negative log-likelihood of model and of
        reference, top-1 right of model and of reference; NaN where no token counts.
    """
    parts = []
    pairs = zip(chunks(logits, targets), chunks(reference_logits, targets), strict=True)
    for (ours, target), (theirs, _) in pairs:
        parts.append(compare_tokens(ours.float(), theirs.float().log_softmax(-1), target))
    return of_windows(parts, targets).double()


def compare_tokens(logits: Tensor, log_p: Tensor, target: Tensor) -> Tensor:
    """Return the same of a few tokens, (6, M) float32.

    Args:
        logits: (M, V) of the model, float32.
        log_p: (M, V), log-probabilities of the reference, float32.
        target: (M,), IGNORED_LABEL where none counts.
    """
    log_q = logits.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    # A token that the reference rules out adds q alone; 0 times infinity would be NaN.
    ratio = torch.where(p > 0, log_p - log_q, 0.0)
    kl = (p * ratio + (q - p)).sum(-1).clamp_min(0.0)
    counted = target != IGNORED_LABEL
    index = target.where(counted, 0)[:, None]
    top_q, top_p = log_q.argmax(-1), log_p.argmax(-1)
    rows = [
        kl,
        (top_q == top_p).float(),
        -log_q.gather(1, index)[:, 0],
        -log_p.gather(1, index)[:, 0],
        (top_q == target).float(),
        (top_p == target).float(),
    ]
    return torch.stack(rows).masked_fill(~counted, math.nan)


def divergence_of(found: np.ndarray) -> Divergence:
    """Return the divergence from what was found of each token.

    Args:
        found: (N, 6, P) as `compare_logits` gives it for N windows; same top-1 is NaN where no
            token counts. Other figures are NaN for a model of NaN logits, and so is the result.
    """
    counted = ~np.isnan(found[:, _SAME_TOP1])  # (N, P)
    counts = counted.sum(axis=1)
    sums = np.where(counted[:, None], found, 0.0).sum(axis=2).T  # (6, N)
    kl = found[:, _KL][counted]
    change = np.exp(-found[:, _NLL][counted]) - np.exp(-found[:, _REFERENCE_NLL][counted])
    percentiles = np.percentile(change, PERCENTILES)
    return Divergence(
        kl=mean_interval(sums[_KL], counts),
        kl_median=float(np.median(kl)),
        kl_p99=float(np.percentile(kl, 99)),
        kl_by_position=by_position(found[:, _KL], counted),
        same_top1=mean_interval(sums[_SAME_TOP1], counts),
        right_token_change=float(change.mean()),
        right_token_change_rms=float(np.sqrt(np.square(change).mean())),
        right_token_change_percentiles={
            str(name): float(value) for name, value in zip(PERCENTILES, percentiles, strict=True)
        },
        ln_perplexity_ratio=paired_difference(sums[_NLL], sums[_REFERENCE_NLL], counts),
        tokens=int(counts.sum()),
        window_kl=sums[_KL].tolist(),
        window_same_top1=sums[_SAME_TOP1].astype(int).tolist(),
    )


def by_position(kl: np.ndarray, counted: np.ndarray) -> list[tuple[int, float]]:
    """Return the mean KL of ranges of positions that double: 1, 2 to 3, 4 to 7, ...

    A position is the number of tokens that the model has read.

    Args:
        kl: (N, P) of each window and position.
        counted: (N, P), which of them count.

    Returns:
        First position of each range, and the mean there; ranges without a token are left out.
    """
    ranges, first = [], 1
    while first <= kl.shape[1]:
        columns = slice(first - 1, 2 * first - 1)
        part = kl[:, columns][counted[:, columns]]
        if len(part):
            ranges.append((first, float(part.mean())))
        first *= 2
    return ranges


def _window_sums(
    found: np.ndarray, nll: int, correct: int
) -> tuple[Sequence[float], Sequence[int], Sequence[int]]:
    """Return negative log-likelihood, tokens and correct predictions of each window."""
    counted = ~np.isnan(found[:, _SAME_TOP1])
    sums = np.where(counted[:, None], found, 0.0).sum(axis=2)
    return (
        sums[:, nll].tolist(),
        counted.sum(axis=1).tolist(),
        sums[:, correct].astype(int).tolist(),
    )
