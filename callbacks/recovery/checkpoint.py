"""RecoveryCheckpoint: the checkpoint from which a killed run goes on exactly.

Lightning's ModelCheckpoint writes into a new directory at each start. After a resume it saves in
the middle of accumulated gradients, and before a validation that the resumed run then skips.
RecoveryCheckpoint writes `checkpoints/last.ckpt` in the run's directory, only after a complete
optimizer step, and after all other callbacks: after the validation if one is due, and after the
end of the epoch if the batch was its last. Other checkpoint callbacks may stand beside it, for
example to keep the best model. It saves whenever they replace a file that it names.

Private names of Lightning used here: the Trainer's `_signal_connector`, ModelCheckpoint's methods
and counters, and four of the fit loop. Tested with lightning 2.6.
"""

from __future__ import annotations

import logging
import signal
import threading
from functools import partial
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from prunelight.run.strategies import group_of_run
from prunelight.runtime.arguments import NOT_EMPTY, at_least, checked
from prunelight.training.resuming.checkpoint_io import (
    carry_out_removals,
    finish_writing,
    removals_of,
)
from prunelight.training.resuming.kept_checkpoints import ResumePoint, directory_of

log = logging.getLogger(__name__)


class RecoveryCheckpoint(ResumePoint):
    """Write `last.ckpt` every few optimizer steps, at SIGTERM, Ctrl-C and at the end of training.

    `trainer.fit(..., ckpt_path="last")` finds it. The command line adds one by itself. Ctrl-C ends
    the training after the step that runs; a second Ctrl-C ends it at once.

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
        self._before: Any = None  # what Ctrl-C did before the training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set the directory, act last, and take SIGTERM over for a fit; Lightning calls this hook.

        What acts later would be missing in the checkpoint. Lightning's own SIGTERM handler calls
        the other processes at any moment of their work, and ends a validation before the step is
        saved.
        """
        self._set_directory(trainer)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        # A new list: Lightning goes through the old one at this moment.
        others = [callback for callback in callbacks if callback is not self]
        trainer.callbacks = [*others, self]  # type: ignore[attr-defined]
        self._terminated = self._interrupted = False
        self._launcher = trainer.strategy.launcher
        vars(trainer._signal_connector).pop("_sigterm_notifier_fn", None)  # of an earlier fit
        if stage == "fit":
            vars(trainer._signal_connector)["_sigterm_notifier_fn"] = self._note_sigterm
        super().setup(trainer, pl_module, stage)

    def _note_sigterm(self, signum: int, _: FrameType | None) -> None:
        if not self._terminated and self._launcher is not None:
            self._launcher.kill(signum)  # passes the signal to processes that this one started
        self._terminated = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the first Ctrl-C end the training after a step; Lightning calls this hook."""
        super().on_train_start(trainer, pl_module)
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._note_interrupt)

    def _note_interrupt(self, signum: int, _: FrameType | None) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True
        log.warning(
            "Ctrl-C: the training ends after this step, which is saved first; "
            "Ctrl-C again ends it at once"
        )

    def _restore_handler(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave Ctrl-C to others again."""
        self._restore_handler()

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        self._set_directory(trainer)
        return super()._find_last_checkpoints(trainer)

    def _set_directory(self, trainer: Trainer) -> None:
        self.dirpath = self.dirpath or str(directory_of(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if a checkpoint is due, and neither validation nor end of the epoch follows."""
        loop = trainer.fit_loop
        assert loop._data_fetcher is not None
        validates = loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
        if not validates and not self._ends_epoch(trainer):
            self._save_if_due(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if a checkpoint is due; other callbacks have read the metrics by now."""
        fits = trainer.state.fn == "fit" and not trainer.sanity_checking
        if fits and not self._ends_epoch(trainer):
            self._save_if_due(trainer, replaced=self._replaced(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if a checkpoint is due; a resumed run does not call this hook again."""
        self._save_if_due(trainer, replaced=self._replaced(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the trained model, so that a run killed later need not train again.

        Raises:
            SIGTERMException, KeyboardInterrupt: if the run was told to end; the next start writes
                its result.
        """
        self._restore_handler()
        self._save(trainer)
        group = group_of_run(trainer)
        group.run_on_rank_zero(partial(finish_writing, trainer))
        if group.any(self._interrupted):  # in its last step
            raise KeyboardInterrupt
        if group.any(self._terminated):
            trainer._signal_connector.received_sigterm = True
            raise SIGTERMException

    @staticmethod
    def _ends_training(trainer: Trainer) -> bool:
        """Return whether `on_train_end` follows; Lightning leaves it out where a resume starts."""
        epochs, loop = trainer.max_epochs, trainer.fit_loop
        progress: Any = loop.epoch_progress.current
        return (
            trainer.global_step >= trainer.max_steps != -1
            or (trainer.should_stop and loop._can_stop_early)
            or (epochs is not None and progress.processed >= epochs != -1)
        )

    @staticmethod
    def _ends_epoch(trainer: Trainer) -> bool:
        return trainer.fit_loop.epoch_loop.batch_progress.is_last_batch

    @staticmethod
    def _replaced(trainer: Trainer) -> bool:
        """Return, on all processes, whether a file waits to be removed after a save."""
        removals = removals_of(trainer)
        return group_of_run(trainer).any(removals is not None and bool(removals.waiting))

    def _save_if_due(self, trainer: Trainer, *, replaced: bool = False) -> None:
        step, accumulating = trainer.global_step, trainer.fit_loop._should_accumulate()
        if accumulating or step == self._last_global_step_saved:  # a checkpoint holds no gradients
            return
        if self._ends_training(trainer):
            return
        # All processes must save and end at the same step, but the signal reaches each at another
        # moment. They agree on the CPU, so that the device goes on working.
        group = group_of_run(trainer)
        ending = group.any(self._terminated or self._interrupted)
        if ending or replaced or step % self._every_n_train_steps == 0:
            self._save(trainer)
            trainer._signal_connector.received_sigterm = ending  # Lightning ends the run now
        if ending and group.any(self._interrupted):
            raise KeyboardInterrupt

    def _save(self, trainer: Trainer) -> None:
        if not getattr(trainer, "fast_dev_run", False):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
            carry_out_removals(trainer)

    @property
    def state_key(self) -> str:
        """Return a key that does not depend on how often it saves."""
        return type(self).__name__

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the checkpoint's path and content say all."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing: there is no state."""
