"""What makes a resumed run equal one that was never interrupted, bit for bit on one device.

On CUDA that takes `deterministic: true` of the Trainer too, which a run that goes on says.

Checkpoints appear whole under their name or not at all. Every training batch starts from random
numbers of its own, derived from the run's seed, the process, the epoch and the batch: what happened
before leaves no trace in them. What the losses depend on is written down, so that a run with other
settings is refused instead of going on.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from prunelight.models.saving import MARKER
from prunelight.planning.fingerprints import fingerprint_of
from prunelight.run.checkpoints import (
    FORMAT,
    check_format,
    check_same_settings,
    end_of,
    quantization_keys,
    quantization_of_format_1,
)
from prunelight.run.checkpoints import KEY as METADATA
from prunelight.run.checkpoints import (
    RESUME_KEY as KEY,
)
from prunelight.run.measurements import TRAINING, training_cost
from prunelight.run.preflight import refuse_finished
from prunelight.run.run_state import Run
from prunelight.runtime.files.atomic_files import newest_checkpoint
from prunelight.runtime.files.checkpoint_files import read_checkpoint
from prunelight.runtime.measuring import Measurement
from prunelight.training.resuming.checkpoint_io import (
    end_writing,
    finish_writing,
    removals_of,
    use_safe_files,
    write_atomically,
)
from prunelight.training.resuming.kept_checkpoints import (
    check_resume_point,
    counters,
    resume_file,
    retire_resume_point,
    reuse_own_files,
    settle,
    take_over,
)
from prunelight.training.resuming.run_identity import (
    OF_THE_MODEL,
    OWN_CLASSES,
    describe_run,
    differences,
    tell_own_classes,
    without,
)

log = logging.getLogger(__name__)


class ExactResume(Callback):
    """What a RecoveryModule adds to its trainer: whole checkpoints, seeds, settings, time spent.

    Args:
        run: whose training is resumed; its phases are measured here.
        make_optimizer: called with parameters.
        given_arguments: returns the module's arguments that differ from their defaults.
    """

    def __init__(
        self,
        run: Run,
        make_optimizer: Callable[..., Any],
        given_arguments: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        self.run, self.make_optimizer, self.given_arguments = run, make_optimizer, given_arguments
        self._phase: Any = None
        self._validation: Any = None
        self._settings: dict[str, Any] | None = None
        self._finished = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let checkpoints be written whole or not at all, in directories that stay.

        No verb runs code that a checkpoint holds.
        """
        use_safe_files(trainer)
        if stage == "fit":
            self._settings, self._finished = None, False
            settle(trainer)
            if trainer.ckpt_path is None:  # else what reads the checkpoint tells more
                check_resume_point(trainer, lambda path: METADATA in _read(path))
            write_atomically(trainer, self.run.phases)
            finish = partial(finish_writing, trainer)
            reuse_own_files(trainer, partial(self._is_ours, trainer), finish)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the settings that it starts with; start to measure the training, or go on."""
        self.describe(trainer)
        if trainer.ckpt_path is None and trainer.is_global_zero:
            retire_resume_point(trainer)
        self._phase = self.run.phases.phase(TRAINING, shown=False)
        self._phase.__enter__()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Draw random numbers that depend on seed, process, epoch and batch alone."""
        seed_batch(self.run.seed, trainer.global_rank, trainer.current_epoch, batch_idx)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop to measure the training."""
        self._phase.__exit__(None, None, None)
        torch.manual_seed(self.run.seed)
        self._finished = True

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to measure a validation during the fit."""
        if trainer.state.fn == "fit":
            self._validation = self.run.phases.phase("validate during the training", shown=False)
            self._validation.__enter__()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop to measure the validation."""
        if self._validation is not None:
            self._validation.__exit__(None, None, None)
            self._validation = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop to measure the run, and let other runs write into the directory."""
        self.run.phases.stop()
        self.run.release_directory()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Stop to measure a run that failed; after Ctrl-C say how it goes on."""
        end_writing(trainer)  # before another start may take the directory
        self.run.phases.stop()
        self.run.release_directory()
        if isinstance(exception, KeyboardInterrupt) and trainer.is_global_zero:
            log.warning(how_it_goes_on(trainer))

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep what a resumed run needs, and what it is compared by."""
        checkpoint[KEY] = {
            "format": FORMAT,
            "settings": self.describe(trainer),
            "finished": self._finished or trainer.should_stop,
            "planned_steps": trainer.estimated_stepping_batches,
            "spent": asdict(training_cost(self.run)),
            "accumulating": trainer.fit_loop._should_accumulate(),
            "keepers": counters(trainer),
            "removals": removals.waiting if (removals := removals_of(trainer)) else [],
        }

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Check that the run is the one that wrote the checkpoint, and go on with it.

        Raises:
            ValueError: if it has other settings; names them.
        """
        saved = checkpoint.get(KEY)
        if saved is None or trainer.state.fn != "fit":
            return
        settings, ours = read_settings(saved), self.describe(trainer)
        step, planned = checkpoint["global_step"], trainer.estimated_stepping_batches
        end = end_of(checkpoint)
        longer = end is not None and planned > end.planned
        if longer:
            settings |= {name: ours[name] for name in ("scheduled_steps", "schedule")}
        check_same_settings(*differences(settings, ours), trainer.ckpt_path)
        tell_own_classes(settings, ours, trainer.ckpt_path)
        if end is not None:
            refuse_finished(self.run, Path(str(trainer.ckpt_path)), end, planned)
        take_over(trainer, checkpoint, saved.get("keepers", {}))
        if trainer.max_steps != -1:
            rewind_to_last_batch(checkpoint["loops"]["fit_loop"])
        if (removals := removals_of(trainer)) is not None:
            removals.take_over(saved.get("removals", ()), trainer)
        self.run.earlier_training = Measurement(**saved["spent"])
        if longer:
            self.run.warn(
                f"the training of {step} steps was finished and goes on to step {planned}; a "
                "learning rate that decays jumps to what the longer schedule has there, so the "
                f"result need not be that of one training of {planned} steps"
            )
        else:
            trainer.should_stop |= saved["finished"]
            log.info("going on from step %d: %s", step, trainer.ckpt_path)
            if note := inexact_resume(trainer.strategy.root_device):
                log.warning(note)
        if saved["accumulating"]:
            log.warning(
                "%s was written between the batches of accumulate_grad_batches, whose gradients it "
                "does not hold: the resumed run will differ. RecoveryCheckpoint avoids this",
                trainer.ckpt_path,
            )

    def check_resumable(self, trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
        """Check that a fit can go on from a checkpoint.

        Raises:
            ValueError: if it holds weights alone.
        """
        if trainer.state.fn == "fit" and "optimizer_states" not in checkpoint:
            raise ValueError(
                f"{trainer.ckpt_path} holds weights without the optimizer's state,"
                " so that no training can go on from it; give another checkpoint, or "
                "ckpt_path=null to start anew"
            )

    def identity(self, trainer: Trainer) -> str:
        """Return what two runs have in common whose checkpoints of a step are the same."""
        assert self.run.prepared is not None
        known = without(self.describe(trainer), (OWN_CLASSES,))
        return fingerprint_of(self.run.prepared.fingerprint, known)

    def _is_ours(self, trainer: Trainer, path: Path) -> bool:
        """Return whether a checkpoint on disk is of a run that this one repeats."""
        written_by = _read(path).get(METADATA, {}).get("identity")
        return bool(written_by == self.identity(trainer))

    def describe(self, trainer: Trainer) -> dict[str, Any]:
        """Return what the losses of the run depend on, once its model is prepared."""
        if self._settings is None:  # reads all training data
            self._settings = self._describe(trainer)
        return self._settings

    def is_same_training(self, trainer: Trainer, settings: Mapping[str, Any]) -> bool:
        """Return whether a checkpoint's settings are this run's, as far as no model is needed."""
        ours = without(self._describe(trainer), OF_THE_MODEL)
        return not any(differences(without(settings, OF_THE_MODEL), ours))

    def _describe(self, trainer: Trainer) -> dict[str, Any]:
        settings = self.run.settings
        keys = quantization_keys(settings.quantization, settings.bitsandbytes)
        recovery = {**self.run.describe_recovery(), "quantization": keys}
        return describe_run(
            trainer, self.run, self.make_optimizer, self.given_arguments(), recovery
        )


def inexact_resume(device: torch.device) -> str:
    """Return why a run that goes on there need not repeat the bits of one never stopped, or ""."""
    if device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
        return ""
    return (
        "on CUDA some sums are in another order each time: the resumed run equals one that was "
        "never stopped bit for bit only if both have trainer.deterministic=true"
    )


def how_it_goes_on(trainer: Trainer) -> str:
    """Return what to do after Ctrl-C, by what is on disk."""
    root = Path(trainer.default_root_dir)
    saved = resume_file(trainer) or newest_checkpoint(root / "checkpoints")
    if saved is not None and getattr(trainer, "resumes_itself", False):
        return f"stopped; {saved} is saved, and the same command goes on from there"
    if saved is not None:
        return f"stopped; {saved} is saved: ckpt_path={str(saved)!r} goes on from there"
    bases = [directory for directory in root.glob("pruned-*") if (directory / MARKER).is_file()]
    kept = f", with {bases[0]}, which is complete" if bases else ""
    return f"stopped before a step was trained; the same command starts again{kept}"


def _read(path: Path) -> dict[str, Any]:
    """Return what a checkpoint holds, its tensors on disk; {} if it is damaged or of others."""
    try:
        return read_checkpoint(path, mmap=True)
    except (ValueError, OSError):
        return {}


def read_settings(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in a checkpoint, those of format 1 in the words of this one."""
    settings = dict(saved["settings"])
    check_format("the checkpoint", saved.get("format", 1), FORMAT)
    if saved.get("format", 1) == 1:
        settings["quantization"] = quantization_of_format_1(settings.get("quantization", "none"))
    return settings


def rewind_to_last_batch(loop: dict[str, Any]) -> None:
    """Turn the counts of a run saved at the end of an epoch into those after its last batch.

    Of a run with max_steps Lightning counts the epoch twice that was just ended when it goes on,
    and takes the batches of the one after next. In place.
    """
    epochs, batches = loop["epoch_progress"], loop["epoch_loop.batch_progress"]
    total = epochs["total"]
    ended = total["ready"] == total["started"] == total["processed"] == total["completed"] + 1
    if not (ended and batches["is_last_batch"]):
        return
    for count in ("total", "current"):
        epochs[count]["processed"] -= 1
        batches[count]["completed"] -= 1
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1


def seed_batch(seed: int, *position: int) -> None:
    """Start torch's random numbers anew, from a run's seed and (rank, epoch, batch).

    Dropout then does not depend on what was drawn before: a validation, a restart, a worker.
    """
    digest = hashlib.sha256(json.dumps([seed, *position]).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
