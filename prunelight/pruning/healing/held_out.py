"""Which calibration windows judge what is fitted on the others."""

# B sequences

from __future__ import annotations

import torch
from torch import Tensor

from prunelight.calibration.layer_walk import LayerWalk
from prunelight.calibration.shared_windows import first_own_window
from prunelight.calibration.windows import split_windows

_HELD_OUT = 4  # every fourth window


def held_out_windows(walk: LayerWalk) -> list[Tensor]:
    """Return which windows of each micro-batch are held out, bool (B): every fourth of all.

    Of fewer windows than four the last one is.
    """
    total = len(split_windows(walk.windows)[0])
    number, held = first_own_window(walk.windows), []
    for state in walk.states:
        numbers = torch.arange(number, number + len(state))
        last = numbers == total - 1 if total < _HELD_OUT else torch.zeros_like(numbers).bool()
        held.append((numbers % _HELD_OUT == _HELD_OUT - 1) | last)
        number += len(state)
    return held
