"""Runs from the command line that a test stops: their config, and callbacks which it names."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from runs import write_model

GRADUAL: dict[str, Any] = {
    "class_path": "DLP",
    "init_args": {"sparsity": 0.5, "schedule": {"start_step": 2, "end_step": 10, "every": 3}},
}
DEPTH: dict[str, Any] = {"class_path": "ShortGPT", "init_args": {"num_layers": 2}}


def best(**arguments: Any) -> dict[str, Any]:
    """Return a ModelCheckpoint without dirpath, as retrain_full.yaml has one."""
    return {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"monitor": "val/perplexity", **arguments},
    }


def patience(validations: int) -> dict[str, Any]:
    """Return an EarlyStopping."""
    return {
        "class_path": "lightning.pytorch.callbacks.EarlyStopping",
        "init_args": {"monitor": "val/perplexity", "patience": validations},
    }


# What learns at first and then destroys: the best weights are not the last.
UNSTEADY = {"recovery": "full", "learning_rate": 0.2, "lr_scheduler": "constant_with_warmup"}

CASES: dict[str, dict[str, Any]] = {
    "gradual": {"callbacks": [GRADUAL]},
    "shortgpt": {"callbacks": [DEPTH], "data": {"num_workers": 1}},
    "restore_best": {
        "callbacks": [DEPTH, best(filename="best", save_weights_only=True), patience(2)],
        "model": {**UNSTEADY, "warmup_steps": 12},
    },
    "gradual_best": {
        "callbacks": [best(filename="{step}", save_top_k=2, save_last=True), GRADUAL],
        "model": {**UNSTEADY, "warmup_steps": 12},
    },
    "kd_topk": {
        "callbacks": [DEPTH, best()],
        "model": {"loss": "kd_topk", "distillation": {"k": 8}},
        "trainer": {"val_check_interval": 1.0},
    },
    "fsdp2": {
        "callbacks": [DEPTH, best(filename="best")],
        "model": {**UNSTEADY, "warmup_steps": 12},
        "trainer": {"devices": 2, "strategy": "fsdp2", "accumulate_grad_batches": 1},
    },
}


class LossLog(pl.Callback):
    """Writes down the loss of every batch at once, exactly."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_rank:
            return
        key = f"{trainer.current_epoch} {batch_idx} {trainer.global_step}"
        with Path(trainer.default_root_dir, "losses.txt").open("a") as file:
            file.write(f"{key} {outputs['loss'].item().hex()}\n")


class Terminate(pl.Callback):
    """Sends the signal to its own process at a hook of the third step, once in a directory."""

    def __init__(self, hook="on_train_batch_start", rank=0):
        setattr(self, hook, self.terminate)
        self.rank = rank

    def terminate(self, trainer, *arguments):
        told = Path(trainer.default_root_dir, "told")
        if trainer.global_step >= 2 and trainer.global_rank == self.rank and not told.exists():
            told.touch()
            os.kill(os.getpid(), signal.SIGTERM)


def write_config(directory: Path, case: str, steps: int = 36) -> list[str]:
    """Write model, text and config of a case; return the arguments that run it."""
    directory.mkdir(parents=True, exist_ok=True)
    settings = CASES[case]
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    name = write_model(directory / "model", **sizes)
    words = random.Random(0).choices(["river", "mill", "sea", "runs", "to"], k=3000)
    (directory / "text.txt").write_text(" ".join(words), encoding="utf-8")
    sources = dict.fromkeys(("train", "validation", "calibration"), str(directory / "text.txt"))
    config = {
        "seed_everything": 5,
        "model": {
            "name": name,
            "lora": {"r": 4, "dropout": 0.1},
            "learning_rate": 0.01,
            "warmup_steps": 3,
            **settings.get("model", {}),
        },
        "data": {
            **sources,
            "seq_len": 64,
            "batch_size": 2,
            "num_calibration": 8,
            "num_validation": 4,
            **settings.get("data", {}),
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": steps,
            "accumulate_grad_batches": 2,
            "limit_train_batches": 25,
            "val_check_interval": 10,
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **settings.get("trainer", {}),
            "callbacks": [
                *settings["callbacks"],
                {"class_path": "stopped_runs.LossLog"},
                {"class_path": "RecoveryCheckpoint", "init_args": {"every_n_train_steps": 3}},
            ],
        },
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return ["--config", str(directory / "config.yaml")]
