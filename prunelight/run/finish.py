"""The end of a fit: merge, save, measure, report.

What was trained becomes a plain transformers model, is saved as the verified directory final/, and
measured on the held-out windows; the report tells what the run did and what it cost.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel

from prunelight.evaluation.report.page.card_figures import card_figures
from prunelight.models.card.model_card import add_to_card, forget_local_base
from prunelight.models.placement import move_if_it_fits
from prunelight.models.saving import MARKER, SavedModel, check_replaceable, save
from prunelight.models.written_files import share_modes
from prunelight.planning.fingerprints import library_versions
from prunelight.recovery.prepared_model import PreparedModel
from prunelight.recovery.sharded_weights import gather_trained
from prunelight.run.checkpoints import check_base
from prunelight.run.measurements import measure_run_stage, note_origin, report, warn_of_collapse
from prunelight.run.run_state import ADAPTER, FINAL, Run, plan_texts
from prunelight.runtime.files.atomic_files import (
    atomic_directory,
    explaining_write_errors,
    newest_checkpoint,
)

log = logging.getLogger(__name__)


def finish(run: Run) -> None:
    """Merge, save, measure and report; afterwards every process holds the result.

    Raises:
        RuntimeError: if a weight that must be zero is not.
    """
    prepared, group = run.prepared, run.place.group
    assert prepared is not None
    if prepared.merges_in_place:
        with run.phases.phase("merge"):
            group.run_on_rank_zero(partial(_keep_adapters, run, prepared))
            model = run.holder.model = prepared.merged()
        group.run_on_rank_zero(partial(_save_and_report, run, prepared, model))
    else:
        _finish_on_base(run, prepared)


def _finish_on_base(run: Run, prepared: PreparedModel) -> None:
    """Merge what was trained onto the base, which rank 0 reads again in full precision."""
    with run.phases.phase("merge"):
        trained = gather_trained(prepared.model)
    run.holder.model = None
    prepared.release()

    def merge() -> None:
        if run.base is not None:
            check_base(run.base)
        base, plans = run.read_again(), run.plans()
        with run.phases.phase("merge"):
            rebuilt = prepared.rebuild_on(base, plans, trained)
            _keep_adapters(run, rebuilt)
            merged = rebuilt.merged()
        _save_and_report(run, rebuilt, merged)

    run.place.group.run_on_rank_zero(merge)
    run.use_result(run.place.root / FINAL)


def _save_and_report(run: Run, prepared: PreparedModel, model: PreTrainedModel) -> None:
    """Note how the model was recovered, then save it and write the report, on rank 0."""
    _note_recovery(run, prepared, model)
    save_and_report(run, model)


def save_and_report(run: Run, model: PreTrainedModel) -> None:
    """Save a trained model in final/ and write the report; only rank 0 calls this."""
    model = move_if_it_fits(model, run.place.device)
    checkpoint = newest_checkpoint(run.place.root / "checkpoints")
    with (
        run.phases.phase("save and verify final"),
        explaining_write_errors(run.place.root / FINAL, checkpoint),
    ):
        saved = _save_final(run, model)
    if (record := run.record) is None:
        return
    record.verification[Path(saved.directory).name] = saved.verification
    if run.settings.recovery != "none":
        _measure_result(run, model, saved)
    with explaining_write_errors(run.place.root / "report.md", checkpoint):
        # The report comes last: with it the run is over, and nothing is done again.
        note_origin(run, record)
        add_to_card(Path(saved.directory), card_figures(record))
        for file in report(run, record):
            log.info("wrote %s", file)


def _save_final(run: Run, model: PreTrainedModel) -> SavedModel:
    """Save the result with the plans that led to it."""
    return save(
        model,
        run.checked_tokenizer(),
        run.place.root / FINAL,
        extra_files=plan_texts(run.plans()),
        trust_remote_code=run.trust_remote_code,
        dense_fault=run.dense_fault,
    )


def _note_recovery(run: Run, prepared: PreparedModel, model: PreTrainedModel) -> None:
    """Put into the record how the model was recovered, and warn of zeros that it filled."""
    if prepared.fills_zeros:
        unmerged = "; adapter/ holds the adapters unmerged"
        lora = run.settings.recovery == "lora"
        run.warn(prepared.zeros.describe_loss(model) + (unmerged if lora else ""))
    if run.record is not None:
        zeros = {"keep_zeros": run.settings.keep_zeros} if prepared.zeros.planned else {}
        run.record.recovery = {**run.describe_recovery(), **zeros}


def _measure_result(run: Run, model: PreTrainedModel, saved: SavedModel) -> None:
    """Add the recovered model to the record, and warn if the recovery made it worse."""
    assert run.record is not None
    stages = run.record.stages
    before = stages[-1].perplexity
    with run.phases.phase("evaluate recovered"):
        stage = measure_run_stage(run, "recovered", model, earlier=stages)
    stage = replace(stage, size_bytes=saved.size_bytes)
    stages.append(stage)
    warn_of_collapse(run.record)
    if stage.perplexity > before:
        run.warn(
            f"the recovery made the model worse: perplexity {before:.4g} before, "
            f"{stage.perplexity:.4g} after; the text is too little or unlike the validation's, or "
            "the learning rate is too high"
        )


def _keep_adapters(run: Run, prepared: PreparedModel) -> None:
    """Save the adapters unmerged too if merging fills zeros: a whole directory of peft."""
    model = prepared.model
    if not (prepared.fills_zeros and isinstance(model, PeftModel)):
        return
    directory = run.place.root / ADAPTER
    check_replaceable(directory)
    with atomic_directory(directory) as temporary:
        # Embeddings are not adapted; "auto" would ask the hub whether they are.
        model.save_pretrained(str(temporary), save_embedding_layers=False)
        (temporary / MARKER).write_text(json.dumps({"versions": library_versions()}, indent=1))
        forget_local_base(temporary / "README.md")
        share_modes(temporary)
    log.info("saved %s", directory)
