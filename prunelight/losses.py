"""Losses over the vocabulary, a chunk of tokens a time: cross-entropy and distillation.

The logits of a large vocabulary are most of a training step's memory: those of 2048 tokens and
131072 ids are 1 GB in float32, and their gradient as much. `linear_loss` never holds them whole:
it makes logits, loss and all gradients of one chunk in the forward before it goes on to the next
(the idea of Liger-Kernel, arXiv:2410.10989). A `TokenLoss` is a function of one chunk's logits that
also gives their gradient, which saves the copies that autograd would keep.
"""

# N tokens, M of them count, n of these in a chunk, D hidden size, V vocabulary, k of a top-k

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, linear, pad
from torch.utils.checkpoint import checkpoint

IGNORED_LABEL = -100  # the label that torch's cross-entropy skips

Finish: TypeAlias = Callable[[Tensor], Tensor]

# Five copies of a chunk's logits live at a time at most: below a tenth of all logits.
_CHUNKS = 64

_SMALLEST_CHUNK = 32  # tokens; with fewer, reading the head's weights takes longer than the rest


class TokenLoss(Protocol):
    """A loss summed over tokens."""

    def __call__(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Return the sum, a scalar, and its gradient for the logits.

        Args:
            logits: (n, V), float32 or float64; left as they are.
            rows: which of the M tokens these are.
        """


def language_loss(targets: Tensor) -> TokenLoss:
    """Cross-entropy of the next tokens (M,), in nats."""

    def loss(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        wanted = targets[rows, None]
        student = logits.log_softmax(-1)
        total = -student.gather(1, wanted).sum()
        gradient = student.exp_()
        return total, gradient.scatter_add_(1, wanted, gradient.new_full(wanted.shape, -1.0))

    return loss


def distillation_loss(teacher: Callable[[slice], Tensor], temperature: float) -> TokenLoss:
    """Forward KL divergence from the teacher's distribution at a temperature, times its square.

    T^2 KL(softmax(t / T) || softmax(z / T)). The square makes up for a gradient that falls with
    1 / T^2 (Hinton et al., arXiv:1503.02531): rate and mix need not follow the temperature.

    Args:
        teacher: gives the teacher's logits (n, V) of some of the M tokens.
        temperature: T, above 0.
    """

    def loss(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        difference = (teacher(rows).to(logits.dtype) / temperature).log_softmax(-1)
        probabilities = difference.exp()
        student = (logits / temperature).log_softmax(-1)
        total = difference.sub_(student).mul_(probabilities).sum()
        gradient = student.exp_().sub_(probabilities)
        return temperature**2 * total, gradient.mul_(temperature)

    return loss


def top_k_loss(ids: Tensor, log_probabilities: Tensor, temperature: float) -> TokenLoss:
    """The same from the teacher's k most likely tokens and one bucket for all others together.

    Without the bucket k probabilities are no distribution. Taken as they are, or scaled to sum to
    1, they teach that the tail is empty, and the student becomes more certain than its teacher
    (arXiv:2503.16870). With it this is the divergence of two coarser distributions: at most that
    of the whole ones, 0 where the student agrees, and the same for k = V.

    Args:
        ids: (M, k) of the teacher's most likely tokens.
        log_probabilities: (M, k + 1) of these and, last, of all others; (M, V) if k = V. They are
            normalized here, after they were rounded.
        temperature: T, above 0, at which they were taken.
    """
    bucket = log_probabilities.shape[1] > ids.shape[1]

    def loss(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        top = ids[rows].long()
        wanted = log_probabilities[rows].to(logits.dtype).log_softmax(-1)
        student = (logits / temperature).log_softmax(-1)
        found = student.gather(1, top)
        gradient = student.exp_().scatter_(1, top, 0.0)
        if bucket:  # summed over its tokens: 1 - sum of the others loses a small tail to rounding
            tail = gradient.sum(-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).tiny)
            found = torch.cat([found, tail.log()], dim=1)
            gradient *= 1 - wanted[:, -1:].exp() / tail
        total = (wanted.exp() * (wanted - found)).sum()
        gradient.scatter_(1, top, (found.exp() - wanted.exp())[:, : top.shape[1]])
        return temperature**2 * total, gradient.mul_(temperature)

    return loss


def mixed_loss(first: TokenLoss, second: TokenLoss, weight: float) -> TokenLoss:
    """(1 - weight) * first + weight * second, of the same logits."""

    def loss(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        total, gradient = first(logits, rows)
        other, others = second(logits, rows)
        return total.lerp(other, weight), gradient.lerp_(others, weight)

    return loss


def top_k(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Return ids (n, k) and log-probabilities (n, k + 1) as `top_k_loss` takes them, float32.

    Args:
        logits: (n, V), of any floating type.
        k: how many ids, in [1, V]; for k = V there is no column for all others.
        temperature: T, above 0.
    """
    scaled = logits.float() if temperature == 1 else logits.float() / temperature
    found, ids = scaled.topk(k)
    found = found - found[:, :1]
    # Without a log_softmax of all, which takes as long as the search for the k largest.
    rest = (scaled - scaled.gather(1, ids[:, :1])).exp_().scatter_(1, ids, 0.0)
    tail = rest.sum(-1, keepdim=True)
    total = (found.exp().sum(-1, keepdim=True) + tail).log()
    if k == logits.shape[-1]:
        return ids, found - total
    tail = tail.clamp(min=torch.finfo(torch.float32).tiny)
    return ids, torch.cat([found, tail.log()], dim=1) - total


def chunk_size(num_tokens: int) -> int:
    """Return how many tokens a chunk holds."""
    return max(_SMALLEST_CHUNK, -(-num_tokens // _CHUNKS))


def logits_loss(logits: Tensor, loss: TokenLoss, tokens: Tensor) -> Tensor:
    """Mean loss of logits that are there already; their gradient is made in the forward.

    Args:
        logits: (N, V) of any floating type.
        loss: of the M tokens that count.
        tokens: (M,), which of the N count.

    Returns:
        Scalar in float32 (float64 for float64 logits); 0 if no token counts.
    """
    return _summed(logits, None, None, loss, tokens, None) / max(1, len(tokens))


def linear_loss(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    loss: TokenLoss,
    tokens: Tensor,
    finish: Finish | None = None,
) -> Tensor:
    """Mean loss of the logits of a linear head, which are never held whole.

    Under autocast products are in its dtype. The loss is in float32, and so is the sum of the
    weight's gradients over the chunks.

    Args:
        hidden_states: (N, D), what the head gets.
        weight: (V, D) of the head; gets a gradient if it requires one.
        bias: (V,) of the head.
        loss: of the M tokens that count.
        tokens: (M,), which of the N count.
        finish: what the model does to its head's logits: scales or caps them.

    Returns:
        Scalar in float32 (float64 for float64 states); 0 if no token counts.
    """
    return _summed(hidden_states, weight, bias, loss, tokens, finish) / max(1, len(tokens))


def module_loss(
    hidden_states: Tensor,
    head: Callable[[Tensor], Tensor],
    loss: TokenLoss,
    tokens: Tensor,
    finish: Finish | None = None,
) -> Tensor:
    """The same for a head of any kind, such as one with LoRA; its logits are made twice."""

    def part(states: Tensor, rows: slice) -> Tensor:
        logits = head(states)
        every = torch.arange(len(logits), device=logits.device)
        shifted = _from(rows.start, loss)
        return _summed(finish(logits) if finish else logits, None, None, shifted, every, None)

    total = hidden_states[:0].sum().to(_at_least_float32(hidden_states))
    for rows in _chunks(len(tokens)):
        total = total + checkpoint(part, hidden_states[tokens[rows]], rows, use_reentrant=False)
    return total / max(1, len(tokens))


def _from(first: int, loss: TokenLoss) -> TokenLoss:
    """Return the loss of the tokens from `first` on, which are numbered from 0."""
    return lambda logits, rows: loss(logits, slice(first + rows.start, first + rows.stop))


def _chunks(num_tokens: int) -> list[slice]:
    size = chunk_size(num_tokens)
    return [slice(i, min(i + size, num_tokens)) for i in range(0, num_tokens, size)]


def _summed(*arguments: Any) -> Tensor:
    total: Tensor = _ChunkedLoss.apply(*arguments)
    return total


class _ChunkedLoss(torch.autograd.Function):
    """The summed loss of logits, or of a head's logits, whose gradients are made in the forward.

    They are those of the sum: divided by the number of tokens, most of their entries would be too
    small for float16.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        loss: TokenLoss,
        tokens: Tensor,
        finish: Finish | None,
    ) -> Tensor:
        """Return the sum; without a weight `states` are the logits themselves."""
        needed = ctx.needs_input_grad
        of_states = torch.zeros_like(states) if needed[0] else None
        of_weight = _zeros_to_sum(weight) if weight is not None and needed[1] else None
        of_bias = _zeros_to_sum(bias) if bias is not None and needed[2] else None
        dtype = _product_dtype(states)
        head = None if weight is None else weight.to(dtype)
        offset = None if bias is None else bias.to(dtype)
        total = states.new_zeros((), dtype=_at_least_float32(states))
        for rows in _chunks(len(tokens)):
            inputs = states[tokens[rows]]
            if head is not None:
                inputs = inputs.to(dtype)
            logits = inputs if head is None else linear(inputs, head, offset)
            part, gradient = _finished(logits.to(total.dtype), rows, loss, finish)
            total += part
            if of_bias is not None:
                of_bias += gradient.sum(0)
            if head is not None:
                gradient = gradient.to(dtype)
            if of_weight is not None:
                _add_product(of_weight, gradient.T, inputs)
            if of_states is not None:
                gradient = gradient if head is None else gradient @ head
                of_states[tokens[rows]] = gradient.to(of_states.dtype)
        ctx.save_for_backward(of_states, of_weight, of_bias)
        ctx.dtypes = [None if value is None else value.dtype for value in (states, weight, bias)]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients, which are used up."""
        made = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        found = (None if g is None else g.mul_(upstream).to(dtype) for g, dtype in made)
        return (*found, None, None, None)


def _finished(
    logits: Tensor, rows: slice, loss: TokenLoss, finish: Finish | None
) -> tuple[Tensor, Tensor]:
    """Return the loss of logits that the model goes on to scale or cap, and their gradient."""
    if finish is None:
        return loss(logits, rows)
    with torch.enable_grad():
        logits.requires_grad_()
        finished = finish(logits)
    total, gradient = loss(finished.detach(), rows)
    return total, torch.autograd.grad(finished, logits, gradient)[0]


def _product_dtype(states: Tensor) -> torch.dtype:
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


def _at_least_float32(value: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32)


def _zeros_to_sum(value: Tensor) -> Tensor:
    return torch.zeros_like(value, dtype=_at_least_float32(value))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to `total`, in place."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


_LOGIT_TOKENS = 256


@torch.no_grad()
def next_token_sums(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum cross-entropy and hits over all predicted tokens, in float32 whatever the logits' dtype.

    Args:
        logits: (B, T, V); position t predicts the label at t + 1.
        labels: (B, T), -100 where a token does not count.

    Returns:
        Scalars: summed negative log-likelihood in nats (float64), correct predictions, tokens.
    """
    flat, target = logits.flatten(0, 1), next_token_targets(labels.to(logits.device))
    nll = torch.zeros((), dtype=torch.float64)
    correct = torch.zeros((), dtype=torch.long, device=logits.device)
    for part, wanted in zip(flat.split(_LOGIT_TOKENS), target.split(_LOGIT_TOKENS), strict=True):
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
    targets = next_token_targets(labels)
    tokens = (targets != IGNORED_LABEL).nonzero()[:, 0]
    return tokens, targets[tokens]


def next_token_targets(labels: Tensor) -> Tensor:
    """Return what each position predicts, (B, T) -> (B * T,); nothing at the last one."""
    return pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL).flatten()
