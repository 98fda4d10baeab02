"""How a kind of step is checked and carried out: the entry that each step's file gives to apply."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from transformers import PreTrainedModel

from prunelight.calibration.kept_layers import KeptLayers
from prunelight.calibration.windows import Windows, split_windows
from prunelight.models.families.layers import layers_path
from prunelight.models.placement import how_computed
from prunelight.planning.fingerprints import (
    describe_windows,
    fingerprint_of,
    library_versions,
    model_fingerprint,
)
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
        scratch: directory for layers that a step has finished; None holds them in memory.
    """

    windows: Windows | None = None
    device: torch.device | None = None
    offload: bool = False
    earlier: tuple[Step, ...] = ()
    dense: PreTrainedModel | None = None
    scratch: Path | None = None

    def after(self, step: Step) -> StepContext:
        """Return the context of the next step."""
        return replace(self, earlier=(*self.earlier, step))

    def kept_layers(self, model: PreTrainedModel, step: Step) -> KeptLayers | None:
        """Return the layers that a step finished before, and finishes now; None without scratch.

        Args:
            model: as the step gets it.
            step: its place in the plan names the folder.
        """
        if self.scratch is None:
            return None
        windows = None if self.windows is None else describe_windows(*split_windows(self.windows))
        identity = {
            "steps": fingerprint_of(*((x.kind, asdict(x)) for x in (*self.earlier, step))),
            "model": model_fingerprint(model),
            "dense": None if self.dense is None else model_fingerprint(self.dense),
            "windows": windows,
            **how_computed(model, self.device),
            "versions": library_versions(),
        }
        directory = self.scratch / f"step-{len(self.earlier)}"
        return KeptLayers(directory, identity, layers_path(model))

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
        keeps_layers: the step writes each layer that it has finished into `StepContext.scratch`.
    """

    check: Callable[[PreTrainedModel, StepT, StepContext], None]
    carry_out: Callable[[PreTrainedModel, StepT, StepContext], Any]
    follows_slicing: bool = False
    needs_windows: Callable[[StepT], bool] = lambda step: False
    rehearse: Callable[[PreTrainedModel, StepT, StepContext], Any] | None = None
    changes_weights: bool = False
    needs_dense: bool = False
    keeps_layers: bool = False
