"""Cells with recovery: a normal fit in the cell's directory, so that a killed one goes on exactly.

The fit is that of `prunelight fit`: RecoveryModule, TextDataModule and our Trainer. The config's
`recovery` holds their settings; model, calibration, method, seed and directory are the cell's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import CSVLogger
from transformers import PreTrainedModel

from prunelight.callbacks.base import PruningCallback
from prunelight.callbacks.recovery.checkpoint import RecoveryCheckpoint
from prunelight.comparison.grid import Cell
from prunelight.comparison.running.bench import Bench, data_arguments
from prunelight.comparison.settings import ComparisonSettings, check_keys
from prunelight.models.loading import load
from prunelight.models.placement import move_if_it_fits
from prunelight.run.preflight import FinishedRunError
from prunelight.run.run_state import FINAL
from prunelight.training.recovery_module import RecoveryModule
from prunelight.training.text_datamodule import TextDataModule
from prunelight.training.trainer import Trainer

log = logging.getLogger(__name__)

_SECTIONS = ("model", "data", "trainer")
# Set by the comparison, the same for all cells.
_OURS = {
    "model": ("name", "dtype", "trust_remote_code"),
    "data": ("tokenizer", "calibration", "num_calibration", "seed", "trust_remote_code"),
    "trainer": ("default_root_dir", "callbacks", "logger"),
}


def check_recovery(settings: ComparisonSettings) -> None:
    """Check the settings of the recovery, before anything is computed.

    Raises:
        ValueError: if a key is unknown, set by the comparison itself, or has a wrong value.
    """
    if settings.recovery is None:
        return
    check_keys("recovery", settings.recovery, _SECTIONS)
    for section in _SECTIONS:
        values = settings.recovery.get(section) or {}
        if not isinstance(values, dict):
            raise ValueError(f"recovery.{section}={values!r} must be a mapping of its settings")
        for name in _OURS[section]:
            if name in values:
                raise ValueError(
                    f"recovery.{section}.{name}={values[name]!r} is set by the comparison for all "
                    "cells alike; leave it out"
                )
    limits = ("max_steps", "max_epochs", "max_time")
    if not any(name in (settings.recovery.get("trainer") or {}) for name in limits):
        raise ValueError(
            "recovery.trainer says not how long to train; set max_steps, max_epochs or max_time"
        )
    _parse(settings, 0, Path(settings.out))


def recovered_model(
    bench: Bench, cell: Cell, methods: Sequence[PruningCallback], directory: Path
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Fit a cell, or go on with its fit; return the recovered model and facts of the fit."""
    settings, start = bench.settings, time.perf_counter()
    pl.seed_everything(cell.seed, workers=True, verbose=False)
    given = _parse(settings, cell.seed, directory)
    trainer_settings = {**given.trainer}
    trainer = Trainer(
        **trainer_settings,
        default_root_dir=str(directory),
        callbacks=[*methods, RecoveryCheckpoint()],
        logger=CSVLogger(str(directory), name="logs", flush_logs_every_n_steps=1),
        enable_model_summary=False,
        **_device(bench),
    )
    module, data = given.model, given.data
    try:
        trainer.fit(module, datamodule=data)
    except FinishedRunError:
        log.info("%s: its fit is finished", cell.title)
    if trainer.interrupted:
        raise KeyboardInterrupt
    record = module.record
    model, _ = load(str(directory / FINAL), dtype=str(bench.dense.dtype).removeprefix("torch."))
    facts: dict[str, Any] = {"seconds": {"fit": time.perf_counter() - start}}
    if record is not None:
        facts["plan"] = record.plans[0] if record.plans else None
        facts["later_plans"] = record.plans[1:]
        facts["outcomes"] = record.outcomes
    return move_if_it_fits(model, bench.device), facts


def _device(bench: Bench) -> dict[str, Any]:
    """Return the Trainer's settings for the device of this process."""
    given = (bench.settings.recovery or {}).get("trainer") or {}
    if "accelerator" in given or "devices" in given:
        return {}
    device = bench.device
    if device.type == "cuda":
        return {"accelerator": "gpu", "devices": [device.index or 0]}
    return {"accelerator": device.type, "devices": 1}


def _parse(settings: ComparisonSettings, seed: int, directory: Path) -> Namespace:
    """Return module and data of a recovery, instantiated, and the settings of its Trainer.

    Raises:
        ValueError: if a key or value is none of theirs.
    """
    recovery = settings.recovery or {}
    model = settings.model
    values = {
        "model": {
            "name": model.name,
            "dtype": model.dtype,
            "trust_remote_code": model.trust_remote_code,
            "probes": False,  # of the fit's own report, which a comparison does not show
            **(recovery.get("model") or {}),
        },
        "data": {
            "tokenizer": model.name,
            "trust_remote_code": model.trust_remote_code,
            **data_arguments(settings.data),
            "seed": seed,
            **(recovery.get("data") or {}),
        },
        "trainer": recovery.get("trainer") or {},
    }
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(RecoveryModule, "model")
    parser.add_lightning_class_args(TextDataModule, "data")
    parser.add_class_arguments(Trainer, "trainer", instantiate=False)
    try:
        parsed = parser.parse_object(values)
    except Exception as error:  # argparse's own, or what jsonargparse passes on
        told = " ".join(str(error).split())
        raise ValueError(f"recovery cannot be read: {told[:300]}") from error
    made = parser.instantiate(parsed)
    made.trainer = {**(recovery.get("trainer") or {})}
    return made
