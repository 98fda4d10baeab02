"""A training whose loss or weights are NaN or infinite ends, and leaves the last good checkpoint.

The loss is looked at once a logging interval, so that the device need not be waited for after each
batch. A loss scaler skips the optimizer steps whose gradients overflow float16. Some skips in a row
are its search for a scale; more than `MOST_SKIPS` of them have no end. It also skips a step whose
loss is no number, which one batch may have; several in a row are no matter of the scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from prunelight.recovery.sharded_weights import trained_parameters
from prunelight.run.strategies import group_of_run
from prunelight.runtime.files.atomic_files import newest_checkpoint
from prunelight.runtime.finite import check_checkpoint_tensors, check_tensors

MOST_SKIPS = 20  # in a row: from torch's first scale of 65536 down to 1/16

_REMEDY = (
    "lower the learning rate, set trainer.gradient_clip_val, or take a wider type "
    "(model.dtype=float32 with trainer.precision=bf16-mixed), and start anew with another "
    "trainer.default_root_dir or ckpt_path=null"
)


class FiniteTraining(Callback):
    """Ends a fit, with an error, once its loss or its weights are NaN or infinite."""

    def __init__(self) -> None:
        # The first optimizer step with a loss that is no number, and that loss, on the device.
        self._bad_step: Tensor | None = None
        self._bad_loss: Tensor | None = None
        self._step = self._skips = 0
        self._scale: float | None = None
        self._trained = False  # an optimizer step of this fit was not skipped

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier fit."""
        self._bad_step = self._bad_loss = None
        self._step = trainer.global_step
        self._scale, self._skips, self._trained = _scale_of(trainer), 0, False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any
    ) -> None:
        """Note a loss that is no number, and end the fit once a logging interval.

        Raises:
            RuntimeError: if there was such a loss, or the loss scaler skips without end.
        """
        before, self._step = self._step, trainer.global_step
        stepped = self._step > before
        self._note(loss_of(outputs), before + 1)
        if self._scale is not None and stepped:
            self._count_skips(trainer)
        if stepped and (self._skips > MOST_SKIPS or self._step % _interval(trainer) == 0):
            self._check(trainer, pl_module)

    def _note(self, loss: Tensor | None, step: int) -> None:
        if loss is None:
            return
        loss = loss.detach().float()
        if self._bad_step is None or self._bad_loss is None:
            self._bad_step = torch.zeros((), dtype=torch.int64, device=loss.device)
            self._bad_loss = torch.zeros((), device=loss.device)
        first = ~loss.isfinite() & (self._bad_step == 0)
        self._bad_step = torch.where(first, step, self._bad_step)
        if self._scale is not None:  # the step was skipped: nothing is lost if the next is right
            self._bad_step = torch.where(loss.isfinite(), 0, self._bad_step)
        self._bad_loss = torch.where(first, loss, self._bad_loss)

    def _count_skips(self, trainer: Trainer) -> None:
        scale = _scale_of(trainer)
        assert scale is not None
        assert self._scale is not None
        skipped = scale < self._scale
        self._skips = self._skips + 1 if skipped else 0
        self._trained = self._trained or not skipped
        self._scale = scale

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the fit before its best weights are chosen."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._check(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the fit before its last weights are kept."""
        self._check(trainer, pl_module)
        self._check_weights(trainer, pl_module)
        if group_of_run(trainer).any(self._skips > 0 and not self._trained):
            raise RuntimeError(
                f"the loss scaler skipped all {self._skips} optimizer steps: nothing is trained. "
                f"To go on, train for more steps, or {_REMEDY}"
            )

    def _check(self, trainer: Trainer, module: LightningModule) -> None:
        """Raise on all processes if one has seen a loss that is no number."""
        step = 0 if self._bad_step is None else int(self._bad_step)
        if self._scale is not None and step >= trainer.global_step:
            step = 0  # one batch
        group = group_of_run(trainer)
        if group.any(step > 0):
            losses = group.gather((step, 0.0 if self._bad_loss is None else float(self._bad_loss)))
            step, loss = min(pair for pair in losses if pair[0])
            raise RuntimeError(
                f"the training loss is {loss} at optimizer step {step}, the run ends at step "
                f"{trainer.global_step}; {kept_checkpoint(trainer)}. To go on, {_REMEDY}"
            )
        if self._scale is None:  # on all processes
            return
        if group.any(self._skips > 0):
            self._check_weights(trainer, module)
        if group.any(self._skips > MOST_SKIPS):
            raise RuntimeError(
                f"the loss scaler skipped the last {self._skips} optimizer steps up to step "
                f"{trainer.global_step}: with a scale of {self._scale:.3g} the gradients still are "
                f"no numbers; {kept_checkpoint(trainer)}. To go on, {_REMEDY}"
            )

    def _check_weights(self, trainer: Trainer, module: LightningModule) -> None:
        with group_of_run(trainer).failing_together():
            check_tensors(trained_parameters(module).items(), *_after(trainer))


def check_saved(trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
    """Check what is about to be saved: NaN never replaces a good checkpoint.

    All processes must call this.

    Raises:
        ValueError: naming the tensor, the step and the checkpoint that is kept.
    """
    with group_of_run(trainer).failing_together():
        check_checkpoint_tensors(checkpoint, *_after(trainer))


def check_loaded(checkpoint: Mapping[str, Any], path: str | Path | None) -> None:
    """Check that a run does not go on from weights or optimizer states that are no numbers.

    Raises:
        ValueError: naming the tensor.
    """
    check_checkpoint_tensors(
        checkpoint,
        f"checkpoint {path}" if path else "the checkpoint",
        "go on from an earlier one (ckpt_path), or start anew with another "
        "trainer.default_root_dir or ckpt_path=null",
    )


def _after(trainer: Trainer) -> tuple[str, str]:
    return (
        f"the training after optimizer step {trainer.global_step}",
        f"{kept_checkpoint(trainer)}. To go on, {_REMEDY}",
    )


def kept_checkpoint(trainer: Trainer) -> str:
    """Return which checkpoint a fit that fails leaves behind, in words."""
    newest = max(_checkpoints(trainer), key=lambda file: file.stat().st_mtime_ns, default=None)
    return f"{newest} is the last good checkpoint" if newest else "no checkpoint was written yet"


def _checkpoints(trainer: Trainer) -> Iterator[Path]:
    directories = {Path(trainer.default_root_dir) / "checkpoints"}
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath:
            directories.add(Path(callback.dirpath))
    for directory in directories:
        if file := newest_checkpoint(directory):
            yield file


def loss_of(outputs: Any) -> Tensor | None:
    """Return the loss in what Lightning hands on of a training step; None if there is none."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 else None


def _scale_of(trainer: Trainer) -> float | None:
    """Return the scale of the loss scaler, None without one."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return None if scaler is None else float(scaler.get_scale())


def _interval(trainer: Trainer) -> int:
    """Return the optimizer steps between two looks at the loss."""
    return max(1, int(getattr(trainer, "log_every_n_steps", 0) or 50))
