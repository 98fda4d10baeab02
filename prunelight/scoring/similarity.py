"""Similarity of a variant to its model, measured after the last decoder layer.

There are five criteria. Each is 1 for the model itself, and lower for a variant that differs more:
    cosine       cosine similarity of the final normed hidden states, mean over tokens
    cosine_flat  the same of each sequence's states as one vector, mean over sequences, as the
                 released code of SLM has it (arXiv:2502.19159): tokens of larger norm count more
    cka          debiased linear CKA of the final normed hidden states
    kl           exp(-KL) of the next-token distributions
    nll          exp(-(NLL of the variant - NLL of the model)), the ratio of perplexities
The first three run no head, the last two run it once for each measurement. Padding does not count.
Where ranks share the windows, each rank keeps the model's states of its own rows; sums cover all.
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

_HEAD_ROWS = 8192  # rows of the head's weight that are copied to float32 at a time

CRITERIA = ("cosine", "cka", "kl", "nll", "cosine_flat")

# Takes a variant's states (B, T, D) after its last layer, one tensor a micro-batch.
Similarity: TypeAlias = Callable[[Sequence[Tensor]], float]


def similarity_to(
    walk: LayerWalk, states: Sequence[Tensor], criterion: str, *, ignore_first_tokens: int = 0
) -> Similarity:
    """Return a function that compares a variant's states with the model's states.

    Args:
        walk: entered, over the model and its calibration windows.
        states: outputs of the model's last layer, (B, T, D) for each micro-batch.
        criterion: one of `CRITERIA`.
        ignore_first_tokens: tokens at the start of each sequence that do not count.

    Raises:
        ValueError: if the criterion is unknown, no token counts, or the model's own states are
            constant ("cka").
    """
    check_choice("criterion", criterion, CRITERIA)
    counted = [mask.to(walk.device) for mask in walk.positions(ignore_first_tokens)]
    if not _total(walk, counted):
        raise ValueError(f"ignore_first_tokens={ignore_first_tokens} leaves no token to count")
    make = {
        "cosine": _cosine,
        "cosine_flat": _cosine_flat,
        "cka": _cka,
        "kl": _kl,
        "nll": _nll,
    }[criterion]
    return make(walk, states, counted)


def divergence_of(similarity: float) -> float:
    """Return the KL in nats of a similarity by "kl"; inf where it could not be measured."""
    return -math.log(similarity) if similarity > 0 else math.inf


def _total(walk: LayerWalk, masks: Sequence[Tensor]) -> float:
    """Return the number of tokens, over all ranks, for which the masks are True."""
    return walk.group.totals(sum(int(mask.sum()) for mask in masks))[0]


def _cosine(walk: LayerWalk, states: Sequence[Tensor], counted: Sequence[Tensor]) -> Similarity:
    model_states = [walk.finish(state) for state in states]

    def measure(variant_states: Sequence[Tensor]) -> float:
        mean_cosine = MeanCosine()
        for x, state, mask in zip(model_states, variant_states, counted, strict=True):
            mean_cosine.update(x, walk.finish(state), mask, None)
        return mean_cosine.pool(walk.group).result()

    return measure


def _cosine_flat(
    walk: LayerWalk, states: Sequence[Tensor], counted: Sequence[Tensor]
) -> Similarity:
    model_states = [walk.finish(state) for state in states]

    def products(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        """Return the inner product of each sequence's states that count, float64 (B,)."""
        return ((x.float() * y.float()).sum(-1) * mask).double().sum(-1)

    def measure(variant_states: Sequence[Tensor]) -> float:
        total, sequences = 0.0, 0
        for x, state, mask in zip(model_states, variant_states, counted, strict=True):
            y, of_some = walk.finish(state), mask.any(-1)
            norms = (products(x, x, mask) * products(y, y, mask)).sqrt()
            # A variant whose states are all zero is not similar to anything.
            cosines = products(x, y, mask) / norms.clamp_min(torch.finfo(torch.float64).tiny)
            total += cosines[of_some].sum().item()
            sequences += int(of_some.sum())
        total, count = walk.group.totals(total, sequences)
        return total / count

    return measure


def _cka(walk: LayerWalk, states: Sequence[Tensor], counted: Sequence[Tensor]) -> Similarity:
    model_states = [walk.finish(state) for state in states]

    def cka_with(normed_states: Iterable[Tensor]) -> float:
        cka = CKA(2)
        for x, y, mask in zip(model_states, normed_states, counted, strict=True):
            cka.update((x[mask], y[mask]))
        cka.pool(walk.group)
        return cka.result()[0, 1].item()

    cka_with(model_states)  # raises if the model's own states are constant

    def measure(variant_states: Sequence[Tensor]) -> float:
        try:
            return cka_with(map(walk.finish, variant_states))
        except ValueError:  # the variant's states are constant or NaN
            return math.nan

    return measure


def _nll(walk: LayerWalk, states: Sequence[Tensor], counted: Sequence[Tensor]) -> Similarity:
    ids = split_windows(own_windows(walk.windows))[0].to(walk.device)
    # Position t predicts token t + 1: both must count.
    predicted = [pad(mask[:, :-1] & mask[:, 1:], (1, 0)) for mask in counted]
    labels = ids.masked_fill(~torch.cat(predicted), IGNORED_LABEL)
    labels_of = labels.split([len(mask) for mask in predicted])  # of each micro-batch
    if not _total(walk, predicted):
        raise ValueError(
            f"windows of shape {tuple(ids.shape)} predict 0 tokens that count; each needs two that "
            "are no padding and not ignored"
        )

    def mean_nll(last_states: Sequence[Tensor]) -> float:
        sums = [
            next_token_sums(logits, labels_of[batch][row : row + 1])
            for batch, row, logits in _logits(walk, last_states)
        ]
        nll, tokens = walk.group.totals(
            float(sum(nll for nll, _, _ in sums)), int(sum(tokens for *_, tokens in sums))
        )
        return nll / tokens

    model_nll = mean_nll(states)
    return lambda variant_states: math.exp(model_nll - mean_nll(variant_states))


def _kl(walk: LayerWalk, states: Sequence[Tensor], counted: Sequence[Tensor]) -> Similarity:
    """Compare the model's next-token distributions p with a variant's q by their cross-entropy.

    For the variant's logits z, -sum_v p_v log q_v = logsumexp(z) - sum_v p_v z_v. Where logits are
    c (W h + b) for a constant c, sum_v p_v z_v = c ((sum_v p_v W_v) h + sum_v p_v b_v). Then the
    vector sum_v p_v W_v and the number sum_v p_v b_v are kept for each token. Elsewhere (Gemma 2
    caps its logits) each measurement computes p again, with a second run of the head.
    """
    head: Any = walk.model.get_output_embeddings()
    num_tokens, scale = _total(walk, counted), _logit_scale(walk, states[0][:1])
    # By micro-batch and sequence: sum_v p_v W_v (T, D) and sum_v p_v b_v (T,).
    expectations: dict[tuple[int, int], tuple[Tensor, Tensor | float]] = {}
    for batch, row, logits in _logits(walk, states) if scale is not None else ():
        p = logits[0].float().softmax(-1)
        # A part of the head's rows at a time: a float32 copy of all of them may not fit in memory.
        parts = zip(p.split(_HEAD_ROWS, -1), head.weight.split(_HEAD_ROWS), strict=True)
        embedding: Any = sum(part @ rows.float() for part, rows in parts)
        offset = 0.0 if head.bias is None else p @ head.bias.float()
        expectations[batch, row] = embedding, offset

    def expected_logit(batch: int, row: int, state: Tensor, logits: Tensor) -> Tensor:
        """Return sum_v p_v z_v of each token of a sequence, (T,)."""
        if scale is None:
            model_logits = walk.finish(states[batch][row : row + 1], head=True)[0]
            return (model_logits.float().softmax(-1) * logits).sum(-1)
        embedding, offset = expectations[batch, row]
        return scale * ((embedding * walk.finish(state[None])[0].float()).sum(-1) + offset)

    def cross_entropy(last_states: Sequence[Tensor]) -> float:
        total = 0.0
        for batch, row, z in _logits(walk, last_states):
            z = z[0].float()
            entropies = z.logsumexp(-1) - expected_logit(batch, row, last_states[batch][row], z)
            total += entropies[counted[batch][row]].cpu().double().sum().item()
        return walk.group.totals(total)[0] / num_tokens

    entropy = cross_entropy(states)  # by the same sums, so that the model itself is at exactly 1
    return lambda variant_states: math.exp(entropy - cross_entropy(variant_states))


def _logit_scale(walk: LayerWalk, state: Tensor) -> float | None:
    """Return c where logits = c (W h + b); None where logits are computed in another way."""
    head: Any = walk.model.get_output_embeddings()
    capped = getattr(walk.model.config, "final_logit_softcapping", None)
    if capped or not isinstance(head, torch.nn.Linear):
        return None
    unscaled, logits = head(walk.finish(state)).float(), walk.finish(state, head=True).float()
    scale = ((unscaled * logits).sum() / unscaled.square().sum()).item()
    rounding = 4 * torch.finfo(walk.model.dtype).eps
    is_scaled = (logits - scale * unscaled).abs().max() <= rounding * logits.abs().max()
    return scale if bool(is_scaled) else None


def _logits(walk: LayerWalk, states: Sequence[Tensor]) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (micro-batch, sequence in it, logits (1, T, V)); all logits would not fit in memory."""
    for batch, state in enumerate(states):
        for row in range(len(state)):
            yield batch, row, walk.finish(state[row : row + 1], head=True)
