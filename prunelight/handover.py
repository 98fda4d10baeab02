"""What a run leaves behind: final/, the unmerged adapter/, its costs, and the plans before."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunelight.evaluation import Measurement, measuring
from prunelight.files import check_writable, explaining, newest_checkpoint
from prunelight.plan import library_versions
from prunelight.report import Cost, RunRecord, Stage, write_report
from prunelight.saving import MARKER, check_replaceable, save

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
        OSError: if nothing can be written there.
    """
    check_writable(root)
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


def hand_over(
    root: Path,
    record: RunRecord | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    plans: Sequence[Path],
    trust_remote_code: bool,
    training: Measurement | None,
    measure: Callable[[PreTrainedModel], Stage] | None,
) -> None:
    """Save the result of a run in final/, and write the report with what it cost and how it is.

    Args:
        root: directory of the run.
        record: of the run so far; None writes no report.
        model: the result.
        tokenizer: saved beside it.
        plans: files that are copied beside it.
        trust_remote_code: for a model whose code came with it.
        training: cost of the recovery, None if nothing was trained.
        measure: measures the result; None leaves its quality out.
    """
    checkpoint = newest_checkpoint(root / "checkpoints")
    with measuring(model.device) as saving, explaining(root / FINAL, checkpoint):
        saved = save(
            model,
            tokenizer,
            root / FINAL,
            extra_files={file.name: file.read_text(encoding="utf-8") for file in plans},
            trust_remote_code=trust_remote_code,
        )
    if record is None:
        return
    for name, phase in (("recover", training), ("save and verify final", saving)):
        if phase is not None:
            forwards = phase.seconds / record.forward_seconds
            record.costs.append(Cost(name, phase.seconds, forwards, phase.peak_bytes))
    record.verification[Path(saved.directory).name] = saved.verification
    if measure is not None:
        before = record.stages[-1]
        record.stages.append(replace(measure(model), size_bytes=saved.size_bytes))
        if record.stages[-1].perplexity > before.perplexity:
            record.warnings.append(_worse(before.perplexity, record.stages[-1].perplexity))
            log.warning(record.warnings[-1])
    with explaining(root / "report.md", checkpoint):
        for file in write_report(root, record):
            log.info("wrote %s", file)


def _worse(before: float, after: float) -> str:
    return (
        f"the recovery made the model worse: perplexity {before:.4g} before, {after:.4g} after; "
        "the text is too little or unlike the validation's, or the learning rate is too high"
    )
