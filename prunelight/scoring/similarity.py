"""How similar a model's variant is to the model itself, measured where its last layer ends.

Four criteria, all 1 for the model itself and lower for what differs more: cosine of the final
normed hidden states (SLM, arXiv:2502.19159), debiased linear CKA of them, exp(-KL) of the
next-token distributions, and exp(-(NLL - NLL of the model)), the ratio of perplexities. The first
two run no head, the others once for each measurement. Padding does not count. Where ranks share
the windows, each keeps what it needs of the model for its own rows, and sums are those of all.
"""

# B sequences, T tokens, D hidden, V vocabulary

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from prunelight.calibration.cka import CKA
from prunelight.calibration.layer_walk import LayerWalk
from prunelight.calibration.shared_windows import own_windows
from prunelight.calibration.statistics import MeanCosine
from prunelight.calibration.windows import split_windows
from prunelight.losses import IGNORED_LABEL, next_token_sums
from prunelight.runtime.arguments import check_choice

_HEAD_ROWS = 8192  # of the head's weight in float32 at a time

CRITERIA = ("cosine", "cka", "kl", "nll")

# Takes the states (B, T, D) after the last layer, one tensor a micro-batch.
Similarity: TypeAlias = Callable[[Sequence[Tensor]], float]


def similarity_to(
    walk: LayerWalk, states: Sequence[Tensor], criterion: str, *, ignore_first_tokens: int = 0
) -> Similarity:
    """Return a function that compares other states with those of the model.

    Args:
        walk: over the model and its calibration windows, entered.
        states: what the model's last layer puts out, (B, T, D) for each micro-batch.
        criterion: "cosine", "cka", "kl" or "nll".
        ignore_first_tokens: tokens at the start of each sequence that do not count.

    Raises:
        ValueError: if the criterion is unknown, no token counts, or the model's own states are
            constant ("cka").
    """
    check_choice("criterion", criterion, CRITERIA)
    counted = [mask.to(walk.model.device) for mask in walk.positions(ignore_first_tokens)]
    if not _total(walk, counted):
        raise ValueError(f"ignore_first_tokens={ignore_first_tokens} leaves no token to count")
    make = {"cosine": _cosine, "cka": _cka, "kl": _kl, "nll": _nll}[criterion]
    return make(walk, states, counted)


def _total(walk: LayerWalk, masks: Sequence[Tensor]) -> float:
    """Return how many tokens of all ranks are marked."""
    return walk.group.totals(sum(int(mask.sum()) for mask in masks))[0]


def _cosine(walk: LayerWalk, states: Sequence[Tensor], counted: Sequence[Tensor]) -> Similarity:
    ours = [walk.finish(state) for state in states]

    def measure(others: Sequence[Tensor]) -> float:
        mean = MeanCosine()
        for mine, other, mask in zip(ours, others, counted, strict=True):
            mean.update(mine, walk.finish(other), mask, None)
        return mean.pool(walk.group).result()

    return measure


def _cka(walk: LayerWalk, states: Sequence[Tensor], counted: Sequence[Tensor]) -> Similarity:
    ours = [walk.finish(state) for state in states]

    def cka_with(others: Iterable[Tensor]) -> float:
        cka = CKA(2)
        for mine, other, mask in zip(ours, others, counted, strict=True):
            cka.update((mine[mask], other[mask]))
        cka.pool(walk.group)
        return cka.result()[0, 1].item()

    cka_with(ours)  # raises if the model's own states are constant

    def measure(others: Sequence[Tensor]) -> float:
        try:
            return cka_with(map(walk.finish, others))
        except ValueError:  # the variant's states are constant or NaN
            return math.nan

    return measure


def _nll(walk: LayerWalk, states: Sequence[Tensor], counted: Sequence[Tensor]) -> Similarity:
    ids = split_windows(own_windows(walk.windows))[0].to(walk.model.device)
    # Position t predicts t + 1: both must count.
    keep = [pad(mask[:, :-1] & mask[:, 1:], (1, 0)) for mask in counted]
    labels = ids.masked_fill(~torch.cat(keep), IGNORED_LABEL).split([len(mask) for mask in keep])
    if not _total(walk, keep):
        raise ValueError(
            f"windows of shape {tuple(ids.shape)} predict 0 tokens that count; each needs two that "
            "are no padding and not ignored"
        )

    def mean_nll(others: Sequence[Tensor]) -> float:
        sums = [
            next_token_sums(logits, labels[batch][row : row + 1])
            for batch, row, logits in _logits(walk, others)
        ]
        nll, tokens = walk.group.totals(
            float(sum(nll for nll, _, _ in sums)), int(sum(tokens for *_, tokens in sums))
        )
        return nll / tokens

    own = mean_nll(states)
    return lambda others: math.exp(own - mean_nll(others))


def _kl(walk: LayerWalk, states: Sequence[Tensor], counted: Sequence[Tensor]) -> Similarity:
    """Compare the model's own next-token distributions p with a variant's q by -sum_v p_v log q_v.

    With logits z of the variant it is logsumexp(z) - sum_v p_v z_v. Where logits are W h + b times
    a constant, the sum is (sum_v p_v W_v) h + ...: a vector a token, kept from the start. Elsewhere
    (Gemma-2 caps its logits) p is computed anew, with a second application of the head.
    """
    head: Any = walk.model.get_output_embeddings()
    tokens, scale = _total(walk, counted), _logit_scale(walk, states[0][:1])
    kept: dict[tuple[int, int], tuple[Tensor, Tensor | float]] = {}
    for batch, row, logits in _logits(walk, states) if scale is not None else ():
        p = logits[0].float().softmax(-1)
        # In float32 by parts of the head: sum_v p_v W_v (T, D) and sum_v p_v b_v (T,).
        parts = zip(p.split(_HEAD_ROWS, -1), head.weight.split(_HEAD_ROWS), strict=True)
        embedding: Any = sum(part @ rows.float() for part, rows in parts)
        kept[batch, row] = embedding, 0.0 if head.bias is None else p @ head.bias.float()

    def expected(batch: int, row: int, state: Tensor, logits: Tensor) -> Tensor:
        """Return sum_v p_v z_v of each token of a sequence, (T,)."""
        if scale is None:
            ours = walk.finish(states[batch][row : row + 1], head=True)[0]
            return (ours.float().softmax(-1) * logits).sum(-1)
        embedding, offset = kept[batch, row]
        return scale * ((embedding * walk.finish(state[None])[0].float()).sum(-1) + offset)

    def mean(others: Sequence[Tensor]) -> float:
        total = 0.0
        for batch, row, z in _logits(walk, others):
            z = z[0].float()
            entropies = z.logsumexp(-1) - expected(batch, row, others[batch][row], z)
            total += entropies[counted[batch][row]].cpu().double().sum().item()
        return walk.group.totals(total)[0] / tokens

    own = mean(states)  # the entropy, by the same sums: the model itself is at exactly 1
    return lambda others: math.exp(own - mean(others))


def _logit_scale(walk: LayerWalk, state: Tensor) -> float | None:
    """Return c where logits = c (W h + b); None where they are something else."""
    head: Any = walk.model.get_output_embeddings()
    capped = getattr(walk.model.config, "final_logit_softcapping", None)
    if capped or not isinstance(head, torch.nn.Linear):
        return None
    plain, logits = head(walk.finish(state)).float(), walk.finish(state, head=True).float()
    scale = ((plain * logits).sum() / plain.square().sum()).item()
    rounding = 4 * torch.finfo(walk.model.dtype).eps
    near = (logits - scale * plain).abs().max() <= rounding * logits.abs().max()
    return scale if bool(near) else None


def _logits(walk: LayerWalk, states: Sequence[Tensor]) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (micro-batch, sequence in it, logits (1, T, V)): those of all do not fit in memory."""
    for batch, state in enumerate(states):
        for row in range(len(state)):
            yield batch, row, walk.finish(state[row : row + 1], head=True)
