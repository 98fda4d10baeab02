"""RecoveryCheckpoint: the checkpoint from which a killed run goes on exactly.

Lightning's ModelCheckpoint writes into a new directory at each start. After a resume it saves in
the middle of accumulated gradients, and before a validation that the resumed run then skips.
RecoveryCheckpoint writes `checkpoints/last.ckpt` in the run's directory, only after a complete
optimizer step, and after the validation if one is due. Other checkpoint callbacks may stand beside
it, for example to keep the best model.

Private names of Lightning used here: the Trainer's `_signal_connector`, ModelCheckpoint's methods
and counters, and three of the fit loop. Tested with lightning 2.6.
"""

from __future__ import annotations

from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from prunelight.run.strategies import group_of_run
from prunelight.runtime.arguments import NOT_EMPTY, at_least, checked


class RecoveryCheckpoint(ModelCheckpoint):
    """Write `last.ckpt` every few optimizer steps, at SIGTERM and at the end of training.

    `trainer.fit(..., ckpt_path="last")` finds it. The command line adds one by itself.

    Args:
        every_n_train_steps: optimizer steps between two checkpoints; a kill costs at most so many.
        dirpath: directory of the checkpoint; None takes `checkpoints` in
            `trainer.default_root_dir`.

    Raises:
        ValueError: if `every_n_train_steps` is below 1.
    """

    @checked(every_n_train_steps=at_least(1), dirpath=NOT_EMPTY)
    def __init__(self, every_n_train_steps: int = 50, dirpath: str | None = None) -> None:
        super().__init__(
            dirpath=dirpath,
            save_top_k=0,
            save_last=True,
            every_n_train_steps=every_n_train_steps,
            enable_version_counter=False,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set the directory, and take SIGTERM over for a fit; Lightning calls this hook.

        Lightning's own handler calls the other processes at any moment of their work, and ends a
        validation before the step is saved.
        """
        self._set_directory(trainer)
        self._terminated = False
        self._launcher = trainer.strategy.launcher
        vars(trainer._signal_connector).pop("_sigterm_notifier_fn", None)  # of an earlier fit
        if stage == "fit":
            vars(trainer._signal_connector)["_sigterm_notifier_fn"] = self._note_sigterm
        super().setup(trainer, pl_module, stage)

    def _note_sigterm(self, signum: int, _: FrameType | None) -> None:
        if not self._terminated and self._launcher is not None:
            self._launcher.kill(signum)  # passes the signal to processes that this one started
        self._terminated = True

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        self._set_directory(trainer)
        return super()._find_last_checkpoints(trainer)

    def _set_directory(self, trainer: Trainer) -> None:
        if self.dirpath is None:
            self.dirpath = str(Path(trainer.default_root_dir).resolve() / "checkpoints")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if a checkpoint is due and no validation follows."""
        loop = trainer.fit_loop
        assert loop._data_fetcher is not None
        if not loop.epoch_loop._should_check_val_fx(loop._data_fetcher):
            self._save_if_due(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if a checkpoint is due; other callbacks have read the metrics by now."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save_if_due(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing: `on_train_batch_end` has saved already."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the trained model, so that a run killed later need not train again."""
        self._save(trainer)

    def _save_if_due(self, trainer: Trainer) -> None:
        step, accumulating = trainer.global_step, trainer.fit_loop._should_accumulate()
        if accumulating or step == self._last_global_step_saved:  # a checkpoint holds no gradients
            return
        # All processes must save and end at the same step, but the signal reaches each at another
        # moment. They agree on the CPU, so that the device goes on working.
        terminated = group_of_run(trainer).any(self._terminated)
        if terminated or step % self._every_n_train_steps == 0:
            self._save(trainer)
            trainer._signal_connector.received_sigterm = terminated  # Lightning ends the run now

    def _save(self, trainer: Trainer) -> None:
        if not getattr(trainer, "fast_dev_run", False):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    @property
    def state_key(self) -> str:
        """Return a key that does not depend on how often it saves."""
        return type(self).__name__

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the checkpoint's path and content say all."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing: there is no state."""
