"""What is measured: perplexity and next-token accuracy as torchmetrics, and sizes of a model.

Perplexity comes from summed cross-entropy over all tokens, so it is exact over batches of any size
and over processes. `torchmetrics.text.Perplexity` takes a softmax of the full logits instead: twice
the memory, and it underflows in bfloat16.
"""

# B sequences, T tokens, V vocabulary

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from torchmetrics import Metric

from prunelight.losses import language_loss, logits_loss
from prunelight.windows import IGNORED_LABEL

_CHUNK_TOKENS = 256


@torch.no_grad()
def next_token_sums(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum cross-entropy and hits over all predicted tokens, in float32 whatever the logits' dtype.

    Args:
        logits: (B, T, V); position t predicts the label at t + 1.
        labels: (B, T), -100 where a token does not count.

    Returns:
        Scalars: summed negative log-likelihood in nats (float64), correct predictions, tokens.
    """
    flat, target = logits.flatten(0, 1), _targets(labels.to(logits.device))
    nll = torch.zeros((), dtype=torch.float64)
    correct = torch.zeros((), dtype=torch.long, device=logits.device)
    for part, wanted in zip(flat.split(_CHUNK_TOKENS), target.split(_CHUNK_TOKENS), strict=True):
        # In chunks: a float32 copy of all logits is the largest tensor of an evaluation.
        loss = cross_entropy(part.float(), wanted, ignore_index=IGNORED_LABEL, reduction="sum")
        nll += loss.cpu().double()  # not every device has float64
        correct += (part.argmax(-1) == wanted).sum()
    return nll, correct.cpu(), (target != IGNORED_LABEL).sum().cpu()


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over all predicted tokens, computed in float32 chunk by chunk.

    The value and gradient of `cross_entropy(logits.float(), ...)`, without float32 copies of all
    logits: for a large vocabulary those are most of a training step's memory.

    Args:
        logits: (B, T, V); position t predicts the label at t + 1.
        labels: (B, T), -100 where a token does not count.

    Returns:
        Scalar in nats, float32; 0 if no token counts.
    """
    tokens, targets = counted_targets(labels)
    return logits_loss(logits.flatten(0, 1), language_loss(targets), tokens)


def counted_targets(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return which positions of (B * T,) predict a token that counts, and what they predict."""
    targets = _targets(labels)
    tokens = (targets != IGNORED_LABEL).nonzero()[:, 0]
    return tokens, targets[tokens]


def _targets(labels: Tensor) -> Tensor:
    """Return what each position predicts, (B, T) -> (B * T,); nothing at the last one."""
    return pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL).flatten()


class _OverTokens(Metric):
    """A sum over tokens, in micronats or hits, and how many they are.

    In whole numbers: a Trainer with precision bf16-true casts every floating-point state, in which
    a sum of thousands of batches no longer grows.
    """

    is_differentiable = False
    full_state_update = False
    total: Tensor
    tokens: Tensor

    def __init__(self, **kwargs: Any) -> None:  # torchmetrics' own keyword arguments
        super().__init__(**kwargs)
        for name in ("total", "tokens"):
            self.add_state(name, torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, total: Tensor, tokens: Tensor) -> None:
        """Add a sum and its number of tokens."""
        self.total += total.to(self.total.device)
        self.tokens += tokens.to(self.tokens.device)


class TokenPerplexity(_OverTokens):
    """Token-weighted perplexity: exp of the mean negative log-likelihood over all tokens."""

    higher_is_better = False

    def update(self, nll: Tensor, tokens: Tensor) -> None:
        """Add a summed negative log-likelihood in nats and its number of tokens."""
        super().update((nll.cpu().double() * 1e6).round().long(), tokens)

    def compute(self) -> Tensor:
        """Return the perplexity, float64 scalar in [1, inf)."""
        return torch.exp(self.total.cpu().double() / 1e6 / self.tokens.cpu())


class TokenAccuracy(_OverTokens):
    """Share of tokens that greedy decoding would predict, in [0, 1]."""

    higher_is_better = True

    def compute(self) -> Tensor:
        """Return the accuracy, scalar in [0, 1]."""
        return self.total / self.tokens


def parameter_count(model: torch.nn.Module, *, trainable: bool = False) -> int:
    """Return the number of parameters, tied ones once; only the trainable ones if asked."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def parameter_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of all parameters, tied ones once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


@torch.no_grad()
def zero_share(parameters: Iterable[Tensor]) -> float:
    """Return the share of exact zeros among all weights, tied ones once, in [0, 1].

    0 without any, and where zeros cannot be seen: in packed 4-bit or 8-bit weights.
    """
    found = list({id(parameter): parameter for parameter in parameters}.values())
    if any(not p.is_floating_point() or p.element_size() == 1 or p.is_meta for p in found):
        return 0.0
    total = sum(parameter.numel() for parameter in found)
    filled = sum(int(torch.count_nonzero(parameter)) for parameter in found)
    return (total - filled) / total if total else 0.0
