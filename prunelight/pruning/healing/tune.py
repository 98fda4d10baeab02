"""Tunes all matrices of one decoder layer to the dense hidden states, by gradient steps.

What a closed form cannot do: change what the nonlinear parts of a layer compute. One layer is in
memory with its gradients. Held-out windows choose the epoch whose weights are taken, or leave the
layer as it was. Zeros stay zeros.
"""

# B sequences, T tokens, D hidden

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from prunelight.calibration.layer_walk import LayerWalk
from prunelight.calibration.shared_windows import first_own_window
from prunelight.calibration.windows import MICRO_BATCH_TOKENS, split_windows
from prunelight.pruning.healing.error_sums import token_weights
from prunelight.pruning.healing.held_out import split_positions

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
    matrix' root mean square, and falls by a cosine.

    Args:
        walk: at the layer, inside `walk.layers()`.
        index: of the layer.
        layer: its module.
        masks: weights to train -> bool tensor, False where they must stay 0; None for all places.
        target_of: gives the target states (B, T, D) of a micro-batch.
        epochs: passes over the windows; ends early where held-out windows gain nothing.
    """
    training = _Training(walk, index, layer, masks, target_of)
    steps = _steps(walk)
    optimizer = AdamW(
        [{"params": [w], "lr": _RATE * float(w.detach().square().mean().sqrt())} for w in training],
        betas=_BETAS,
        weight_decay=0.0,
    )
    schedule = LambdaLR(optimizer, partial(_share_of_rate, total=epochs * len(steps)))
    before = best = training.held_error()
    best_epoch, best_weights = 0, training.copies()
    for epoch in range(1, epochs + 1):
        for batches in steps:
            training.backward(batches)
            optimizer.step()
            schedule.step()
        error = training.held_error()
        if error < best:
            best, best_epoch, best_weights = error, epoch, training.copies()
        elif epoch - best_epoch == _PATIENCE:
            break
    if best_epoch:
        for parameter, weight in zip(masks, best_weights, strict=True):
            parameter.data = weight.to(parameter)
    return Tuning(best_epoch, before, best)


class _Training:
    """Weights that are trained in float32 beside a layer, which itself stays as it is.

    Iterating gives the weights, in the order of `masks`. Arguments are those of `tune_layer`.
    """

    def __init__(
        self,
        walk: LayerWalk,
        index: int,
        layer: nn.Module,
        masks: dict[Tensor, Tensor | None],
        target_of: Callable[[int], Tensor],
    ) -> None:
        self._walk, self._index, self._layer, self._target_of = walk, index, layer, target_of
        self._masks = list(masks.values())
        self._dtypes = [parameter.dtype for parameter in masks]
        names: dict[Tensor, str] = {p: name for name, p in layer.named_parameters()}
        self._names = [names[parameter] for parameter in masks]
        self._weights = [p.detach().float().clone().requires_grad_() for p in masks]
        self._fitted_on, self._held_out = zip(*split_positions(walk), strict=True)

    def __iter__(self) -> Iterator[Tensor]:
        """Yield each weight, float32."""
        return iter(self._weights)

    def copies(self) -> list[Tensor]:
        """Return what the weights are now."""
        return [weight.detach().clone() for weight in self._weights]

    def held_error(self) -> float:
        """Return the error of all ranks' held-out windows over that of the target states."""
        with torch.no_grad():
            pairs = [
                self._sums(batch, rows)
                for batch, rows in enumerate(self._held_out)
                if bool(rows.any())
            ]
        sums = [math.fsum(float(pair[i]) for pair in pairs) for i in range(2)]
        error, scale = self._walk.group.totals(*sums)
        return error / max(scale, 1e-30)

    def backward(self, batches: list[int]) -> None:
        """Set the gradients of all ranks' loss over these micro-batches of this rank."""
        scale = 0.0
        for weight in self._weights:
            weight.grad = torch.zeros_like(weight)
        for batch in batches:
            if bool(self._fitted_on[batch].any()):
                with torch.enable_grad():
                    error, own_scale = self._sums(batch, self._fitted_on[batch])
                    error.backward()
                scale += float(own_scale)
        scale = max(self._walk.group.totals(scale)[0], 1e-30)
        for weight, mask in zip(self._weights, self._masks, strict=True):
            assert weight.grad is not None  # set above
            gradient = self._walk.group.sum(weight.grad) / scale
            weight.grad = gradient if mask is None else gradient * mask

    def _sums(self, batch: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weighted squared error of some tokens, bool (B, T), and that of no output."""
        target = self._target_of(batch)[rows]
        states = self._walk.states[batch]
        output = self._walk.call(self._run, self._index, batch, states)[rows].float()
        weights = token_weights(target)
        error = ((output - target).square().sum(-1) * weights).sum()
        return error, (target.square().sum(-1) * weights).sum()

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer with the trained weights in the place of its own."""
        of_layer = {
            name: weight.to(dtype)
            for name, weight, dtype in zip(self._names, self._weights, self._dtypes, strict=True)
        }
        return functional_call(self._layer, of_layer, args, kwargs)


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
