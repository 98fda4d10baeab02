"""Tunes all matrices of one decoder layer to the dense hidden states, by gradient steps.

What a closed form cannot do: change what the nonlinear parts of a layer compute. One layer is in
memory with its gradients. Held-out windows choose the epoch whose weights are taken, or leave the
layer as it was. Zeros stay zeros.
"""

# B sequences, T tokens, D hidden

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from prunelight.calibration.layer_walk import LayerWalk
from prunelight.calibration.shared_windows import first_own_window
from prunelight.calibration.windows import MICRO_BATCH_TOKENS, split_windows
from prunelight.pruning.healing.held_out import held_out_windows

_BATCHES = 2  # micro-batches of a step
_RATE = 2e-3  # of the root mean square of each matrix
_BETAS = (0.9, 0.95)
_WARMUP = 0.1  # of the steps
_PATIENCE = 2  # epochs that bring nothing


@dataclass(frozen=True)
class Tuning:
    """What `tune_layer` did.

    Attributes:
        epochs: after how many passes over the windows the weights were best; 0 if never.
        before: weighted squared error on held-out windows, over that of the dense states.
        after: the same of the weights that were taken.
    """

    epochs: int
    before: float
    after: float


def tune_layer(
    walk: LayerWalk,
    index: int,
    layer: nn.Module,
    masks: dict[Tensor, Tensor | None],
    target_of: Callable[[int], Tensor],
    epochs: int,
) -> Tuning:
    """Train some weights of the walk's current layer to hand on the target states, in place.

    The loss is sum_t ||y_t - y'_t||^2 / ||y_t|| over the windows that are not held out, in units of
    the same sum of the targets. AdamW in float32, without decay; its rate is a share of each
    matrix' root mean square and falls by a cosine.

    Args:
        walk: at the layer, inside `walk.layers()`.
        index: of the layer.
        layer: its module.
        masks: weights to train -> bool tensor, False where they must stay 0; None for all places.
        target_of: gives the target states (B, T, D) of a micro-batch.
        epochs: passes over the windows; stops where held-out windows get worse.
    """
    names: dict[Tensor, str] = {p: name for name, p in layer.named_parameters()}
    trained = {
        names[parameter]: parameter.detach().float().clone().requires_grad_() for parameter in masks
    }
    kept = {names[parameter]: mask for parameter, mask in masks.items()}
    dtypes = {names[parameter]: parameter.dtype for parameter in masks}

    def run(*args: Any, **kwargs: Any) -> Any:
        weights = {name: value.to(dtypes[name]) for name, value in trained.items()}
        return functional_call(layer, weights, args, kwargs)

    def sums(batch: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the squared error of a micro-batch's tokens and the scale of it."""
        target = target_of(batch)[rows]
        output = walk.call(run, index, batch, walk.states[batch])[rows].float()
        weights = target.norm(dim=-1).clamp(min=1e-30).reciprocal()
        return (
            ((output - target).square().sum(-1) * weights).sum(),
            (target.square().sum(-1) * weights).sum(),
        )

    held_windows = [held[:, None].to(walk.device) for held in held_out_windows(walk)]
    counted = walk.positions()
    fitted_on = [rows & ~held for rows, held in zip(counted, held_windows, strict=True)]
    held_out = [rows & held for rows, held in zip(counted, held_windows, strict=True)]

    def held_error() -> float:
        with torch.no_grad():
            pairs = [sums(i, rows) for i, rows in enumerate(held_out) if bool(rows.any())]
        error, scale = walk.group.totals(*(sum(float(p[k]) for p in pairs) for k in range(2)))
        return error / max(scale, 1e-30)

    optimizer = torch.optim.AdamW(
        [
            {"params": [value], "lr": _RATE * float(value.detach().square().mean().sqrt())}
            for value in trained.values()
        ],
        betas=_BETAS,
        weight_decay=0.0,
    )
    steps = _steps(walk)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, partial(_share_of_rate, total=epochs * len(steps))
    )
    before = best = held_error()
    best_epoch, best_weights = 0, {name: value.detach().clone() for name, value in trained.items()}
    for epoch in range(1, epochs + 1):
        for batches in steps:
            optimizer.zero_grad(set_to_none=False)
            scale = 0.0
            for batch in batches:
                if bool(fitted_on[batch].any()):
                    with torch.enable_grad():
                        error, own_scale = sums(batch, fitted_on[batch])
                        error.backward()
                    scale += float(own_scale)
            scale = max(walk.group.totals(scale)[0], 1e-30)
            for name, value in trained.items():
                gradient = torch.zeros_like(value) if value.grad is None else value.grad
                value.grad = walk.group.sum(gradient) / scale
                if (mask := kept[name]) is not None:
                    value.grad *= mask
            optimizer.step()
            schedule.step()
        error_now = held_error()
        if not error_now < best:
            if epoch - best_epoch == _PATIENCE:
                break
            continue
        best, best_epoch = error_now, epoch
        best_weights = {name: value.detach().clone() for name, value in trained.items()}
    if best_epoch:
        for parameter, name in ((p, names[p]) for p in masks):
            parameter.data = best_weights[name].to(parameter)
    return Tuning(best_epoch, before, best)


def _share_of_rate(step: int, total: int) -> float:
    """Return the share of the learning rate at a step: a short rise, then a cosine down to 0."""
    rise = min(1.0, (step + 1) / max(1.0, _WARMUP * total))
    return rise * 0.5 * (1 + math.cos(math.pi * step / total))


def _steps(walk: LayerWalk) -> list[list[int]]:
    """Return for each step of an epoch the micro-batches that this rank adds to it.

    A step takes micro-batches from all over the windows, so that each rank has some of it and the
    result does not depend on the number of ranks.
    """
    ids = split_windows(walk.windows)[0]
    size = max(1, MICRO_BATCH_TOKENS // ids.shape[1])
    count = math.ceil(math.ceil(len(ids) / size) / _BATCHES)
    steps: list[list[int]] = [[] for _ in range(count)]
    window = first_own_window(walk.windows)
    for batch, state in enumerate(walk.states):
        steps[window // size % count].append(batch)
        window += len(state)
    return steps
