"""Every way to keep checkpoints beside the resume point, and every moment at which a run can end.

`CHOICES` are the values of each setting; `draw` takes one of each. A run with such settings is
stopped at hooks in turn and started again. What it leaves must be that of a whole run.
"""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from runs import make_data, make_module
from safetensors.torch import load_file

from prunelight.callbacks import RecoveryCheckpoint, ShortGPT
from prunelight.training.trainer import Trainer

METRIC = "val/perplexity"
CHOICES: dict[str, list[Any]] = {
    "dirpath": [None, None, "best", "checkpoints"],
    "filename": [None, "best", "{step}", "{epoch}-{val/perplexity:.4f}"],
    "save_top_k": [1, 1, 3, -1, 0],
    "save_last": [None, True, "link"],
    "save_weights_only": [True, False],
    "monitors": [(METRIC,), (METRIC,), ("val/accuracy", METRIC), (METRIC, None), (None,)],
    "logger": [True, False],
    "interval": [None, 1, 2, 3],  # batches between two validations; None: once an epoch
    "every": [1, 2, 3, 50],  # optimizer steps between two resume points
    "patience": [None, 1, 2],
    "accumulate": [1, 2],
    "max_steps": [None, 9],  # instead of epochs
    "first": [True, False],  # the resume point stands before the others
    "background": [False, True],  # files are written by a thread
}
HOOKS = (
    "on_train_start",
    "on_train_batch_start",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_end",
    "on_train_epoch_end",
    "on_save_checkpoint",
    "on_train_end",
    "on_fit_end",
)


class Stopped(Exception):
    """The run ends here, as if it was killed."""


class Stop(pl.Callback):
    """Ends a run when a hook is called for the n-th time."""

    def __init__(self, hook: str | None, count: int) -> None:
        self.left = count
        if hook is not None:
            setattr(self, hook, self._count)

    def _count(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.state.fn == "fit":
            self.left -= 1
            if self.left == 0:
                raise Stopped


class LateStop(Stop, Checkpoint):
    """The same between other checkpoint callbacks and the resume point."""


def draw(rng: random.Random) -> dict[str, Any]:
    """Return one value of each setting."""
    settings = {name: rng.choice(values) for name, values in CHOICES.items()}
    if None in settings["monitors"] and settings["save_top_k"] > 1:
        settings["save_top_k"] = 1  # Lightning refuses it
    return settings


def draw_stop(rng: random.Random) -> Stop:
    """Return one moment at which a run ends."""
    return rng.choice((Stop, LateStop))(rng.choice(HOOKS), rng.randint(1, 4))


def fit(
    name: str,
    root: Path,
    settings: dict[str, Any],
    stop: Stop,
    *,
    ckpt_path: str | None = "last",
) -> Trainer | None:
    """Start a run, or start it again; return its Trainer, None if it was stopped."""
    root.mkdir(exist_ok=True)
    pl.seed_everything(3, verbose=False)
    keepers: list[pl.Callback] = [
        ModelCheckpoint(
            dirpath=None if settings["dirpath"] is None else root / settings["dirpath"],
            filename=settings["filename"],
            monitor=monitor,
            save_top_k=settings["save_top_k"],
            save_last=settings["save_last"],
            save_weights_only=settings["save_weights_only"],
            mode="max" if monitor == "val/accuracy" else "min",
        )
        for monitor in settings["monitors"]
    ]
    point = RecoveryCheckpoint(settings["every"])
    callbacks = [point, *keepers] if settings["first"] else [*keepers, point]
    if settings["patience"] is not None:
        callbacks.insert(0, EarlyStopping(METRIC, patience=settings["patience"]))
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=3 if settings["max_steps"] is None else -1,
        max_steps=settings["max_steps"] or -1,
        accumulate_grad_batches=settings["accumulate"],
        limit_train_batches=4,
        val_check_interval=settings["interval"] or 1.0,
        num_sanity_val_steps=0,
        logger=CSVLogger(root, name="logs") if settings["logger"] else False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
        plugins=[AsyncCheckpointIO()] if settings["background"] else None,
        callbacks=[*callbacks, ShortGPT(num_layers=2), stop],
    )
    module = make_module(
        name,
        optimizer=partial(torch.optim.AdamW, lr=0.5),  # learns at first, then destroys
        lr_scheduler="constant_with_warmup",
        warmup_steps=12,
    )
    try:
        data = make_data(name, root, seq_len=16, num_validation=2)
        trainer.fit(module, data, ckpt_path=ckpt_path)
    except Stopped:
        return None
    return trainer


def result(trainer: Trainer) -> dict[str, Any]:
    """Return what a run leaves: weights, report, files, scores and counters."""
    root = Path(trainer.default_root_dir).resolve()
    record = trainer.lightning_module.record
    keepers = [
        saver for saver in trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint)
    ]
    stops = [saver for saver in trainer.callbacks if isinstance(saver, EarlyStopping)]
    return {
        "weights": {
            name: tensor.sum(dtype=torch.float64).item()
            for name, tensor in load_file(root / "final" / "model.safetensors").items()
        },
        "recovery": record.recovery,
        "warnings": sorted(record.warnings),
        "perplexity": [stage.perplexity for stage in record.stages],
        "files": {
            str(file.relative_to(root)): torch.load(file, weights_only=True)["global_step"]
            for file in root.rglob("*.ckpt")
        },
        "scores": [
            {
                str(Path(path).relative_to(root)): score.item()
                for path, score in keeper.best_k_models.items()
            }
            for keeper in keepers
        ],
        "best": [
            keeper.best_model_path and str(Path(keeper.best_model_path).relative_to(root))
            for keeper in keepers
        ],
        "stopped": [(stop.wait_count, stop.stopped_epoch) for stop in stops],
    }
