"""Angular distance over consecutive decoder layers (Gromov et al., arXiv:2403.17887).

We take the raw output of the last layer; the released code takes the output of the final norm.
"""

# B sequences, T tokens, D hidden, L layers

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from prunelight.calibration.layer_readers import LayerReader, read_layers
from prunelight.calibration.shared_windows import group_of
from prunelight.calibration.statistics import check_finite
from prunelight.calibration.windows import Windows, last_positions, micro_batches
from prunelight.models.families.layers import decoder_layers
from prunelight.models.placement import compute_device
from prunelight.scoring.remembered import remembered


def angular_distance(x: Tensor, y: Tensor) -> Tensor:
    """Return the angle between paired vectors (..., D) as a share of pi, (...) (arXiv:2403.17887).

    Each angle is in [0, 1], dimensionless, computed in float32.
    """
    u, v = normalize(x.float(), dim=-1), normalize(y.float(), dim=-1)
    # Not arccos of the cosine: for a cosine near 1 it is off by 1e-4 in float32, above 1 it is NaN.
    return 2 * torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1)) / math.pi


@remembered
def angular_distances(model: PreTrainedModel, windows: Windows, size: int) -> list[float]:
    """Score every run of `size` consecutive decoder layers by angular distance.

    The distance is between the input of the first and the output of the last layer, at the last
    real token of each sequence, averaged over sequences (arXiv:2403.17887). The model is unchanged.

    Returns:
        Scores in [0, 1]; entry i is that of the layers i .. i + size - 1, for i = 0 .. L - size.

    Raises:
        ValueError: if the output of a layer, which is named, holds NaN or Inf, or all is padding.
    """
    reader = AngularReader(model, windows)
    read_layers(model, windows, [reader], label="angular distance")
    return reader.result([size])[size]


class AngularReader(LayerReader):
    """Reads what `angular_distances` returns, of any size.

    Args:
        model: whose layers are read.
        windows: all that will be read.
    """

    def __init__(self, model: PreTrainedModel, windows: Windows) -> None:
        self._group, self._num_layers = group_of(windows), len(decoder_layers(model))
        place = compute_device(model)
        # Rows and columns of the last real tokens of each micro-batch.
        self._lasts = [
            tuple(positions.to(place) for positions in last_positions(batch))
            for batch in micro_batches(model, windows)
        ]
        # Of each micro-batch, hidden states (B, D) of the last real tokens before layer 0 and after
        # each layer.
        self._states: list[list[Tensor]] = [[] for _ in self._lasts]

    def visit(self, batch: int, index: int, inputs: Tensor, outputs: Tensor) -> None:
        """Keep the states of the last tokens of a micro-batch."""
        states = (inputs, outputs)[index > 0 :]
        self._states[batch].extend(state[self._lasts[batch]] for state in states)
        if batch == 0 and index == self._num_layers - 1:
            _check(self._states[0][1:])  # a model of no use is found early, at the cost of one wait

    def leave(self, index: int) -> None:
        """Check a layer as soon as it is read.

        Raises:
            ValueError: if its output holds NaN or Inf.
        """
        for of_batch in self._states:
            _check(of_batch[-1:], index)

    def result(self, sizes: Collection[int]) -> dict[int, list[float]]:
        """Return the distances of each number of layers: size -> scores.

        Raises:
            ValueError: if the output of a layer, which is named, holds NaN or Inf, or all is
                padding.
        """
        totals = {size: torch.zeros(self._num_layers - size + 1).double() for size in sizes}
        for of_batch in self._states:
            _check(of_batch[1:])
            for size, total in totals.items():
                starts, ends = torch.stack(of_batch[: len(total)]), torch.stack(of_batch[size:])
                total += angular_distance(starts, ends).sum(1).cpu().double()
        (samples,) = self._group.totals(sum(len(rows) for rows, _ in self._lasts))
        if samples == 0:
            raise ValueError("0 tokens were counted; mask less")
        return {size: (self._group.sum(x) / samples).tolist() for size, x in totals.items()}


def _check(states: list[Tensor], first: int = 0) -> None:
    """Check the states of a micro-batch after some layers, of which `first` is the first."""
    norms = torch.stack([state.float().norm() for state in states]).tolist()
    for index, (norm, state) in enumerate(zip(norms, states, strict=True), start=first):
        check_finite(index, norm, state)
