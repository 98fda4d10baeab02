"""The optimizer of a recovery whose user names none: AdamW, fused where a GPU has all it trains.

Private name of torch: `_step_supports_amp_scaling`, tested with torch 2.13.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn
from torch.optim import AdamW


def adamw(parameters: Sequence[nn.Parameter], learning_rate: float) -> AdamW:
    """Return AdamW for parameters, with the fused step where all of them are on CUDA."""
    if not are_on_cuda(parameters):
        return AdamW(parameters, lr=learning_rate)
    return fused_adamw(parameters, learning_rate)


def are_on_cuda(parameters: Iterable[Tensor]) -> bool:
    """Return whether all parameters are floating-point numbers on CUDA, as the fused step needs."""
    return all(parameter.is_cuda and parameter.is_floating_point() for parameter in parameters)


def fused_adamw(parameters: Sequence[nn.Parameter], learning_rate: float) -> AdamW:
    """Return AdamW whose step is one kernel, which reads and writes each number once.

    Gradients are unscaled before the step, as for other optimizers. Torch lets a fused step unscale
    them itself, and Lightning then refuses to clip them, with a loss scaler or without.
    """
    optimizer = AdamW(parameters, lr=learning_rate, fused=True)
    optimizer._step_supports_amp_scaling = False
    return optimizer
