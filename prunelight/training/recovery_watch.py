"""What watches a recovery: does it overfit, and which of its steps was best."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from prunelight.models.sizes import parameter_count
from prunelight.recovery.overfitting import (
    METRIC,
    TrainingText,
    ValidationPoint,
    overfit_risk,
    overfitting,
)
from prunelight.recovery.sharded_weights import is_sharded
from prunelight.run.run_state import Run
from prunelight.run.strategies import FSDP2Strategy, group_of_run
from prunelight.runtime.processes import ProcessGroup
from prunelight.training.curves import TrainingCurves
from prunelight.training.finite_training import FiniteTraining, loss_of
from prunelight.training.resuming.checkpoint_io import finish_writing

log = logging.getLogger(__name__)


def best_checkpoint(trainer: Trainer) -> str:
    """Return the best checkpoint of the first ModelCheckpoint that monitors validation, or ""."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and str(callback.monitor).startswith("val/"):
            return callback.best_model_path
    return ""


def restore(trainer: Trainer, module: WatchedModule, path: str) -> None:
    """Load the trained weights of a checkpoint, and the masks with them, on every rank."""
    strategy = trainer.strategy
    if isinstance(strategy, FSDP2Strategy):
        checkpoint = strategy.load_weights(path)
    else:
        checkpoint = strategy.load_checkpoint(path, weights_only=True)
    trained = module.tokens_seen
    module.load_trained(checkpoint)
    module.tokens_seen = trained  # in all steps: what the run took
    if not is_sharded(module):
        trainer.strategy.load_model_state_dict(checkpoint, strict=False)
    module.restored_step = int(checkpoint["global_step"])
    log.info("the weights are those of step %d, the best: %s", module.restored_step, path)


def training_text(trainer: Trainer) -> TrainingText | None:
    """Return the text that a Trainer trains on; None if its data is no TextDataModule."""
    batches = trainer.world_size * trainer.accumulate_grad_batches
    return TrainingText.of(getattr(trainer, "datamodule", None), batches)


class RecoveryWatch(Callback):
    """Warns of overfitting, and ends the fit with the best weights; every RecoveryModule has it."""

    def __init__(self) -> None:
        self.history: list[ValidationPoint] = []
        self._loss: Tensor | float = 0.0  # summed since the last validation, on its device
        self._batches: float = 0
        self._group = ProcessGroup()

    # A run that is started again after its last step has no on_train_start and no on_train_end; its
    # report must say the same.

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn before anything is trained, of lost precision and of too little text."""
        if not isinstance(pl_module, WatchedModule):  # a later fit of the same Trainer
            return
        self._group = group_of_run(trainer)
        run = pl_module.run
        for loss in run.precision_losses:
            run.warn(loss)
        text, recovery = training_text(trainer), run.settings.recovery
        if text is None or recovery == "none":
            return
        parameters = parameter_count(pl_module, trainable=True)
        risk = overfit_risk(recovery, text, trainer.estimated_stepping_batches, parameters)
        if risk is not None:
            run.warn(risk)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any
    ) -> None:
        """Add the loss of a batch, without waiting for the device."""
        loss = loss_of(outputs)
        if loss is None:
            return
        # Lightning has divided it by the batches of an optimizer step.
        loss = loss.detach() * trainer.accumulate_grad_batches
        self._loss, self._batches = self._loss + loss, self._batches + 1

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the result of a validation during training."""
        if self._batches and METRIC in trainer.callback_metrics:
            loss, batches = self._group.totals(float(self._loss), self._batches)
            loss /= batches
            perplexity = float(trainer.callback_metrics[METRIC])
            self.history.append(ValidationPoint(trainer.global_step, perplexity, loss))
            self._loss, self._batches = 0.0, 0

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn of overfitting, and take over the best weights, on every rank, before the merge."""
        if not isinstance(pl_module, WatchedModule):
            return
        # All ranks look for the best file, which a thread of rank 0 may still write.
        self._group.run_on_rank_zero(partial(finish_writing, trainer))
        sentence = overfitting(self.history)
        if sentence is not None:
            pl_module.run.warn(sentence)
        path = best_checkpoint(trainer) if pl_module.restore_best else ""
        pl_module.restored_step = None
        if path and Path(path).exists():
            restore(trainer, pl_module, path)
        elif path:
            pl_module.run.warn(
                f"the best checkpoint {path} is gone: the result has the weights of the last step"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the validations so far and the loss since then; all processes must call this."""
        totals = self._group.totals(float(self._loss), self._batches)
        loss, batches = (total / self._group.size for total in totals)
        history = [(e.step, e.perplexity, e.training_loss) for e in self.history]
        return {"history": history, "loss": loss, "batches": batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the validations of the run that wrote the checkpoint."""
        self.history = [ValidationPoint(*values) for values in state_dict["history"]]
        # Not in checkpoints of version 0.2.
        self._loss, self._batches = state_dict.get("loss", 0.0), state_dict.get("batches", 0)


class WatchedModule(LightningModule):
    """What Lightning asks of every recovery: who watches it, and what a cast may not touch.

    Attributes:
        run: the state of the run.
        restore_best: end with the best weights if a ModelCheckpoint monitors a metric `val/...`.
        restored_step: optimizer step whose weights the fit ended with; None for the last step.
        tokens_seen: tokens that all processes trained on, without padding.
    """

    run: Run
    restore_best: bool
    restored_step: int | None = None
    tokens_seen: int = 0

    def load_trained(self, checkpoint: dict[str, Any]) -> None:
        """Take over what a checkpoint says of the training, beside its weights, in place."""
        raise NotImplementedError

    def configure_callbacks(self) -> list[Callback]:
        """Return the callbacks that watch; Lightning calls it."""
        return [FiniteTraining(), RecoveryWatch(), TrainingCurves(self.run)]

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move, and cast all but trained adapters, in place: bf16-true casts whole modules.

        Shards are cast before they are cut, see `RecoveryModule.configure_model`.
        """
        if is_sharded(self):
            if not args and set(kwargs) == {"dtype"}:
                return self
            return super().to(*args, **kwargs)
        adapters = [p for n, p in self.named_parameters() if p.requires_grad and "lora_" in n]
        values = [parameter.data for parameter in adapters]
        super().to(*args, **kwargs)
        for parameter, value in zip(adapters, values, strict=True):
            parameter.data = value.to(parameter.device)
        return self
