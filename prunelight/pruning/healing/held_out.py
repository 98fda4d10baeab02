"""Which calibration windows judge what is fitted on the others, and the sums over both."""

# B sequences, T tokens, O out_features, I in_features

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from prunelight.calibration.layer_walk import LayerWalk
from prunelight.calibration.shared_windows import first_own_window
from prunelight.calibration.windows import split_windows
from prunelight.pruning.healing.error_sums import ErrorSums
from prunelight.runtime.devices import float64_device

# Runs a layer on a micro-batch whose target is given (B, T, D), and returns what is known of its
# tokens (B, T, I), what is missing of them (B, T, O), and their weights (B, T).
Observe: TypeAlias = Callable[[Callable[[], Tensor], Tensor], tuple[Tensor, Tensor, Tensor]]

_HELD_OUT = 4  # every fourth window


def is_held_out(numbers: Tensor, total: int) -> Tensor:
    """Return which windows are held out, bool (N): every fourth; of fewer than four the last one.

    Args:
        numbers: of the windows, from 0 on.
        total: how many there are.
    """
    return (numbers % _HELD_OUT == _HELD_OUT - 1) | ((numbers == total - 1) & (total < _HELD_OUT))


def split_positions(walk: LayerWalk) -> list[tuple[Tensor, Tensor]]:
    """Return which tokens of each micro-batch are fitted on, and which judge, both bool (B, T).

    Padding does not count. Both are on the walk's device.
    """
    total = len(split_windows(walk.windows)[0])
    number, split = first_own_window(walk.windows), []
    for counted in walk.positions():
        numbers = torch.arange(number, number + len(counted), device=counted.device)
        held_out = is_held_out(numbers, total)[:, None]
        split.append((counted & ~held_out, counted & held_out))
        number += len(counted)
    return split


def fitted_and_held_out(
    walk: LayerWalk,
    observe: Observe,
    target_of: Callable[[int], Tensor],
    out_features: int,
    kinds: tuple[int, ...],
) -> tuple[ErrorSums, ErrorSums, float]:
    """Return the sums over windows to fit on, over those held out, and the latter's energy.

    The energy is that of the target states, weighted like the errors.

    Args:
        walk: at the layer.
        observe: looks at a micro-batch.
        target_of: returns the states that the layer should hand on for a micro-batch.
        out_features: O.
        kinds: how many inputs are of each kind, see `ErrorSums`.
    """
    place = float64_device(walk.device)
    sums = [ErrorSums.empty(out_features, kinds, place) for _ in range(2)]
    energy = 0.0
    for batch, split in enumerate(split_positions(walk)):
        target = target_of(batch)
        known, missing, weights = observe(partial(walk.forward, batch), target)
        for own, rows in zip(sums, split, strict=True):
            if bool(rows.any()):
                own.update(known[rows], missing[rows], weights[rows])
        rows = split[1]
        energy += float((target[rows].square().sum(-1) * weights[rows]).sum())
    for own in sums:
        own.pool(walk.group)
    return sums[0], sums[1], max(walk.group.totals(energy)[0], 1e-30)
