"""Losses over the vocabulary, one chunk of tokens at a time: cross-entropy and distillation.

The logits of a large vocabulary take most of a training step's memory. For 2048 tokens and 131072
ids the logits are 1 GB in float32, and their gradient is as large. `linear_loss` never holds all
logits: its forward computes logits, loss and all gradients of one chunk before the next chunk (the
idea of Liger-Kernel, arXiv:2410.10989). A `TokenLoss` takes the logits of one chunk and returns
their gradient too, which saves the copies that autograd would keep.
"""

# N tokens, M tokens that count, n of these in a chunk, D hidden size, V vocabulary, k of a top-k

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

# Bytes of a chunk's logits in float32. At most five copies of these exist at a time. On an
# accelerator a chunk must have tokens enough for its products to take longer than reading the
# head's weights; on the CPU its logits should stay in the caches.
CHUNK_BYTES = 2**27
CPU_CHUNK_BYTES = 2**24

# Tokens; in a smaller chunk, reading the head's weights would take most of the time.
SMALLEST_CHUNK = 32


class TokenLoss(Protocol):
    """A loss summed over tokens."""

    def __call__(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Return the summed loss, a scalar, and its gradient with respect to the logits, (n, V).

        Args:
            logits: (n, V), float32 or float64; unchanged.
            rows: which of the M tokens the logits belong to.
        """


def language_loss(targets: Tensor) -> TokenLoss:
    """Return the cross-entropy with the next tokens, `targets` (M,), in nats."""

    def loss(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        target = targets[rows, None]
        student = logits.log_softmax(-1)
        total = -student.gather(1, target).sum()
        gradient = student.exp_()
        return total, gradient.scatter_add_(1, target, gradient.new_full(target.shape, -1.0))

    return loss


def distillation_loss(teacher: Callable[[slice], Tensor], temperature: float) -> TokenLoss:
    """Return the forward KL divergence from the teacher's distribution at a temperature, times T^2.

    T^2 KL(softmax(t / T) || softmax(z / T)), with the teacher's logits t and the student's z. The
    gradient of the divergence falls with 1 / T^2 (Hinton et al., arXiv:1503.02531). The factor T^2
    keeps it, so that learning rate and mixing weight need not follow the temperature.

    Args:
        teacher: returns the teacher's logits (n, V) for a slice of the M tokens.
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
    """Return `distillation_loss` from the teacher's k most likely tokens and one bucket.

    The bucket holds all other tokens together. Without the bucket the k probabilities are no
    distribution. As they are, or scaled to sum to 1, they teach that all other tokens are
    impossible, and the student becomes more certain than its teacher (arXiv:2503.16870). With the
    bucket the loss is the divergence of two coarser distributions: at most that of the full
    distributions, 0 where the student agrees, and equal to it for k = V.

    Args:
        ids: ids of the teacher's most likely tokens, (M, k).
        log_probabilities: of these tokens and, in the last column, of all others, (M, k + 1); or
            (M, V) if k = V. Rounded values are normalized again here.
        temperature: T, above 0, of the log-probabilities.
    """
    has_bucket = log_probabilities.shape[1] > ids.shape[1]

    def loss(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        top = ids[rows].long()
        target = log_probabilities[rows].to(logits.dtype).log_softmax(-1)
        student = (logits / temperature).log_softmax(-1)
        student_top = student.gather(1, top)
        gradient = student.exp_().scatter_(1, top, 0.0)
        if has_bucket:  # a sum over its tokens: 1 - sum of the top k would round away a small tail
            tail = gradient.sum(-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).tiny)
            student_top = torch.cat([student_top, tail.log()], dim=1)
            gradient *= 1 - target[:, -1:].exp() / tail
        total = (target.exp() * (target - student_top)).sum()
        gradient.scatter_(1, top, (student_top.exp() - target.exp())[:, : top.shape[1]])
        return temperature**2 * total, gradient.mul_(temperature)

    return loss


def mixed_loss(first: TokenLoss, second: TokenLoss, weight: float) -> TokenLoss:
    """Return the loss (1 - weight) * first + weight * second."""

    def loss(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        total, gradient = first(logits, rows)
        second_total, second_gradient = second(logits, rows)
        return total.lerp(second_total, weight), gradient.lerp_(second_gradient, weight)

    return loss


def top_k(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Return ids (n, k) and log-probabilities (n, k + 1) as `top_k_loss` takes them, float32.

    Args:
        logits: (n, V), of any floating type.
        k: number of ids, in [1, V]; for k = V there is no column for all others.
        temperature: T, above 0.
    """
    scaled = logits.float() if temperature == 1 else logits.float() / temperature
    top, ids = scaled.topk(k)
    top = top - top[:, :1]
    # Not by log_softmax of all logits, which takes as long as the search for the k largest.
    rest = (scaled - scaled.gather(1, ids[:, :1])).exp_().scatter_(1, ids, 0.0)
    tail = rest.sum(-1, keepdim=True)
    log_total = (top.exp().sum(-1, keepdim=True) + tail).log()
    if k == logits.shape[-1]:
        return ids, top - log_total
    tail = tail.clamp(min=torch.finfo(torch.float32).tiny)
    return ids, torch.cat([top, tail.log()], dim=1) - log_total


def chunk_size(num_tokens: int, vocabulary: int, device: torch.device) -> int:
    """Return how many of `num_tokens` tokens a chunk holds: as many as its logits' bytes allow.

    Args:
        num_tokens: of all chunks together; chunks are of one size, but for the last.
        vocabulary: logits of a token.
        device: where they are computed; see `CHUNK_BYTES`.
    """
    limit = CPU_CHUNK_BYTES if device.type == "cpu" else CHUNK_BYTES
    most = max(SMALLEST_CHUNK, limit // (4 * vocabulary))
    num_chunks = max(1, -(-num_tokens // most))
    return max(1, -(-num_tokens // num_chunks))


def logits_loss(logits: Tensor, loss: TokenLoss, tokens: Tensor) -> Tensor:
    """Return the mean loss of given logits; the forward computes their gradient too.

    Args:
        logits: (N, V), of any floating type.
        loss: loss of the M tokens that count.
        tokens: indices, among the N tokens, of those that count, (M,).

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
    """Return the mean loss of a linear head's logits, without ever holding all logits.

    Under autocast the products have autocast's dtype. The loss is in float32, and so is the sum of
    the weight's gradients over the chunks.

    Args:
        hidden_states: inputs of the head, (N, D).
        weight: weight of the head, (V, D); it gets a gradient if it requires one.
        bias: bias of the head, (V,).
        loss: loss of the M tokens that count.
        tokens: indices, among the N tokens, of those that count, (M,).
        finish: function by which the model scales or caps its head's logits.

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
    *,
    vocabulary: int,
) -> Tensor:
    """Return `linear_loss` for a head of any kind, such as a head with LoRA.

    The logits are computed twice: the backward computes them again, chunk by chunk. `vocabulary` is
    the number of logits V that the head gives each token.
    """

    def chunk_loss(states: Tensor, rows: slice) -> Tensor:
        logits = head(states)
        all_rows = torch.arange(len(logits), device=logits.device)
        shifted = _shifted(loss, rows.start)
        return _summed(finish(logits) if finish else logits, None, None, shifted, all_rows, None)

    total = hidden_states[:0].sum().to(_at_least_float32(hidden_states))
    for rows in _chunks(len(tokens), vocabulary, hidden_states.device):
        states = hidden_states[tokens[rows]]
        total = total + checkpoint(chunk_loss, states, rows, use_reentrant=False)
    return total / max(1, len(tokens))


def _shifted(loss: TokenLoss, first: int) -> TokenLoss:
    """Return the loss of the tokens from `first` on, whose rows are then counted from 0."""
    return lambda logits, rows: loss(logits, slice(first + rows.start, first + rows.stop))


def _chunks(num_tokens: int, vocabulary: int, device: torch.device) -> list[slice]:
    size = chunk_size(num_tokens, vocabulary, device)
    return [slice(i, min(i + size, num_tokens)) for i in range(0, num_tokens, size)]


def _summed(*arguments: Any) -> Tensor:
    total: Tensor = _ChunkedLoss.apply(*arguments)
    return total


class _ChunkedLoss(torch.autograd.Function):
    """The summed loss of logits, or of a linear head's logits; the forward computes all gradients.

    The gradients are those of the sum, not of the mean: divided by the number of tokens, most of
    their entries would be too small for float16.
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
        """Return the summed loss; if `weight` is None, `states` are the logits themselves."""
        needs_grad = ctx.needs_input_grad
        states_grad = torch.zeros_like(states) if needs_grad[0] else None
        weight_grad = _zeros_to_sum(weight) if weight is not None and needs_grad[1] else None
        bias_grad = _zeros_to_sum(bias) if bias is not None and needs_grad[2] else None
        dtype = _product_dtype(states)
        head_weight = None if weight is None else weight.to(dtype)
        head_bias = None if bias is None else bias.to(dtype)
        total = states.new_zeros((), dtype=_at_least_float32(states))
        vocabulary = states.shape[-1] if weight is None else weight.shape[0]
        for rows in _chunks(len(tokens), vocabulary, states.device):
            inputs = states[tokens[rows]]
            if head_weight is not None:
                inputs = inputs.to(dtype)
            logits = inputs if head_weight is None else linear(inputs, head_weight, head_bias)
            chunk_total, gradient = _finished_loss(logits.to(total.dtype), rows, loss, finish)
            total += chunk_total
            if bias_grad is not None:
                bias_grad += gradient.sum(0)
            if head_weight is not None:
                gradient = gradient.to(dtype)
            if weight_grad is not None:
                _add_product(weight_grad, gradient.T, inputs)
            if states_grad is not None:
                gradient = gradient if head_weight is None else gradient @ head_weight
                states_grad[tokens[rows]] = gradient.to(states_grad.dtype)
        ctx.save_for_backward(states_grad, weight_grad, bias_grad)
        ctx.dtypes = [None if value is None else value.dtype for value in (states, weight, bias)]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of states, weight and bias; the saved ones are scaled in place."""
        saved = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        gradients = (None if g is None else g.mul_(upstream).to(dtype) for g, dtype in saved)
        return (*gradients, None, None, None)


def _finished_loss(
    logits: Tensor, rows: slice, loss: TokenLoss, finish: Finish | None
) -> tuple[Tensor, Tensor]:
    """Return the loss of `finish(logits)`, and its gradient with respect to `logits`."""
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


_LOGIT_TOKENS = 256  # tokens whose logits are copied to float32 at a time


@torch.no_grad()
def next_token_sums(
    logits: Tensor, labels: Tensor, head: Finish | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum cross-entropy and correct predictions over all predicted tokens, computed in float32.

    Args:
        logits: (B, T, V); position t predicts the label at t + 1.
        labels: (B, T), -100 where a token does not count.
        head: if given, `logits` are states (B, T, D), and this returns the logits of a chunk.

    Returns:
        Scalars: summed negative log-likelihood in nats (float64), number of correct predictions,
        number of predicted tokens.
    """
    flat, targets = logits.flatten(0, 1), next_token_targets(labels.to(logits.device))
    nll, losses = torch.zeros((), dtype=torch.float64), list[Tensor]()
    correct = torch.zeros((), dtype=torch.long, device=logits.device)
    # In chunks: a float32 copy of all logits would be the largest tensor of an evaluation.
    for part, target in zip(flat.split(_LOGIT_TOKENS), targets.split(_LOGIT_TOKENS), strict=True):
        if head is not None:
            part = head(part)
        losses.append(
            cross_entropy(part.float(), target, ignore_index=IGNORED_LABEL, reduction="sum")
        )
        correct += (part.argmax(-1) == target).sum()
    for loss in torch.stack(losses).cpu().double():  # not every device has float64
        nll += loss
    return nll, correct.cpu(), (targets != IGNORED_LABEL).sum().cpu()


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy over all predicted tokens, computed in float32 by chunks.

    Value and gradient are those of `cross_entropy(logits.float(), ...)`. No float32 copy of all
    logits is made, which for a large vocabulary would take most of a training step's memory.

    Args:
        logits: (B, T, V); position t predicts the label at t + 1.
        labels: (B, T), -100 where a token does not count.

    Returns:
        Scalar in nats, float32; 0 if no token counts.
    """
    tokens, targets = counted_targets(labels)
    return logits_loss(logits.flatten(0, 1), language_loss(targets), tokens)


def counted_targets(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positions in (B * T,) that predict a token that counts, and these tokens; (M,)."""
    targets = next_token_targets(labels)
    tokens = (targets != IGNORED_LABEL).nonzero()[:, 0]
    return tokens, targets[tokens]


def next_token_targets(labels: Tensor) -> Tensor:
    """Return the label that each position predicts, (B, T) -> (B * T,); -100 at the last one."""
    return pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL).flatten()
