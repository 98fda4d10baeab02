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
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from prunelight.run.checkpoints import (
    FORMAT,
    check_format,
    check_same_settings,
    quantization_keys,
    quantization_of_format_1,
)
from prunelight.run.run_state import Run
from prunelight.runtime.atomic_files import (
    atomic_replacement,
    explaining_write_errors,
    newest_checkpoint,
    remove_temporaries,
)
from prunelight.runtime.checkpoint_files import read_checkpoint
from prunelight.runtime.measuring import Measurement, measuring

log = logging.getLogger(__name__)

KEY = "prunelight_resume"  # of a checkpoint, under which `ExactResume` keeps its state

# Of a recovery's description: they grow.
VOLATILE = ("optimizer_steps", "tokens_seen", "weights_of_step")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written whole or not at all, and read without unpickling."""

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

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read tensors and plain data, whatever `weights_only` is; see `read_checkpoint`."""
        return read_checkpoint(path, map_location)


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
        """Let checkpoints be written whole or not at all, and be read without running code."""
        use_safe_files(trainer)
        if stage == "fit":
            self._settings, self._finished = None, False
            write_atomically(trainer)

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
            "finished": self._finished,
            "spent": cost.so_far(trainer.strategy.root_device) if cost else {},
            "accumulating": trainer.fit_loop._should_accumulate(),
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
        self.run.training_cost = Measurement(**saved["spent"])
        trainer.should_stop |= saved["finished"]
        if saved["accumulating"]:
            log.warning(
                "%s was written between the batches of accumulate_grad_batches, whose gradients it "
                "does not hold: the resumed run will differ. RecoveryCheckpoint avoids this",
                trainer.ckpt_path,
            )

    def check_resumable(self, trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
        """Check that a fit can go on from a checkpoint; after its end one only gives best weights.

        Raises:
            ValueError: if it holds weights alone.
        """
        resumes = trainer.state.fn == "fit" and not self._finished
        if resumes and "optimizer_states" not in checkpoint:
            raise ValueError(
                f"{trainer.ckpt_path} holds weights without the optimizer (save_weights_only=True),"
                " so that no training can go on from it; give another checkpoint, or "
                "ckpt_path=null to start anew"
            )

    def _describe(self, trainer: Trainer) -> dict[str, Any]:
        if self._settings is None:  # reads all training data
            settings = self.run.settings
            keys = quantization_keys(settings.quantization, settings.bitsandbytes)
            recovery = {**self.run.describe_recovery(), "quantization": keys}
            self._settings = describe_run(trainer, recovery, self.make_optimizer, self.run.seed)
        return self._settings


def read_settings(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in a checkpoint, those of format 1 in the words of this one."""
    settings = dict(saved["settings"])
    check_format("the checkpoint", saved.get("format", 1), FORMAT)
    if saved.get("format", 1) == 1:
        settings["quantization"] = quantization_of_format_1(settings.get("quantization", "none"))
    return settings


def use_safe_files(trainer: Trainer) -> None:
    """Let a trainer write checkpoints whole or not at all, and read them without running code.

    A trainer that was given its own way of writing keeps it; Lightning's asynchronous one then
    writes and reads by ours.
    """
    strategy = trainer.strategy
    files = strategy.checkpoint_io
    if type(files) is TorchCheckpointIO:
        strategy.checkpoint_io = AtomicCheckpointIO()
    elif type(files) is AsyncCheckpointIO and type(files.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = AsyncCheckpointIO(AtomicCheckpointIO())


def write_atomically(trainer: Trainer) -> None:
    """Let a trainer write checkpoints whole or not at all, unless it was given its own way.

    Also removes what a killed process left half-written.
    """
    use_safe_files(trainer)
    if trainer.is_global_zero:
        root = Path(trainer.default_root_dir)
        remove_temporaries([root, root / "checkpoints", *root.glob("pruned-*")])


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
