"""How a kind of step is checked and carried out: the entry that each step's file gives to apply."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from transformers import PreTrainedModel

from prunelight.calibration.windows import Windows
from prunelight.planning.steps import Step, renumber

StepT = TypeVar("StepT", bound=Step)


@dataclass(frozen=True)
class StepContext:
    """What a step needs beside the model.

    Attributes:
        windows: calibration windows; None if there is no data.
        device: where the layers compute, one at a time; None takes the model's own.
        offload: keep the calibration states on the CPU.
        earlier: the steps of the same plan that come before.
        dense: the model before the plan, for steps that need it.
    """

    windows: Windows | None = None
    device: torch.device | None = None
    offload: bool = False
    earlier: tuple[Step, ...] = ()
    dense: PreTrainedModel | None = None

    def after(self, step: Step) -> StepContext:
        """Return the context of the next step."""
        return replace(self, earlier=(*self.earlier, step))

    @property
    def removed(self) -> set[int]:
        """Return the layers of the dense model that earlier steps remove."""
        return {layer for step in self.earlier for layer in step.removed}

    @property
    def without_attention(self) -> set[int]:
        """Return the layers of the dense model whose attention earlier steps drop."""
        dropped = (step.dropped_sublayers.get("attention", ()) for step in self.earlier)
        return {layer for layers in dropped for layer in layers}

    def renumber(self, layers: Iterable[int]) -> list[int]:
        """Return the present indices of layers that a step names by those of the dense model."""
        return [renumber(layer, self.removed) for layer in layers]


@dataclass(frozen=True)
class StepKind(Generic[StepT]):
    """How one kind of step is checked and carried out.

    Attributes:
        check: raises ValueError or TypeError if the step does not fit the model, which is then
            unchanged.
        carry_out: changes the model in place. It returns a dataclass that says what the step did,
            or None where the step says all.
        follows_slicing: the step may come after a slice step of the same plan.
        needs_windows: tells whether the step runs the model on the calibration windows.
        rehearse: carries the step out, as far as that needs no data, in place on a model without
            weights (on the meta device); None: by `carry_out`. `apply` sees in this way whether the
            next steps can be carried out too.
        changes_weights: tells whether numbers of weights change in the memory where they are.
        needs_dense: the step reads the model before the plan.
    """

    check: Callable[[PreTrainedModel, StepT, StepContext], None]
    carry_out: Callable[[PreTrainedModel, StepT, StepContext], Any]
    follows_slicing: bool = False
    needs_windows: Callable[[StepT], bool] = lambda step: False
    rehearse: Callable[[PreTrainedModel, StepT, StepContext], Any] | None = None
    changes_weights: bool = False
    needs_dense: bool = False
