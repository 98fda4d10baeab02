"""How similar a model's variant is to the model itself, measured where its last layer ends.

Four criteria, all 1 for the model itself and lower for what differs more: cosine of the final
normed hidden states (SLM, arXiv:2502.19159), debiased linear CKA of them, exp(-KL) of the
next-token distributions, and exp(-(NLL - NLL of the model)), the ratio of perplexities. The first
two run no head, the others once for each measurement. Padding does not count.
"""

# B sequences, T tokens, D hidden, V vocabulary

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from prunelight.calibration import counted_positions, split_windows
from prunelight.metrics import next_token_sums
from prunelight.statistics import CKA, MeanCosine
from prunelight.walk import LayerWalk
from prunelight.windows import IGNORED_LABEL

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
        ValueError: if the criterion is unknown, or no token counts.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion={criterion!r} must be one of {', '.join(CRITERIA)}")
    masks = [
        counted_positions(mask, state.shape[:2], ignore_first_tokens)
        for state, mask in zip(states, walk.masks, strict=True)
    ]
    counted = [
        torch.ones(state.shape[:2], dtype=torch.bool) if mask is None else mask
        for state, mask in zip(states, masks, strict=True)
    ]
    if sum(int(mask.sum()) for mask in counted) == 0:
        raise ValueError(f"ignore_first_tokens={ignore_first_tokens} leaves no token to count")
    counted = [mask.to(walk.model.device) for mask in counted]
    make = {"cosine": _cosine, "cka": _cka, "kl": _kl, "nll": _nll}[criterion]
    return make(walk, states, counted)


def _cosine(walk: LayerWalk, states: Sequence[Tensor], counted: Sequence[Tensor]) -> Similarity:
    ours = [walk.finish(state) for state in states]

    def measure(others: Sequence[Tensor]) -> float:
        mean = MeanCosine()
        for mine, other, mask in zip(ours, others, counted, strict=True):
            mean.update(mine, walk.finish(other), mask, None)
        return mean.result()

    return measure


def _cka(walk: LayerWalk, states: Sequence[Tensor], counted: Sequence[Tensor]) -> Similarity:
    ours = [walk.finish(state) for state in states]

    def measure(others: Sequence[Tensor]) -> float:
        cka = CKA(2)
        for mine, other, mask in zip(ours, others, counted, strict=True):
            cka.update(state[mask] for state in (mine, walk.finish(other)))
        return cka.result()[0, 1].item()

    return measure


def _nll(walk: LayerWalk, states: Sequence[Tensor], counted: Sequence[Tensor]) -> Similarity:
    ids = split_windows(walk.windows)[0].split([len(state) for state in states])
    # Position t predicts t + 1: both must count.
    keep = [pad(mask[:, :-1] & mask[:, 1:], (1, 0)) for mask in counted]
    labels = [
        i.to(mask.device).masked_fill(~mask, IGNORED_LABEL)
        for i, mask in zip(ids, keep, strict=True)
    ]

    def mean_nll(others: Sequence[Tensor]) -> float:
        sums = [
            next_token_sums(logits, labels[batch][row : row + 1])
            for batch, row, logits in _logits(walk, others)
        ]
        return float(sum(nll for nll, _, _ in sums) / sum(tokens for *_, tokens in sums))

    own = mean_nll(states)
    return lambda others: math.exp(own - mean_nll(others))


def _kl(walk: LayerWalk, states: Sequence[Tensor], counted: Sequence[Tensor]) -> Similarity:
    """Compare distributions; see `_ExpectedLogits` for why one head application is enough."""
    expected = _ExpectedLogits(walk, states)

    def measure(others: Sequence[Tensor]) -> float:
        total, tokens = 0.0, 0
        for batch, row, logits in _logits(walk, others):
            mask = counted[batch][row]
            mean = expected.mean(batch, row, others[batch][row], logits[0])
            cross = logits[0].float().logsumexp(-1) - mean
            total += (cross - expected.entropies[batch][row])[mask].double().sum().item()
            tokens += int(mask.sum())
        return math.exp(-total / tokens)

    return measure


class _ExpectedLogits:
    """The mean of a variant's logits z under the model's own next-token distributions p.

    KL(p, q) = logsumexp(z) - sum_v p_v z_v - H(p). Where logits are W h + b times a constant, the
    sum is (sum_v p_v W_v) h + ...: a vector a token, kept from the start. Elsewhere (Gemma-2 caps
    its logits) p is computed anew, with a second application of the head.
    """

    def __init__(self, walk: LayerWalk, states: Sequence[Tensor]) -> None:
        self.walk, self.states = walk, states
        self.head: Any = walk.model.get_output_embeddings()
        self.scale: float | None = None  # None: not linear
        self.entropies = [torch.zeros(s.shape[:2], device=walk.model.device) for s in states]
        self.embeddings: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        for batch, row, logits in _logits(walk, states):
            if batch == row == 0:
                self.scale = self._find_scale(logits[0], states[0][:1])
            log_p = logits[0].float().log_softmax(-1)
            self.entropies[batch][row] = -(log_p.exp() * log_p).sum(-1)
            if self.scale is not None:
                self.embeddings[batch, row] = self._mean_embedding(log_p.exp_())

    def mean(self, batch: int, row: int, state: Tensor, logits: Tensor) -> Tensor:
        """Return sum_v p_v z_v of each token of a sequence, (T,)."""
        if self.scale is None:
            ours = self.walk.finish(self.states[batch][row : row + 1], head=True)[0]
            return (ours.float().softmax(-1) * logits.float()).sum(-1)
        embedding, offset = self.embeddings[batch, row]
        hidden = self.walk.finish(state[None])[0].float()
        return self.scale * ((embedding * hidden).sum(-1) + offset)

    def _mean_embedding(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """Return sum_v p_v W_v (T, D) and sum_v p_v b_v (T,), in float32 by parts of the head."""
        weight, bias = self.head.weight, self.head.bias
        parts = zip(p.split(_HEAD_ROWS, -1), weight.split(_HEAD_ROWS), strict=True)
        embedding = sum(part @ rows.float() for part, rows in parts)
        assert isinstance(embedding, Tensor)
        return embedding, p.new_zeros(len(p)) if bias is None else p @ bias.float()

    def _find_scale(self, logits: Tensor, state: Tensor) -> float | None:
        """Return c where logits = c (W h + b); None where they are something else."""
        if not isinstance(self.head, torch.nn.Linear):
            return None
        plain, logits = self.head(self.walk.finish(state)[0]).float(), logits.float()
        scale = ((plain * logits).sum() / plain.square().sum()).item()
        near = (logits - scale * plain).abs().max() <= 1e-2 * logits.abs().max()
        return scale if bool(near) else None


def _logits(walk: LayerWalk, states: Sequence[Tensor]) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (micro-batch, sequence in it, logits (1, T, V)): those of all do not fit in memory."""
    for batch, state in enumerate(states):
        for row in range(len(state)):
            yield batch, row, walk.finish(state[row : row + 1], head=True)
