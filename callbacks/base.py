"""What all pruning callbacks share: what they declare, and when they act in a fit.

A method overrides `plan` and `check`. The first pruning callback of the Trainer starts the run with
all of them, in list order, in `setup`: before the optimizer exists, see `prunelight.run.start`.
"""

from __future__ import annotations

import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from transformers import PreTrainedModel

from prunelight.calibration.shared_windows import group_of
from prunelight.calibration.windows import Windows, check_windows, split_windows
from prunelight.models.families.layers import decoder_layers, layers_path
from prunelight.moved import warn_of_old_name
from prunelight.planning.fingerprints import describe_model, describe_windows
from prunelight.planning.plan import Plan
from prunelight.planning.steps import Step
from prunelight.pruning.apply import apply
from prunelight.pruning.drop_sublayers import check_droppable
from prunelight.pruning.healing.ends import heal_step
from prunelight.pruning.healing.gap_operator import check_operators
from prunelight.pruning.healing.stand_ins import leave_stand_ins
from prunelight.pruning.healing.writers import check_healable
from prunelight.run.method import PruningMethod
from prunelight.run.run_state import Run
from prunelight.run.start import start
from prunelight.run.strategies import Place
from prunelight.training.own_module import prune_after_setup
from prunelight.training.recovery_module import RecoveryModule
from prunelight.training.resuming.checkpoint_io import use_safe_files
from prunelight.training.trainer import pruning_methods

log = logging.getLogger(__name__)

Healing: TypeAlias = Literal["none", "linear", "layer"]  # see docs/healing.md
DepthHealing: TypeAlias = Literal["none", "linear", "operator", "layer", "mlp"]  # of removed layers

# What stands in for removed layers -> what that is, how it leaves layers, and what could be done.
OWN_CLASS_HEALING = {
    "mlp": ("MLPs", "without attention", ", or export to decilm for vLLM"),
    "operator": ("matrices", "with a matrix behind them", ", or take heal='linear'"),
}


class PruningCallback(Callback, ABC):
    """Base of all pruning methods; `plan` and `prunelight.apply` work without a Trainer too."""

    version = 1  # raise it when the same arguments lead to other decisions than before
    device: torch.device | None = None  # where layers compute; None: where the model is
    offload_activations = False  # keep calibration states on the CPU
    gradual = False  # prunes while the model trains, not at fit start
    slices = False  # leaves hidden states that are not those of the dense model
    puts_zeros = False  # puts zeros into weights, which a slicing after it would fill
    drops_sublayers = False  # leaves layers without attention or MLP, or with a matrix at a gap
    follows_slicing = False  # can prune a model whose hidden states were sliced
    export_remote_code = False  # leaves a class of ours whose code goes beside the model
    heal: DepthHealing = "none"

    @abstractmethod
    def plan(self, model: PreTrainedModel, windows: Windows) -> Plan:
        """Decide what to prune; the model is unchanged afterwards."""

    def arguments(self) -> dict[str, Any]:
        """Return the constructor's arguments that matter for the plan, as JSON values."""
        names = [*inspect.signature(type(self)).parameters]  # each is kept under its own name
        return {name: getattr(self, name) for name in names if name != "offload_activations"}

    def make_plan(
        self,
        model: PreTrainedModel,
        windows: Windows,
        *steps: Step,
        scores: Mapping[str, Sequence[float | None]],
        found: dict[str, Any] | None = None,
    ) -> Plan:
        """Return the plan of these steps, with what it was made from; on all ranks rank 0's.

        With `heal` a step that heals what they take follows them.
        """
        if self.heal == "mlp":
            steps = leave_stand_ins(model, steps)
        if self.heal != "none":
            mode = "layer" if self.heal == "mlp" else self.heal
            healing = heal_step(steps, len(decoder_layers(model)), layers_path(model), mode)
            if not healing and any(step.named for step in steps):
                log.warning(
                    "heal=%r has nothing to fit: no layer lies before what goes; the plan heals "
                    "nothing",
                    self.heal,
                )
            steps = (*steps, *healing)
        plan = Plan(
            method=type(self).__name__,
            arguments=self.arguments(),
            model=describe_model(model, len(decoder_layers(model))),
            calibration=describe_windows(*split_windows(windows)),
            scores=scores,
            found=found or {},
            steps=steps,
        )
        return group_of(windows).run_on_rank_zero(lambda: plan)

    def decided(self, *arguments: Any, **named: Any) -> Plan:
        """Old name of `make_plan`, which goes with the next release."""
        warn_of_old_name("PruningCallback.decided", "PruningCallback.make_plan")
        return self.make_plan(*arguments, **named)

    @abstractmethod
    def check(self, model: PreTrainedModel) -> None:
        """Check the arguments against the model, before any data is read.

        Raises:
            ValueError: if they ask for something that this model cannot give.
        """

    def layers_left(self, total: int) -> int:
        """Return how many of `total` decoder layers the method leaves, if that is known before.

        A method may follow another one in a run, and finds fewer layers than the model has.

        Raises:
            ValueError: if it cannot remove as many layers as it is asked to.
        """
        return total

    def widths(self, model: PreTrainedModel) -> dict[str, int]:
        """Return widths of inputs that the method will leave, or their divisor, by what sets them.

        `quantization.check_widths` holds them against 4-bit kernels before anything is computed.
        """
        return {}

    def check_run(self, run: Run, methods: Sequence[PruningMethod]) -> None:
        """Check the arguments against the run and the methods beside it, before all else."""

    def check_calibration(self, model: PreTrainedModel, windows: Windows) -> None:
        """Check the calibration windows against the model, before anything is computed.

        Raises:
            ValueError: if the model cannot read them, or they do not suffice.
        """
        check_windows(model, windows)
        if self.heal == "mlp":
            check_droppable(model)
        if self.heal == "operator":
            check_operators(model)
        if self.heal != "none":
            check_healable(model, windows, self.heal)

    def apply(
        self, model: PreTrainedModel, plan: Plan, windows: Windows, outcomes: list[dict[str, Any]]
    ) -> PreTrainedModel:
        """Carry out the plan at fit start; `outcomes` gets what each step did."""
        places: dict[str, Any] = {"device": self.device, "offload": self.offload_activations}
        return apply(model, plan, windows, outcomes=outcomes, **places)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prune at the start of a fit; Lightning calls it."""
        use_safe_files(trainer)
        methods = pruning_methods(trainer)
        if stage != "fit" or self is not methods[0]:
            return
        if not isinstance(pl_module, RecoveryModule):
            prune_after_setup(trainer, pl_module, methods)
            return
        run = pl_module.run
        run.attach(Place(trainer))
        run.gradual = any(method.gradual for method in methods)
        if run.base is None:  # a second fit goes on with the pruned model
            start(run, methods)


def check_depth_healing(
    heal: str,
    granularity: str = "layer",
    parameter_ratio: float | None = None,
    loads_in: Sequence[str] | None = None,
) -> None:
    """Check that what stands in for removed layers goes with other arguments of a method.

    Raises:
        ValueError: if it does not.
    """
    if heal not in OWN_CLASS_HEALING:
        return
    stands_in, leaves, instead = OWN_CLASS_HEALING[heal]
    if granularity != "layer":
        raise ValueError(
            f"heal={heal!r} lets {stands_in} stand in for whole layers, not for granularity="
            f"{granularity!r}; take granularity='layer', or heal='layer'"
        )
    if parameter_ratio is not None:
        raise ValueError(
            f"parameter_ratio={parameter_ratio} counts whole layers, and heal={heal!r} adds "
            f"{stands_in} for each run; give num_layers or ratio"
        )
    if loads_in:
        raise ValueError(
            f"loads_in={[*loads_in]} needs a stock class, and heal={heal!r} leaves layers "
            f"{leaves}, which none has; leave one of them out{instead}"
        )
