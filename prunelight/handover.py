"""What a run leaves behind: final/, the unmerged adapter/, its costs, and the plans before."""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel

from prunelight.calibration import Windows
from prunelight.evaluation import Measurement, measure_stage
from prunelight.plan import library_versions
from prunelight.report import Cost, RunRecord
from prunelight.saving import MARKER, Saved, check_replaceable

log = logging.getLogger(__name__)

FINAL, ADAPTER = "final", "adapter"  # directories of a run


def plan_files(directory: Path) -> list[Path]:
    """Return the plans beside a model that prunelight saved, in the order they were carried out."""
    if not (directory / MARKER).is_file():
        return []
    # plan.json, plan-2.json, ..., plan-10.json
    return sorted(directory.glob("plan*.json"), key=lambda file: (len(file.name), file.name))


def check_output(root: Path) -> None:
    """Check that a run may write its result and report.

    Raises:
        FileExistsError: if there is a final/, adapter/ or report.md that prunelight did not write.
    """
    check_replaceable(root / FINAL)
    check_replaceable(root / ADAPTER)
    report = root / "report.md"
    if report.exists() and not report.with_name("report.json").exists():
        raise FileExistsError(
            f"{report} exists and has no report.json of prunelight beside it; set "
            "trainer.default_root_dir to a directory of its own"
        )


def save_adapter(model: PeftModel, root: Path) -> str:
    """Write the adapters as a directory of peft, whole or not at all; return where."""
    directory, temporary = root / ADAPTER, root / f".{ADAPTER}.tmp"
    check_replaceable(directory)
    shutil.rmtree(temporary, ignore_errors=True)
    # Embeddings are not adapted; "auto" would ask the hub whether they are.
    model.save_pretrained(str(temporary), save_embedding_layers=False)
    (temporary / MARKER).write_text(json.dumps({"versions": library_versions()}, indent=1))
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(temporary, directory)
    log.info("saved %s", directory)
    return str(directory)


def add_result(
    record: RunRecord,
    model: PreTrainedModel,
    saved: Saved,
    *,
    training: Measurement | None,
    saving: Measurement,
    windows: Windows | None,
) -> None:
    """Add to the record what the recovery cost, how its result was verified, and its quality.

    Args:
        record: of the run; changed in place.
        model: as it was saved.
        saved: what was written.
        training: cost of the recovery, None if nothing was trained.
        saving: cost of saving.
        windows: held-out windows to evaluate on; None leaves the model's quality out.
    """
    for name, phase in (("recover", training), ("save and verify final", saving)):
        if phase is not None:
            forwards = phase.seconds / record.forward_seconds
            record.costs.append(Cost(name, phase.seconds, forwards, phase.peak_bytes))
    record.verification[Path(saved.directory).name] = saved.verification
    if windows is not None:
        stage = measure_stage("recovered", model, windows)
        record.stages.append(replace(stage, size_bytes=saved.size_bytes))
