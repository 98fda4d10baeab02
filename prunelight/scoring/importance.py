"""Importance of weights, and of whole decoder layers, by magnitude or first-order Taylor terms.

Both follow Shortened LLaMA (arXiv:2402.02834, Section 2.3). Taylor terms need the gradients of the
calibration loss. Gradients are summed in float32 for every dtype of the model, and each gradient is
freed as soon as it is added.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunelight.calibration.shared_windows import group_of
from prunelight.calibration.windows import Windows, micro_batches, next_token_labels
from prunelight.losses import IGNORED_LABEL, next_token_loss
from prunelight.models.families.layers import decoder_layers
from prunelight.models.forward import evaluating
from prunelight.scoring.remembered import remembered

_TRAINING_TOKENS = 1024  # of a micro-batch with gradients


def saliencies(
    model: PreTrainedModel, windows: Windows, parameters: Mapping[str, torch.nn.Parameter]
) -> dict[str, Tensor]:
    """Return |W * dL/dW| of each parameter, float32; L is the mean next-token loss of all windows.

    The gradient is summed over all windows before the absolute value is taken. The model and its
    gradients are unchanged.

    Raises:
        ValueError: if a gradient is NaN or Inf (the parameter is named), or windows predict no
            token.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    flags = {p: (p.requires_grad, p.grad) for p in model.parameters()}
    sums: dict[str, Tensor] = {}

    def add(parameter: Tensor) -> None:
        name = names[id(parameter)]
        assert parameter.grad is not None
        gradient = parameter.grad.float()
        sums[name] = gradient if name not in sums else sums[name].add_(gradient)
        parameter.grad = None

    total, group = 0, group_of(windows)
    try:
        with evaluating(model, at_home=True), ExitStack() as hooks:
            for parameter in flags:
                parameter.grad = None
                parameter.requires_grad_(id(parameter) in names)
            for parameter in parameters.values():
                hooks.enter_context(parameter.register_post_accumulate_grad_hook(add))
            for batch in micro_batches(model, windows, tokens=_TRAINING_TOKENS, label="gradients"):
                labels = next_token_labels(batch)
                tokens = int((labels[:, 1:] != IGNORED_LABEL).sum())
                with torch.enable_grad():
                    loss = next_token_loss(model(**batch).logits, labels) * tokens
                    loss.backward()
                total += tokens
            count = group.totals(total)[0]
            if count == 0:
                raise ValueError("windows predict 0 tokens; each needs two that are no padding")
            for name, p in parameters.items():
                if name not in sums:  # no token of this rank reached this expert
                    sums[name] = torch.zeros_like(p, dtype=torch.float32)
                sums[name] = group.sum(sums[name]).mul_(p).abs_().div_(count)
    finally:
        for parameter, (required, gradient) in flags.items():
            parameter.requires_grad_(required)
            parameter.grad = gradient
    ordered = {name: sums[name] for name in parameters}
    for name, saliency in ordered.items():
        if not bool(saliency.isfinite().all()):
            raise ValueError(
                f"the gradient of {name} is NaN or Inf; load the model in bfloat16 or float32"
            )
    return ordered


@remembered
def taylor_scores(model: PreTrainedModel, windows: Windows) -> list[float]:
    """Return sum |W * dL/dW| over all parameters of each decoder layer, including its norms."""
    layers = decoder_layers(model)
    scores = [0.0] * len(layers)
    for name, saliency in saliencies(model, windows, dict(layers.named_parameters())).items():
        scores[int(name.partition(".")[0])] += saliency.sum(-1).cpu().double().sum().item()
    return scores


@torch.no_grad()
def magnitude_scores(model: PreTrainedModel) -> list[float]:
    """Return sum |W| over all parameters of each decoder layer; needs no data."""
    return [
        sum(p.float().abs().sum(dtype=torch.float32).item() for p in layer.parameters())
        for layer in decoder_layers(model)
    ]
