"""The end of a fit: what was trained is merged, saved as a verified directory, and reported."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunelight.evaluation.report.record import Cost, RunRecord, Stage
from prunelight.evaluation.report.report import write_report
from prunelight.models.placement import move_if_it_fits
from prunelight.models.saving import MARKER, check_replaceable, save
from prunelight.planning.fingerprints import library_versions
from prunelight.recovery.prepared_model import PreparedModel
from prunelight.recovery.sharded_weights import gather_trained
from prunelight.run.measurements import measure_run_stage
from prunelight.run.run_state import ADAPTER, FINAL
from prunelight.run.strategies import on_rank_zero
from prunelight.runtime.atomic_files import explaining, newest_checkpoint
from prunelight.runtime.measuring import Measurement, measuring

log = logging.getLogger(__name__)


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


def save_result(
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


def end_fit(module: Any, adapted: PreparedModel) -> None:
    """Merge, save, evaluate and report; afterwards every rank holds the result.

    Args:
        module: the RecoveryModule.
        adapted: its model in training.

    Raises:
        RuntimeError: if a weight that must be zero is not.
    """
    if adapted.sharded or adapted.quantized:
        _merge_anew(module, adapted)
        return
    on_rank_zero(module.trainer, partial(_save_adapter, module, adapted))
    module.model = adapted.merged()
    on_rank_zero(module.trainer, partial(_finish, module, module.model, adapted))


def _merge_anew(module: Any, adapted: PreparedModel) -> None:
    """Merge what was trained onto the base, which rank 0 reads again."""
    trained = gather_trained(adapted.model)
    module.model = None

    def merge() -> None:
        other = adapted.rebuild_on(module.read_base(), module.plans(), trained)
        _save_adapter(module, other)
        _finish(module, other.merged(), other)

    on_rank_zero(module.trainer, merge)
    module.use_result(_root(module) / FINAL)


def _root(module: Any) -> Path:
    return Path(module.trainer.default_root_dir)


def _save_adapter(module: Any, adapted: PreparedModel) -> None:
    """Keep the adapters unmerged too, if merging fills zeros."""
    if adapted.fills_zeros and isinstance(adapted.model, PeftModel):
        save_adapter(adapted.model, _root(module))


def _finish(module: Any, model: PreTrainedModel, adapted: PreparedModel) -> None:
    if adapted.fills_zeros:
        kept = "; adapter/ holds the adapters unmerged" if module.recovery == "lora" else ""
        module.warn(adapted.zeros.describe_loss(model) + kept)
    if module.record is not None:
        told = {"keep_zeros": module.keep_zeros} if adapted.zeros.planned else {}
        module.record.recovery = {**module.describe_recovery(), **told}
    trained = module.recovery != "none"
    save_result(
        _root(module),
        module.record,
        move_if_it_fits(model, module.trainer.strategy.root_device),
        module.checked_tokenizer(),
        plans=module.plan_files(),
        trust_remote_code=module.trust_remote_code,
        training=module.resuming.measurement,
        measure=partial(measure_run_stage, module, "recovered") if trained else None,
    )
