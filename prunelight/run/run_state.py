"""The state of one run: which model, where it can be read again, and what is known of it so far.

A `Run` is what everything from the first check to the report works on. It knows no LightningModule:
the module that trains only holds the model, and says how it recovers by `RecoverySettings`.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunelight.evaluation.report.record import RunRecord
from prunelight.evaluation.report.report import summary_table
from prunelight.evaluation.speed import Architecture, LatencyProtocol
from prunelight.models.loading import load
from prunelight.models.saving import MARKER
from prunelight.planning.plan import Plan
from prunelight.recovery.distillation.objective import Objective
from prunelight.recovery.prepared_model import PreparedModel, RecoverySettings
from prunelight.recovery.zeros.weight_masks import WeightMasks
from prunelight.run.strategies import Place
from prunelight.runtime.files.directory_lock import DirectoryLock
from prunelight.runtime.measuring import OTHER, Measurement, Phases

log = logging.getLogger(__name__)

FINAL, ADAPTER = "final", "adapter"  # directories of a run
DENSE_PREDICTIONS = "dense_predictions"  # of the dense model, with which stages are compared
MEASURED = "measured.json"  # beside the pruned base: the record of the run so far


class ModelHolder(Protocol):
    """Whatever has the model of a run as an attribute: the LightningModule that trains it."""

    model: Any


class Run:
    """One run, from its first check to its report.

    Attributes:
        holder: has the model that is pruned and trained.
        name: of the dense model, what `prunelight.load` takes.
        dtype: of the weights: auto, float32, bfloat16 or float16.
        trust_remote_code: run Python code that comes with the model.
        attn_implementation: attention that the models compute with; None: transformers chooses.
        settings: how the model is recovered.
        objective: what the recovery learns from.
        latency: protocol by which generation is timed for the report; None: not at all.
        probes: ask probes, samples and divergence at each stage of the report.
        tokenizer: of the model, once it is loaded.
        source: where `model` can be read again; "" for a model that exists only in memory.
        base: directory of the pruned base; None before the pruning.
        record: of the run so far, for the report; None where nothing is measured.
        gradual: a method prunes while the model trains.
        prepared: the model in training; None before `start.prepare`.
        phases: where the time of this start goes.
        earlier_training: what earlier starts of the same training took.
        dense: what the dense model was built from, to compare speeds with; None if not known.
        place: where the run takes place; set by `attach`.
        describe_recovery: returns how far the recovery is, for report and checkpoints.
        is_same_training: returns whether a checkpoint's settings are this run's; None: not known.
        dense_fault: what `generation_fault` says of the dense model; None if nobody asked.
        checked: the pruning has done the preflight of this fit, recovery need not do it again.
        precision_losses: what dtype, precision and recovery lose together, one sentence each.
    """

    place: Place

    def __init__(
        self,
        holder: ModelHolder,
        name: str,
        *,
        dtype: str = "auto",
        trust_remote_code: bool = False,
        attn_implementation: str | None = None,
        settings: RecoverySettings = RecoverySettings(),  # noqa: B008 (frozen)
        objective: Objective | None = None,
        latency: LatencyProtocol | None = None,
        probes: bool = True,
        describe_recovery: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        self.holder, self.name, self.dtype = holder, name, dtype
        self.trust_remote_code, self.settings = trust_remote_code, settings
        self.attn_implementation = attn_implementation
        self.objective, self.latency = objective, latency
        self.probes = probes
        self.describe_recovery = describe_recovery
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.source: str | Path = ""
        self.base: Path | None = None
        self.record: RunRecord | None = None
        self.gradual = False
        self.prepared: PreparedModel | None = None
        self.phases = Phases()
        self.earlier_training = Measurement()
        self.dense: Architecture | None = None
        self.is_same_training: Callable[[Mapping[str, Any]], bool] | None = None
        self.dense_fault: str | None = None
        self.checked = False
        self.precision_losses: list[str] = []
        self._seed: int | None = None
        self._lock: DirectoryLock | None = None

    def attach(self, place: Place) -> None:
        """Say where the run takes place, at the start of each verb of a Trainer."""
        if getattr(self, "place", None) != place:
            self.checked = False
        self.place = place
        self.phases.device, self.phases.quiet = place.device, place.trainer.global_rank > 0
        if place.stage in ("fit", "prune") and not self.phases.running:
            self.start_clock()

    def start_clock(self, phase: str = OTHER) -> None:
        """Measure the run from now on, unless that began before; what no phase has is `phase`'s."""
        if not self.phases.running and self.record is not None:  # of an earlier fit
            self.record.costs = [replace(cost, reused=True) for cost in self.record.costs]
        self.phases.begin(phase)

    def hold_directory(self) -> None:
        """Keep other processes from running in the directory of this run, until it is released.

        Raises:
            RuntimeError: if another process runs there; names it and the remedy.
        """
        self.release_directory()
        self._lock = DirectoryLock(self.place.root)

    def release_directory(self) -> None:
        """Let other processes run in the directory."""
        if self._lock is not None:
            self._lock.release()
        self._lock = None

    @property
    def device(self) -> torch.device:
        """Device of this process; the CPU for a checkpoint that is loaded without a Trainer."""
        place = getattr(self, "place", None)
        return torch.device("cpu") if place is None else place.device

    @property
    def seed(self) -> int:
        """Seed of the run: torch's seed when this is first asked for."""
        if self._seed is None:
            self._seed = torch.initial_seed()
        return self._seed

    # --- which model -------------------------------------------------------------------------

    @property
    def model(self) -> PreTrainedModel | PeftModel | None:
        """The model as it is now; None while there is none in memory."""
        model: PreTrainedModel | PeftModel | None = self.holder.model
        return model

    def load_model(self) -> PreTrainedModel:
        """Return the model without adapters, and load it by name if there is none yet."""
        if self.model is None:
            return self._read(self.name)
        assert isinstance(self.model, PreTrainedModel)
        return self.model

    def read_again(self) -> PreTrainedModel:
        """Read the model from its source again; afterwards `model` is that."""
        return self._read(self.source)

    def _read(self, source: str | Path) -> PreTrainedModel:
        self.source = source
        with self.phases.phase("load the model"):
            model, self.tokenizer = load(
                source,
                dtype=self.dtype,
                trust_remote_code=self.trust_remote_code,
                attn_implementation=self.attn_implementation,
            )
        self.holder.model = model
        return model

    def forget_model(self) -> None:
        """Drop the model, so that its memory is free for the next one."""
        self.holder.model = self.prepared = None

    def use_base(self, directory: Path, record: RunRecord | None) -> None:
        """Load a pruned base, which later loads and checkpoints then name."""
        self.use_result(directory)
        self.base, self.record = directory, record

    def use_result(self, directory: Path) -> None:
        """Load the merged result of the run; the base stays what training began with."""
        self.forget_model()
        self._read(directory)

    @property
    def final(self) -> Path | None:
        """Directory of the result, with weights that others can load; None before it is there."""
        place = getattr(self, "place", None)
        directory = None if place is None else place.root / FINAL
        return directory if directory is not None and (directory / MARKER).is_file() else None

    def summary(self) -> str:
        """Return as text what the command line shows at the end: figures, costs and directories.

        Raises:
            ValueError: before the first measurement.
        """
        if self.record is None:
            raise ValueError("nothing is measured yet; call summary after trainer.fit")
        text = io.StringIO()
        console = Console(width=120, file=text, highlight=False)
        console.print(summary_table(self.record))
        for what, directory in (("Model", self.final), ("Report", self.place.root / "report.md")):
            if directory is not None and directory.exists():
                console.print(f"{what}: {directory.resolve()}", soft_wrap=True)
        return text.getvalue()

    @property
    def in_training(self) -> bool:
        """Whether the model is prepared for its training, and not merged yet."""
        return self.prepared is not None and self.prepared.in_training

    @property
    def masks(self) -> WeightMasks | None:
        """Masks of sparsified weights in training; None if there is nothing that needs them."""
        return self.prepared.zeros.masks if self.prepared is not None else None

    def checked_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer of the loaded model.

        Raises:
            ValueError: if a model was given without one.
        """
        if self.tokenizer is None:
            raise ValueError("module.tokenizer=None: set it together with module.model")
        return self.tokenizer

    # --- what is known of it -----------------------------------------------------------------

    def plan_files(self) -> list[Path]:
        """Return the files of plans beside the base, or beside the model that is recovered."""
        return plan_files(self._planned_directory)

    def plans(self) -> list[Plan]:
        """Return the plans that led to the base, or to the model that is recovered."""
        return plans_beside(self._planned_directory)

    @property
    def _planned_directory(self) -> Path:
        return self.base or Path(self.name).expanduser()

    def warn(self, text: str) -> None:
        """Warn now and in the report."""
        log.warning(text)
        if self.record is not None:
            self.record.warnings.append(text)


def plan_files(directory: Path) -> list[Path]:
    """Return the plans beside a model that prunelight saved, in the order they were carried out."""
    if not (directory / MARKER).is_file():
        return []
    # plan.json, plan-2.json, ..., plan-10.json
    return sorted(directory.glob("plan*.json"), key=lambda file: (len(file.name), file.name))


def plans_beside(directory: Path) -> list[Plan]:
    """Return the plans that led to a model that prunelight saved, in the order of carrying out.

    A plan whose file is gone is taken from measured.json, the record of the run that made it.
    """
    plans = [Plan.load(file) for file in plan_files(directory)]
    if not (directory / MARKER).is_file() or not (directory / MEASURED).is_file():
        return plans
    try:
        recorded = json.loads((directory / MEASURED).read_text(encoding="utf-8")).get("plans", [])
        measured = [Plan.from_dict(plan) for plan in recorded]
    except (ValueError, TypeError, AttributeError) as error:
        log.warning("%s is not read: %s", directory / MEASURED, error)
        return plans
    missing = [plan for plan in measured if plan not in plans]
    if not missing:
        return plans
    log.warning("%s holds %d plans whose files are gone", directory / MEASURED, len(missing))
    return [*(plan for plan in plans if plan not in measured), *measured]


def plan_texts(plans: Sequence[Plan]) -> dict[str, str]:
    """Return file name -> text of plans, in the order of carrying out."""
    names = ["plan.json", *(f"plan-{number}.json" for number in range(2, len(plans) + 1))]
    texts = (json.dumps(plan.to_dict(), indent=1) + "\n" for plan in plans)
    return dict(zip(names, texts, strict=False))
