"""What makes a resumed run equal one that was never interrupted, bit for bit on one device.

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
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer

from prunelight.planning.fingerprints import fingerprint_of
from prunelight.run.checkpoints import (
    FORMAT,
    check_format,
    check_same_settings,
    quantization_keys,
    quantization_of_format_1,
)
from prunelight.run.checkpoints import KEY as METADATA
from prunelight.run.run_state import Run
from prunelight.runtime.atomic_files import (
    atomic_replacement,
    explaining_read_errors,
    explaining_write_errors,
    newest_checkpoint,
    remove_temporaries,
)
from prunelight.runtime.measuring import Measurement, measuring
from prunelight.training.kept_checkpoints import (
    DelayedRemovals,
    check_resume_point,
    counters,
    directory_of,
    find_resume_point,
    keepers,
    reuse_own_files,
    settle,
    take_over,
)

log = logging.getLogger(__name__)

KEY = "prunelight_resume"  # of a checkpoint, under which `ExactResume` keeps its state

# Of a recovery's description: they grow.
VOLATILE = ("optimizer_steps", "tokens_seen", "weights_of_step")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written whole or not at all, and read without unpickling.

    Attributes:
        removals: where removed files wait until the resume point is written; None: at once.
    """

    removals: DelayedRemovals | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write beside the final name, flush to disk, rename.

        Raises:
            OSError: if it cannot be written; names the reason and the checkpoint that is intact.
        """
        if "://" in str(path):  # not a file of this machine
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        with explaining_write_errors(path, newest_checkpoint(path.parent)):
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_replacement(path) as temporary, temporary.open("wb") as file:
                torch.save(checkpoint, file)
        if self.removals is not None:
            self.removals.keep(path)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a file, once the resume point does not name it."""
        if self.removals is None or "://" in str(path):
            super().remove_checkpoint(path)
        else:
            self.removals.add(path)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read tensors and plain data.

        Raises:
            ValueError: if the file is damaged or holds other objects.
        """
        with explaining_read_errors(path):
            return super().load_checkpoint(path, map_location, weights_only=True)


class ExactResume(Callback):
    """What a RecoveryModule adds to its trainer: whole checkpoints, seeds, settings, time spent.

    Args:
        run: whose training is resumed; its `training_cost` is measured here.
        make_optimizer: called with parameters.
    """

    def __init__(self, run: Run, make_optimizer: Callable[..., Any]) -> None:
        self.run, self.make_optimizer = run, make_optimizer
        self._phase: Any = None
        self._settings: dict[str, Any] | None = None
        self._finished = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let checkpoints be written whole or not at all, in directories that stay."""
        if stage == "fit":
            self._settings, self._finished = None, False
            settle(trainer)
            if trainer.ckpt_path is None:  # else what reads the checkpoint tells more
                check_resume_point(trainer, lambda path: METADATA in _read(path))
            write_atomically(trainer)
            reuse_own_files(trainer, partial(self._is_ours, trainer))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let other runs write into the directory."""
        self.run.release_directory()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Let other runs write into the directory."""
        self.run.release_directory()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to measure the training, or go on with it."""
        self._phase = measuring(trainer.strategy.root_device, self.run.training_cost)
        self.run.training_cost = self._phase.__enter__()

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

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep what a resumed run needs, and what it is compared by."""
        cost = self.run.training_cost
        checkpoint[KEY] = {
            "format": FORMAT,
            "settings": self._describe(trainer),
            "finished": self._finished or trainer.should_stop,
            "spent": cost.so_far(trainer.strategy.root_device) if cost else {},
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
        check_same_settings(read_settings(saved), self._describe(trainer), trainer.ckpt_path)
        take_over(trainer, checkpoint, saved.get("keepers", {}))
        if trainer.max_steps != -1:
            rewind_to_last_batch(checkpoint["loops"]["fit_loop"])
        if (removals := removals_of(trainer)) is not None:
            removals.take_over(saved.get("removals", ()), trainer)
        self.run.training_cost = Measurement(**saved["spent"])
        trainer.should_stop |= saved["finished"]
        if saved["accumulating"]:
            log.warning(
                "%s was written between the batches of accumulate_grad_batches, whose gradients it "
                "does not hold: the resumed run will differ. RecoveryCheckpoint avoids this",
                trainer.ckpt_path,
            )

    def identity(self, trainer: Trainer) -> str:
        """Return what two runs have in common whose checkpoints of a step are the same."""
        assert self.run.prepared is not None
        return fingerprint_of(self.run.prepared.fingerprint, self._describe(trainer))

    def _is_ours(self, trainer: Trainer, path: Path) -> bool:
        """Return whether a checkpoint on disk is of a run that this one repeats."""
        written_by = _read(path).get(METADATA, {}).get("identity")
        return bool(written_by == self.identity(trainer))

    def _describe(self, trainer: Trainer) -> dict[str, Any]:
        if self._settings is None:  # reads all training data
            settings = self.run.settings
            keys = quantization_keys(settings.quantization, settings.bitsandbytes)
            recovery = {**self.run.describe_recovery(), "quantization": keys}
            self._settings = describe_run(trainer, recovery, self.make_optimizer, self.run.seed)
        return self._settings


def _read(path: Path) -> dict[str, Any]:
    """Return what a checkpoint holds, without its tensors' bytes; {} if it cannot be read."""
    try:
        checkpoint = torch.load(path, mmap=True, map_location="cpu", weights_only=True)
    except Exception:  # of another program, or damaged
        return {}
    return checkpoint if isinstance(checkpoint, dict) else {}


def read_settings(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in a checkpoint, those of format 1 in the words of this one."""
    settings = dict(saved["settings"])
    check_format("the checkpoint", saved.get("format", 1), FORMAT)
    if saved.get("format", 1) == 1:
        settings["quantization"] = quantization_of_format_1(settings.get("quantization", "none"))
    return settings


def write_atomically(trainer: Trainer) -> None:
    """Let a trainer write checkpoints whole or not at all, unless it was given its own way.

    Also removes what a killed process left half-written.
    """
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
    files = trainer.strategy.checkpoint_io
    if isinstance(files, AtomicCheckpointIO):
        files.removals = DelayedRemovals() if find_resume_point(trainer) else None
    if trainer.is_global_zero:
        root = Path(trainer.default_root_dir)
        kept = {Path(str(keeper.dirpath)) for keeper in keepers(trainer)}
        remove_temporaries({root, directory_of(trainer), *root.glob("pruned-*"), *kept})


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


def removals_of(trainer: Trainer) -> DelayedRemovals | None:
    """Return the files that wait to be removed; None where they are removed at once."""
    files = trainer.strategy.checkpoint_io
    return files.removals if isinstance(files, AtomicCheckpointIO) else None


def seed_batch(seed: int, *position: int) -> None:
    """Start torch's random numbers anew, from a run's seed and (rank, epoch, batch).

    Dropout then does not depend on what was drawn before: a validation, a restart, a worker.
    """
    digest = hashlib.sha256(json.dumps([seed, *position]).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def describe_run(
    trainer: Trainer, recovery: Mapping[str, Any], make_optimizer: Callable[..., Any], seed: int
) -> dict[str, Any]:
    """Return what the losses of a run depend on besides its model, as JSON values.

    Args:
        trainer: of the run.
        recovery: settings of the recovery.
        make_optimizer: called with parameters.
        seed: of the run's random numbers.
    """
    optimizer = make_optimizer([torch.nn.Parameter(torch.zeros(1))])
    settings = {name: value for name, value in recovery.items() if name not in VOLATILE}
    data = getattr(getattr(trainer, "datamodule", None), "describe_training", None)
    constant = str(recovery.get("lr_scheduler", "")).startswith("constant")
    described = {
        **settings,
        "optimizer": {"class": type(optimizer).__name__, **optimizer.defaults},
        "scheduled_steps": None if constant else trainer.estimated_stepping_batches,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "gradient_clip_val": trainer.gradient_clip_val,
        "limit_train_batches": trainer.limit_train_batches,
        "processes": trainer.world_size,
        "seed": seed,
        **({f"data.{name}": value for name, value in data().items()} if data else {}),
    }
    return json.loads(json.dumps(described, default=str))
