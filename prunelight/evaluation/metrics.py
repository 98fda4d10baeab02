"""Perplexity and next-token accuracy as torchmetrics.

Perplexity comes from the cross-entropy summed over all tokens. So it is exact over batches of any
size and over processes. `torchmetrics.text.Perplexity` takes a softmax of the full logits instead.
That softmax needs twice the memory and underflows in bfloat16.
"""

# B sequences, T tokens, V vocabulary

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class _TokenSum(Metric):
    """A sum over tokens, in micronats or correct predictions, and the number of tokens.

    Both states are integers. A Trainer with precision bf16-true casts floating-point states to
    bfloat16, in which a sum over thousands of batches stops growing.
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
        """Add the sum of a batch and its number of tokens."""
        self.total += total.to(self.total.device)
        self.tokens += tokens.to(self.tokens.device)


class TokenPerplexity(_TokenSum):
    """Token-weighted perplexity: exp of the mean negative log-likelihood over all tokens."""

    higher_is_better = False

    def update(self, nll: Tensor, tokens: Tensor) -> None:
        """Add the summed negative log-likelihood of a batch, in nats, and its number of tokens."""
        super().update((nll.cpu().double() * 1e6).round().long(), tokens)

    def compute(self) -> Tensor:
        """Return the perplexity, float64 scalar in [1, inf)."""
        return torch.exp(self.total.cpu().double() / 1e6 / self.tokens.cpu())


class TokenAccuracy(_TokenSum):
    """Share of tokens that greedy decoding would predict, in [0, 1]."""

    higher_is_better = True

    def compute(self) -> Tensor:
        """Return the accuracy, scalar in [0, 1]."""
        return self.total / self.tokens
