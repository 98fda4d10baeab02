"""TrainingProgress: how far a training is, in optimizer steps, with its rate and the time left.

Lightning's own bars count batches of an epoch, which says little where `max_steps` ends the
training. The command line adds this one, unless another bar is given.
"""

from __future__ import annotations

import math
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar

from prunelight.runtime.progress import Bar

_READ_SECONDS = 1.0  # reading a loss waits for the device


class TrainingProgress(ProgressBar):
    """Show optimizer steps, their rate and the time left; in a file, a line every 30 seconds."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._training: Bar | None = None
        self._evaluation: Bar | None = None
        self._read = -math.inf

    def disable(self) -> None:
        """Show nothing; Lightning calls it on all processes but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show the bars again."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bar of the training."""
        steps, step = trainer.estimated_stepping_batches, trainer.global_step
        total = int(steps) if math.isfinite(steps) and steps > 0 else None
        if total == 0 or trainer.limit_train_batches == 0:
            return
        self._training = self._open("train", total, "steps", step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any
    ) -> None:
        """Count the optimizer steps."""
        bar = self._training
        if bar is None:
            return
        note, now = "", time.monotonic()
        if now - self._read >= _READ_SECONDS:
            self._read, metrics = now, trainer.progress_bar_metrics
            note = ", ".join(f"{name} {float(value):.4g}" for name, value in metrics.items())
        bar.update(trainer.global_step - bar.done, note)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the bar away."""
        _close(self._training)
        self._training = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bar of a validation."""
        counts = trainer.num_sanity_val_batches if trainer.sanity_checking else None
        batches = counts or trainer.num_val_batches
        self._evaluation = self._open("validate", _total(batches), "batches")

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any
    ) -> None:
        """Count the batches."""
        if self._evaluation is not None:
            self._evaluation.update()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the bar away."""
        _close(self._evaluation)
        self._evaluation = None

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bar of a test."""
        self._evaluation = self._open("test", _total(trainer.num_test_batches), "batches")

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Count the batches."""
        if self._evaluation is not None:
            self._evaluation.update()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the bar away."""
        _close(self._evaluation)
        self._evaluation = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take all bars away."""
        _close(self._evaluation)
        self._evaluation = None
        _close(self._training)
        self._training = None

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Take all bars away."""
        self.teardown(trainer, pl_module, "")

    def _open(self, label: str, total: int | None, unit: str, started: int = 0) -> Bar:
        bar = Bar(label, total, unit=unit, quiet=not self._enabled, started=started)
        return bar.__enter__()


def _close(bar: Bar | None) -> None:
    if bar is not None:
        bar.__exit__(None, None, None)


def _total(counts: Any) -> int | None:
    """Return the number of batches of all loaders; None if one does not know."""
    total = sum(counts if isinstance(counts, list) else [counts])
    return int(total) if math.isfinite(total) else None
