"""Zeros that are added while a model trains: the Lightning hooks of a pruning schedule.

Which weights become zero, and when, is computed in prunelight/recovery/zeros/gradual_zeros.py.
The hooks here watch the inputs of a training, add the zeros and keep the state for a checkpoint.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from peft import PeftModel

from prunelight.callbacks.base import PruningCallback
from prunelight.models.families.layers import layers_path
from prunelight.planning.plan import Plan, planned_sparsity
from prunelight.planning.steps import Sparsify
from prunelight.pruning.sparsity.sparsify import amount_of
from prunelight.recovery.zeros.gradual_zeros import GradualMasks, Schedule, weights_with_adapters
from prunelight.run.checkpoints import state_arguments
from prunelight.run.method import PruningMethod
from prunelight.run.run_state import Run
from prunelight.run.strategies import group_of_run
from prunelight.training.recovery_module import RecoveryModule
from prunelight.training.trainer import pruning_methods

log = logging.getLogger(__name__)

GRADUAL_SOLVERS = ("wanda", "magnitude")


class GradualZeros(PruningCallback):
    """Base of a method that can add its planned zeros along a schedule.

    Args:
        solver: what chooses the weights that become zero.
        schedule: when zeros are added; None prunes at fit start, and no hook here acts.

    Raises:
        ValueError: if the solver cannot choose weights during a training.
    """

    puts_zeros = True

    def __init__(self, solver: str, schedule: Schedule | None) -> None:
        if schedule is not None and solver not in GRADUAL_SOLVERS:
            raise ValueError(
                f"solver={solver!r} has no gradual form; with a schedule take one of "
                f"{', '.join(GRADUAL_SOLVERS)}"
            )
        self.solver = solver
        self.schedule = schedule
        self.gradual = schedule is not None
        self._growth: GradualMasks | None = None  # from on_train_start on
        self._watched_inputs = ExitStack()
        self._loaded_norms: dict[str, Any] = {}  # of the checkpoint that the run goes on from
        self._last_step = 0  # optimizer steps after which zeros were last added

    @abstractmethod
    def sparsify_step(self, sparsity: dict[str, float]) -> Sparsify:
        """Return the plan's step for these shares of zeros, {name of a matrix: share}."""

    def check_run(self, run: Run, methods: Sequence[PruningMethod]) -> None:
        """Check that the schedule fits the training.

        Raises:
            ValueError: if nothing is trained, zeros are not kept, weights are quantized, the
                training ends before the schedule, or the module is none of prunelight's.
        """
        if self.schedule is None:
            return
        if run.place.stage != "fit":
            raise ValueError(f"{self.schedule} prunes while the model trains; use fit, not prune")
        settings = run.settings
        if settings.quantization != "none":
            raise ValueError(
                f"a schedule puts zeros into weights, quantization={settings.quantization} packs "
                "them; prune at fit start (schedule=null), or set quantization=none"
            )
        if not isinstance(run.holder, RecoveryModule):
            raise ValueError(
                f"{self.schedule} prunes while a prunelight RecoveryModule trains, and this is a "
                f"{type(run.holder).__name__}; prune at fit start (schedule=None)"
            )
        if settings.recovery == "none" or not settings.keep_zeros:
            raise ValueError(
                f"a schedule prunes while the model trains and keeps the zeros: recovery="
                f"{settings.recovery!r} must be lora or full, keep_zeros={settings.keep_zeros} True"
            )
        if settings.compile_backend is not None:
            raise ValueError(
                f"a schedule watches inputs inside the decoder layers, which compile_backend="
                f"{settings.compile_backend!r} does not show; set it to None"
            )
        steps = run.place.optimizer_steps()
        if self.schedule.end_step > steps:
            raise ValueError(
                f"schedule.end_step={self.schedule.end_step} must not come after the end of "
                f"training, {steps:.0f} optimizer steps; raise trainer.max_steps or lower it"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the matrices that get zeros, and how many each gets."""
        if self.schedule is None:
            return
        assert isinstance(pl_module, RecoveryModule)
        assert pl_module.masks is not None
        assert pl_module.record is not None
        model = pl_module.model
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        plans = [Plan.from_dict(plan) for plan in pl_module.record.plans]
        own = plans[pruning_methods(trainer).index(self)]  # those beside it have other targets
        step = self.sparsify_step(planned_sparsity(plans, layers_path(base), of=own))
        matrices = pl_module.masks.matrices
        self._growth = GradualMasks(
            {name: (matrices[name], amount_of(step, name)) for name in step.sparsity},
            self.schedule,
            self.solver,
            group_of_run(trainer),
        )
        self._growth.load_state_dict(self._loaded_norms)
        self._loaded_norms = {}
        self._last_step = trainer.global_step

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Watch the inputs of the matrices, as long as zeros are still to come."""
        if self._growth is not None and trainer.global_step < self._growth.schedule.end_step:
            mask = batch.get("attention_mask")
            self._watched_inputs.enter_context(
                self._growth.watching(None if mask is None else mask.bool())
            )

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Any) -> None:
        """Stop watching: gradient checkpointing runs the layers again in the backward."""
        self._watched_inputs.close()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add zeros after the optimizer steps at which they are due."""
        self._watched_inputs.close()
        step, growth = trainer.global_step, self._growth
        if growth is None or step == self._last_step or not growth.schedule.due(step):
            return
        self._last_step = step
        assert isinstance(pl_module, RecoveryModule)
        masks = pl_module.masks
        assert masks is not None
        weight = weights_with_adapters(pl_module)
        for name, mask in growth.masks(step, lambda name: ~masks.pruned(name), weight):
            masks.update(name, mask)
        for optimizer in trainer.optimizers:
            masks.apply(optimizer)
        share = masks.share()
        pl_module.log("prune/sparsity", share)
        log.info("step %d: %.1f %% of the decoder linears are zero", step, 100 * share)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if the training ended before the schedule."""
        if self.schedule is not None and self._last_step < self.schedule.end_step:
            log.warning(
                "training ended after step %d, before schedule.end_step=%d: the planned zeros are "
                "not all there",
                trainer.global_step,
                self.schedule.end_step,
            )

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave no hooks behind."""
        self._watched_inputs.close()

    @property
    def state_key(self) -> str:
        """Return a key of its own for each set of arguments: a run may hold several methods."""
        return self._generate_state_key(**state_arguments(self))

    def state_dict(self) -> dict[str, Any]:
        """Return the running norms, for a checkpoint."""
        return {} if self._growth is None else self._growth.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over the running norms of a checkpoint."""
        self._loaded_norms = dict(state_dict)
