"""Which calibration windows judge what is fitted on the others."""

# B sequences, T tokens

from __future__ import annotations

import torch
from torch import Tensor

from prunelight.calibration.layer_walk import LayerWalk
from prunelight.calibration.shared_windows import first_own_window
from prunelight.calibration.windows import split_windows

_HELD_OUT = 4  # every fourth window


def split_positions(walk: LayerWalk) -> list[tuple[Tensor, Tensor]]:
    """Return which tokens of each micro-batch are fitted on, and which judge, both bool (B, T).

    Every fourth window judges; of fewer windows than four the last one does. Padding does not
    count. Both are on the walk's device.
    """
    total = len(split_windows(walk.windows)[0])
    number, split = first_own_window(walk.windows), []
    for counted in walk.positions():
        numbers = torch.arange(number, number + len(counted), device=counted.device)
        judges = numbers % _HELD_OUT == _HELD_OUT - 1
        if total < _HELD_OUT:
            judges |= numbers == total - 1
        split.append((counted & ~judges[:, None], counted & judges[:, None]))
        number += len(counted)
    return split
