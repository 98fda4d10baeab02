"""A study: are pruning and quantization orthogonal? Dense, pruned, quantized and both, recovered.

The fit itself gives the model that is pruned and quantized. After it the other three are recovered
with the same settings, as runs of their own in sub directories; the table goes into the report.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from prunelight.evaluation.orthogonality import ROWS, Cell, orthogonality_section
from prunelight.evaluation.perplexity import evaluate
from prunelight.evaluation.report.record import RunRecord
from prunelight.evaluation.report.report import write_report
from prunelight.models.placement import to_device
from prunelight.models.sizes import stored_bytes
from prunelight.recovery.quantization import BitsAndBytes
from prunelight.run.measurements import held_out_windows
from prunelight.training.recovery_module import RecoveryModule
from prunelight.training.trainer import pruning_methods

log = logging.getLogger(__name__)

TITLE = "Are pruning and quantization orthogonal?"

_TRAINER_SETTINGS = (
    *("accelerator", "precision", "max_steps", "max_epochs", "limit_train_batches"),
    *("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm"),
)


class Orthogonality(Callback):
    """Recover the dense, the pruned and the quantized model after the fit, and compare all four.

    Put it before the pruning callbacks, so that it checks the run before they begin.
    """

    def __init__(self) -> None:
        self._adapted = _AdaptedCell()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is something to compare; Lightning calls it.

        Raises:
            ValueError: if the run does not prune, quantize and train adapters, or on more than one
                device.
        """
        if stage != "fit":
            return
        run = pl_module.run if isinstance(pl_module, RecoveryModule) else None
        quantization = run.settings.quantization if run else None
        recovery = run.settings.recovery if run else None
        pruned = bool(pruning_methods(trainer))
        if not pruned or quantization in (None, "none") or recovery != "lora":
            raise ValueError(
                f"Orthogonality compares pruning and quantization: pruning callback {pruned}, "
                f"model.quantization={quantization} and model.recovery="
                f"{recovery} must be there, nf4, fp4 or int8, and lora"
            )
        if trainer.world_size > 1:
            raise ValueError(
                f"Orthogonality recovers its models one after the other on one device, not on "
                f"{trainer.world_size}; set trainer.devices=1 and trainer.num_nodes=1"
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the adapters on their quantized base, before these are merged."""
        self._adapted.on_fit_end(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Recover the other models, and write the report again with the table."""
        if stage != "fit" or self._adapted.cell is None:
            return
        assert isinstance(pl_module, RecoveryModule)
        assert pl_module.record is not None
        record = pl_module.record
        full: dict[str, Any] = {"quantization": "none", "bitsandbytes": BitsAndBytes()}
        dense, _ = self._recover(trainer, pl_module, "dense", **full)
        objective, full["name"] = pl_module.objective, str(pl_module.base)
        if objective.kind != "lm" and objective.settings.name is None:  # else it teaches itself
            full["distillation"] = replace(objective.settings, name=pl_module.name)
        pruned, _ = self._recover(trainer, pl_module, "pruned", **full)
        quantized, adapted = self._recover(trainer, pl_module, "quantized")
        own, both = _cells(record), self._adapted.cell
        before = (own["dense"], own["pruned"], quantized["quantized"], own["quantized"])
        after = (dense["recovered"], pruned["recovered"], adapted, both)
        assert adapted is not None
        record.sections[TITLE] = orthogonality_section(
            dict(zip(ROWS, before, strict=True)),
            dict(zip(ROWS, after, strict=True)),  # type: ignore[arg-type]  # asserted above
        )
        self._adapted.cell = None
        for file in write_report(Path(trainer.default_root_dir), record):
            log.info("wrote %s", file)

    def _recover(
        self, trainer: Trainer, module: RecoveryModule, what: str, **changes: Any
    ) -> tuple[dict[str, Cell], Cell | None]:
        """Run a recovery like that of the fit; return its stages, and it before merging."""
        log.info("orthogonality: recovering the %s model", what)
        adapted, root = _AdaptedCell(), Path(trainer.default_root_dir) / "orthogonality" / what
        settings = {name: getattr(trainer, name) for name in _TRAINER_SETTINGS}
        device = trainer.strategy.root_device
        other = type(trainer)(
            **settings,
            # The run's own card, not the first one.
            devices=[device.index] if device.type == "cuda" else 1,
            callbacks=[adapted],
            limit_val_batches=0,  # the report evaluates
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=trainer.progress_bar_callback is not None,
            enable_model_summary=False,
            default_root_dir=root,
        )
        sibling = module.sibling(**changes)
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        other.fit(sibling, datamodule=datamodule)
        assert sibling.record is not None
        return _cells(sibling.record), adapted.cell


class _AdaptedCell(Callback):
    """Keeps how a quantized model with its adapters is at the end of a fit."""

    def __init__(self) -> None:
        self.cell: Cell | None = None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate, if the base is quantized; callbacks come before the module merges."""
        assert isinstance(pl_module, RecoveryModule)
        run = pl_module.run
        if run.settings.quantization != "none":
            model: Any = pl_module.model
            model = to_device(model, run.place.device)
            quality = evaluate(model, held_out_windows(run))
            self.cell = Cell(quality.perplexity, quality.accuracy, stored_bytes(model))


def _cells(record: RunRecord) -> dict[str, Cell]:
    return {s.name: Cell(s.perplexity, s.accuracy, s.size_bytes) for s in record.stages}
