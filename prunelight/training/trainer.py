"""Lightning's Trainer with the verbs of prunelight: it resumes by itself, prunes and analyzes."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl

from prunelight.calibration.data_windows import calibration_windows_of
from prunelight.evaluation.report.analysis_report import write_analysis
from prunelight.evaluation.report.writing import check_report_files
from prunelight.models.placement import to_device
from prunelight.run.method import PruningMethod, methods_among
from prunelight.run.start import prune_only, tell_slow_precision
from prunelight.run.strategies import Place
from prunelight.runtime.files.checkpoint_files import CHECKPOINT_WORDS, check_checkpoint_path
from prunelight.scoring.analysis import analyze
from prunelight.training.recovery_module import RecoveryModule
from prunelight.training.resuming.kept_checkpoints import find_resume_point

log = logging.getLogger(__name__)


class Trainer(pl.Trainer):
    """Lightning's Trainer, which resumes by itself, with the verbs prune and analyze.

    Attributes:
        fit_ckpt_path: what the last fit was to go on from.
        resumes_itself: the last fit goes on by itself if it is started again.
    """

    fit_ckpt_path: str | Path | None = None
    resumes_itself: bool = False

    def fit(  # type: ignore[override]  # no weights_only: it is always True
        self,
        model: pl.LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: pl.LightningDataModule | None = None,
        ckpt_path: str | Path | None = "last",
    ) -> None:
        """Prune, recover, evaluate and save; see Lightning's own for the first four arguments.

        Args:
            model: the module.
            train_dataloaders: data, if there is no datamodule.
            val_dataloaders: data, if there is no datamodule.
            datamodule: the data.
            ckpt_path: "last" goes on where an earlier start of the same run was interrupted, if
                there was one; a file goes on from that; null starts anew.
        """
        self.resumes_itself = ckpt_path == "last"
        point = find_resume_point(self)
        if ckpt_path == "last" and point is not None:
            ckpt_path = point.find(self)  # what other ModelCheckpoints saved last is less exact
        self.fit_ckpt_path = ckpt_path
        if ckpt_path and str(ckpt_path).partition(":")[0] not in CHECKPOINT_WORDS:
            check_checkpoint_path(ckpt_path)  # before minutes of pruning
        super().fit(model, train_dataloaders, val_dataloaders, datamodule, ckpt_path)

    def prune(self, model: RecoveryModule, datamodule: pl.LightningDataModule) -> None:
        """Score, plan, apply and save the pruned model with its report, then stop.

        Raises:
            ValueError: if no pruning callback is configured.
        """
        methods = pruning_methods(self)
        if not methods:
            raise ValueError("trainer.callbacks has no pruning callback; add one, such as ShortGPT")
        if self._connect_alone(model, datamodule):
            prune_only(model.run, methods)

    def analyze(
        self,
        model: RecoveryModule,
        datamodule: pl.LightningDataModule,
        kernel: Literal["linear", "rbf"] = "linear",
        ignore_first_tokens: int = 1,
    ) -> None:
        """Write analysis.md with pictures of the model's hidden states; nothing is pruned.

        Args:
            model: names the model.
            datamodule: its calibration windows are looked at.
            kernel: of CKA: linear, or rbf with the median distance.
            ignore_first_tokens: tokens at the start of each window that do not count in CKA and
                Block Influence; attention sinks are there.
        """
        if not self._connect_alone(model, datamodule):
            return
        root = Path(self.default_root_dir)
        check_report_files(root)
        model.run.hold_directory()
        on_device = to_device(model.run.load_model(), self.strategy.root_device)
        analysis = analyze(
            on_device,
            calibration_windows_of(datamodule, on_device),
            kernel=kernel,
            ignore_first_tokens=ignore_first_tokens,
        )
        for file in write_analysis(root, asdict(analysis)):
            log.info("wrote %s", file)
        model.run.release_directory()

    def _connect_alone(self, model: RecoveryModule, datamodule: pl.LightningDataModule) -> bool:
        """Connect model and data; False on ranks that only would write the same as rank 0."""
        self.state.fn = None  # of an earlier verb
        self.strategy.connect(model)
        model.trainer = self
        self.datamodule = datamodule
        model.run.attach(Place(self))
        tell_slow_precision(model.run)
        return self.is_global_zero


def pruning_methods(trainer: pl.Trainer) -> list[PruningMethod]:
    """Return the callbacks of a Trainer that are pruning methods, in the order they act in."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return methods_among(callbacks)
