"""Gradual sparsity: the share of zeros rises while the model trains.

The share rises along a cubic (Zhu & Gupta, arXiv:1710.01878) or linear curve. The solver scores the
current weights with running norms of the training inputs, so that its choice follows the training.
A pruned weight stays pruned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from prunelight.calibration.layer_inputs.input_statistics import InputStatistics
from prunelight.calibration.statistics import InputNorm
from prunelight.models.families.matrices import Matrix
from prunelight.pruning.sparsity.masks import Amount, Pattern, matrix_mask, row_mask
from prunelight.recovery.sharded_weights import whole_tensor
from prunelight.runtime.arguments import at_least, check_fields
from prunelight.runtime.processes import ProcessGroup
from prunelight.scoring.weight_scores import wanda_scores

CURVES = ("cubic", "linear")

_DECAY = 0.9  # of the running norms, per training batch


@dataclass(frozen=True)
class Schedule:
    """When sparsity rises: from 0 after `start_step` optimizer steps to the target at `end_step`.

    Attributes:
        start_step: optimizer step from which sparsity rises; there are no zeros yet.
        end_step: optimizer step after which all zeros are there; the masks then stay.
        every: optimizer steps between two changes.
        curve: "cubic" rises fast at first and slowly at the end, "linear" evenly.

    Raises:
        ValueError: if a value is out of range.
    """

    start_step: int
    end_step: int
    every: int = 10
    curve: Literal["cubic", "linear"] = "cubic"

    def __post_init__(self) -> None:
        """Check the values."""
        check_fields(self, "schedule.", start_step=at_least(0), every=at_least(1))
        if self.start_step >= self.end_step:
            raise ValueError(
                f"schedule.start_step={self.start_step} must be at least 0 and below "
                f"end_step={self.end_step}"
            )

    def due(self, step: int) -> bool:
        """Return whether zeros are added after this optimizer step."""
        inside = self.start_step < step <= self.end_step
        return inside and (step == self.end_step or (step - self.start_step) % self.every == 0)

    def progress(self, step: int) -> float:
        """Return the share of the planned zeros after a step, in [0, 1]."""
        remaining = 1 - (step - self.start_step) / (self.end_step - self.start_step)
        remaining = min(max(remaining, 0.0), 1.0)
        return 1 - (remaining**3 if self.curve == "cubic" else remaining)


class RunningNorm(InputNorm):
    """Squared norms of input features, in which older batches count less and less."""

    def update(self, x: Tensor) -> None:
        """Add tokens (T, I) of a batch."""
        self.squares = _DECAY * self.squares
        super().update(x)


class GradualMasks:
    """The running input norms of a training, and the masks that follow from these norms.

    Args:
        amounts: matrix name -> matrix and its planned amount of zeros.
        schedule: optimizer steps after which zeros are added.
        solver: "wanda" or "magnitude".
        group: processes that train together; all must make the same calls.
    """

    def __init__(
        self,
        amounts: Mapping[str, tuple[Matrix, Amount]],
        schedule: Schedule,
        solver: str,
        group: ProcessGroup,
    ) -> None:
        self.amounts, self.schedule, self.solver = dict(amounts), schedule, solver
        self.group = group
        watched = [matrix for matrix, _ in amounts.values() if solver == "wanda"]
        self._input_norms = InputStatistics(watched, RunningNorm)

    def watching(self, mask: Tensor | None) -> AbstractContextManager[None]:
        """Add the inputs of all forwards within this context to the running norms.

        Args:
            mask: bool (B, T), True on tokens that count; None counts all tokens.
        """
        return self._input_norms.watching(mask)

    @torch.no_grad()
    def masks(
        self,
        step: int,
        kept: Callable[[str], Tensor],
        weight: Callable[[Matrix], Tensor],
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the name of each matrix and its new mask (True on kept weights) after a step.

        Args:
            step: number of optimizer steps done.
            kept: returns the present mask of a matrix, shaped as its parameter.
            weight: returns the present weight, adapters included, shaped as the parameter.
        """
        progress = self.schedule.progress(step)
        self._average()
        for name, (matrix, amount) in self.amounts.items():
            old_mask, current = kept(name), weight(matrix)
            new_mask = torch.empty_like(old_mask)
            views = (matrix.views(tensor) for tensor in (current, old_mask, new_mask))
            for index, (W, old, new) in enumerate(zip(*views, strict=True)):
                scores = W.abs().float()
                if self.solver == "wanda":
                    norms = self._input_norms.of(matrix)[index].norms()
                    scores = wanda_scores(W, norms.to(W.device))
                scores = scores.masked_fill(~old, -1)  # once pruned, always pruned
                new.copy_(~self._choose(scores, amount, progress))
            yield name, new_mask

    def _choose(self, scores: Tensor, amount: Amount, progress: float) -> Tensor:
        if isinstance(amount, Pattern):
            zeros = int((amount.of - amount.kept) * progress + 1e-9)
            return row_mask(scores, Pattern(amount.of - zeros, amount.of))
        share = amount * progress
        if self.solver == "wanda":
            return row_mask(scores, share)
        return matrix_mask(scores, int(scores.numel() * share + 1e-6))

    def _average(self) -> None:
        self._input_norms.reduce(lambda squares: self.group.sum(squares) / self.group.size)

    def state_dict(self) -> dict[str, Any]:
        """Return the running norms, averaged: all processes go on from those that rank 0 writes."""
        self._average()
        return self._input_norms.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the running norms of an earlier run; an empty state changes nothing."""
        if state:
            self._input_norms.load_state_dict(state)


@torch.no_grad()
def weights_with_adapters(model: nn.Module) -> Callable[[Matrix], Tensor]:
    """Return a function: matrix -> its weight as merging would leave it, with zeros kept."""
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
