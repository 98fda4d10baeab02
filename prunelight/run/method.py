"""What a run asks of a pruning method, and what a method declares of itself.

A method recognises another one by what it declares, never by a class or an attribute. The callbacks
in `prunelight.callbacks` are such methods; a run needs no callback.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from transformers import PreTrainedModel

from prunelight.calibration.windows import Windows
from prunelight.planning.plan import Plan
from prunelight.run.run_state import Run


@runtime_checkable
class PruningMethod(Protocol):
    """A pruning method in a run.

    Attributes:
        version: raised when the same arguments lead to other decisions than before.
        device: where layers compute, set by the run; None: where the model is.
        gradual: prunes while the model trains, not at its start.
        slices: leaves hidden states in other bases than those of the dense model.
        follows_slicing: can prune a model whose hidden states were sliced.
        puts_zeros: puts zeros into weights, which a slicing after it would fill.
        drops_sublayers: leaves decoder layers without attention or MLP, or with a matrix at a gap.
        export_remote_code: the code of its model class goes beside the model.
    """

    version: int
    device: torch.device | None
    gradual: bool
    slices: bool
    follows_slicing: bool
    puts_zeros: bool
    drops_sublayers: bool
    export_remote_code: bool

    def arguments(self) -> dict[str, Any]:
        """Return the arguments that matter for the plan, as JSON values."""

    def check_run(self, run: Run, methods: Sequence[PruningMethod]) -> None:
        """Check the arguments against the run and the methods beside it."""

    def check(self, model: PreTrainedModel) -> None:
        """Check the arguments against the model, before any data is read."""

    def layers_left(self, total: int) -> int:
        """Return how many of the decoder layers stay, those that earlier methods left."""

    def widths(self, model: PreTrainedModel) -> dict[str, int]:
        """Return the widths of inputs that the method leaves, or their divisor, by source."""

    def check_calibration(self, model: PreTrainedModel, windows: Windows) -> None:
        """Check the calibration windows against the model."""

    def plan(self, model: PreTrainedModel, windows: Windows) -> Plan:
        """Decide what to prune; the model is unchanged afterwards."""

    def apply(
        self, model: PreTrainedModel, plan: Plan, windows: Windows, outcomes: list[dict[str, Any]]
    ) -> PreTrainedModel:
        """Carry out a plan; `outcomes` gets what each step did."""


def methods_among(callbacks: Iterable[Any]) -> list[PruningMethod]:
    """Return the callbacks that are pruning methods, in their order.

    Raises:
        TypeError: if one can plan and apply, and lacks something else that a run asks of a method;
            it would prune nothing.
    """
    members = [*PruningMethod.__annotations__, *vars(PruningMethod)]
    for callback in callbacks:
        missing = [m for m in members if not m.startswith("_") and not hasattr(callback, m)]
        if missing and not {"plan", "apply"}.intersection(missing):
            raise TypeError(
                f"{type(callback).__name__} lacks {', '.join(missing)} of a pruning method; derive "
                "it from prunelight.callbacks.PruningCallback"
            )
    return [callback for callback in callbacks if isinstance(callback, PruningMethod)]
