"""Gradual sparsity: zeros that become more while the model trains.

The share of zeros rises along a cubic (Zhu & Gupta, arXiv:1710.01878) or linear curve. Scores are
those of the solver on the weights of the moment and on running norms of the training inputs, so
that the choice follows what training does. A weight once pruned stays pruned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from prunelight.calibration.input_statistics import InputStatistics
from prunelight.calibration.statistics import InputNorm
from prunelight.models.families.layers import Matrix
from prunelight.pruning.sparsity.masks import Amount, Pattern, matrix_mask, row_mask
from prunelight.recovery.sharded_weights import whole_tensor
from prunelight.runtime.arguments import check_choice
from prunelight.runtime.processes import ProcessGroup
from prunelight.scoring.weight_scores import wanda_scores

CURVES = ("cubic", "linear")

_DECAY = 0.9  # of the running norms, a training batch


@dataclass(frozen=True)
class Schedule:
    """When sparsity rises: from 0 after `start_step` optimizer steps to the target at `end_step`.

    Attributes:
        start_step: optimizer step after which the first zeros are made.
        end_step: optimizer step after which all are made; the masks then stay.
        every: steps between two changes.
        curve: "cubic" is fast at first and slow at the end, "linear" even.

    Raises:
        ValueError: if a value is out of range.
    """

    start_step: int
    end_step: int
    every: int = 10
    curve: Literal["cubic", "linear"] = "cubic"

    def __post_init__(self) -> None:
        """Check the values."""
        if not 0 <= self.start_step < self.end_step:
            raise ValueError(
                f"schedule.start_step={self.start_step} must be at least 0 and below "
                f"end_step={self.end_step}"
            )
        if self.every < 1:
            raise ValueError(f"schedule.every={self.every} must be at least 1")
        check_choice("schedule.curve", self.curve, CURVES)

    def due(self, step: int) -> bool:
        """Return whether zeros are added after this optimizer step."""
        inside = self.start_step < step <= self.end_step
        return inside and (step == self.end_step or (step - self.start_step) % self.every == 0)

    def progress(self, step: int) -> float:
        """Return the share of the planned zeros after a step, in [0, 1]."""
        left = 1 - (step - self.start_step) / (self.end_step - self.start_step)
        left = min(max(left, 0.0), 1.0)
        return 1 - (left**3 if self.curve == "cubic" else left)


class RunningNorm(InputNorm):
    """Squared norms of input features that forget older batches."""

    def update(self, x: Tensor) -> None:
        """Add tokens (T, I) of a batch."""
        self.squares = _DECAY * self.squares
        super().update(x)


class Gradual:
    """The running norms of a training and the masks that follow from them.

    Args:
        found: the matrices, each with its planned amount of zeros.
        schedule: when.
        solver: "wanda" or "magnitude".
        group: that train together; all must make the same calls.
    """

    def __init__(
        self,
        found: Mapping[str, tuple[Matrix, Amount]],
        schedule: Schedule,
        solver: str,
        group: ProcessGroup,
    ) -> None:
        self.found, self.schedule, self.solver = dict(found), schedule, solver
        self.group = group
        scored = [matrix for matrix, _ in found.values() if solver == "wanda"]
        self._seen = InputStatistics(scored, RunningNorm)

    def watching(self, mask: Tensor | None) -> AbstractContextManager[None]:
        """Add the inputs of the forwards inside to the running norms."""
        return self._seen.watching(mask)

    @torch.no_grad()
    def masks(
        self,
        step: int,
        kept: Callable[[str], Tensor],
        weight: Callable[[Matrix], Tensor],
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield each matrix' name and which of its weights are kept after an optimizer step.

        Args:
            step: optimizer steps done.
            kept: gives the mask of a matrix so far, shaped as its parameter.
            weight: gives the weight of the moment, adapters included, shaped as the parameter.
        """
        progress = self.schedule.progress(step)
        self._average()
        for name, (matrix, amount) in self.found.items():
            old, now = kept(name), weight(matrix)
            new = torch.empty_like(old)
            views = zip(matrix.views(now), matrix.views(old), matrix.views(new), strict=True)
            for place, (view, before, target) in enumerate(views):
                scores = view.abs().float()
                if self.solver == "wanda":
                    norms = self._seen.of(matrix)[place].norms()
                    scores = wanda_scores(view, norms.to(view.device))
                scores = scores.masked_fill(~before, -1)  # once pruned, always pruned
                target.copy_(~self._choose(scores, amount, progress))
            yield name, new

    def _choose(self, scores: Tensor, amount: Amount, progress: float) -> Tensor:
        if isinstance(amount, Pattern):
            zeros = int((amount.of - amount.kept) * progress + 1e-9)
            return row_mask(scores, Pattern(amount.of - zeros, amount.of))
        share = amount * progress
        if self.solver == "wanda":
            return row_mask(scores, share)
        return matrix_mask(scores, int(scores.numel() * share + 1e-6))

    def _average(self) -> None:
        self._seen.reduce(lambda squares: self.group.sum(squares) / self.group.size)

    def state_dict(self) -> dict[str, Any]:
        """Return the running norms, averaged: all ranks go on from those that rank 0 writes."""
        self._average()
        return self._seen.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the running norms of an earlier run, if there are any."""
        if state:
            self._seen.load_state_dict(state)


@torch.no_grad()
def weights_with_adapters(model: nn.Module) -> Callable[[Matrix], Tensor]:
    """Return a function that gives the weight of a matrix as merging would leave it, zeros kept."""
    adapters: dict[tuple[nn.Module, str], Any] = {
        (layer.get_base_layer(), getattr(layer, "parameter_name", "weight")): layer
        for layer in model.modules()
        if isinstance(layer, LoraLayer)
    }

    def weight(matrix: Matrix) -> Tensor:
        stored = whole_tensor(matrix.parameter.detach())
        layer = adapters.get((matrix.owner, matrix.parameter_name))
        if layer is None:
            return stored
        delta = sum(whole_tensor(layer.get_delta_weight(name)) for name in layer.active_adapters)
        return stored + (stored != 0) * delta

    return weight
