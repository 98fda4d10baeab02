"""The start of a fit: load, preflight, score, plan, apply, save, prepare.

`start` prunes before the optimizer exists: layers removed later would stay in it as dead tensors.
All processes score, plan, apply and evaluate together on their shares of the windows. Rank 0 saves
the pruned base as a verified directory, and every process loads the same bytes. A directory with
the same fingerprint is reused: a resume never scores again. `prepare` makes the model trainable.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from transformers import PreTrainedModel

from prunelight.calibration.shared_windows import group_of
from prunelight.calibration.windows import split_windows
from prunelight.evaluation.probes.examiner import collapse_warnings
from prunelight.evaluation.report.record import RunRecord, Stage
from prunelight.evaluation.speed import Architecture, forward_seconds
from prunelight.evaluation.stages import new_record
from prunelight.models.families.own_classes.registration import code_file
from prunelight.models.loading import DTYPES, check_hub, find_source, load_config
from prunelight.models.placement import device_for, move_if_it_fits
from prunelight.models.saving import SavedModel, check_replaceable, generation_fault, save
from prunelight.models.sizes import parameter_bytes
from prunelight.planning.fingerprints import describe_windows, fingerprint_of
from prunelight.planning.plan import Plan
from prunelight.recovery.memory.recovery_memory import Batch, needs_checkpointing
from prunelight.recovery.precision import slow_precision
from prunelight.recovery.prepared_model import PreparedModel
from prunelight.run.checkpoints import (
    base_fingerprints,
    check_base,
    read_measured,
    write_measured,
)
from prunelight.run.measurements import (
    add_engines,
    add_quantized,
    can_measure,
    changed_examinations,
    describe_evaluation,
    examine_stage,
    examiners_of,
    measure_run_stage,
    measures_the_same,
    note_costs,
    report,
    start_record,
    warn_of_collapse,
)
from prunelight.run.method import PruningMethod
from prunelight.run.preflight import Facts, preflight
from prunelight.run.run_state import Run, plan_texts, plans_beside
from prunelight.run.teacher import prepare_teacher
from prunelight.runtime.devices import device_name, free_memory, slowness
from prunelight.runtime.files.atomic_files import explaining_write_errors

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Base:
    """A pruned base, made already or not: its directory and its fingerprint."""

    directory: Path
    fingerprint: str


def tell_slow_precision(run: Run) -> None:
    """Warn, before anything is read, if this device computes slowly in the dtype of the run."""
    place, dtype = run.place, DTYPES.get(run.dtype)
    if place.device.type != "cpu" or place.trainer.global_rank > 0:
        return
    if run.model is not None:
        dtype = run.model.dtype
    elif dtype is None:  # "auto": the checkpoint's own, float32 for GGUF
        source = find_source(run.name)
        dtype = torch.float32
        if source.gguf_file is None:
            config = load_config(check_hub(source), trust_remote_code=run.trust_remote_code)
            dtype = getattr(config.get_text_config(), "dtype", None) or torch.float32
    times = partial(slowness, device=place.device)
    told = slow_precision(dtype, place.precision, run.settings.recovery, times)
    if told is not None:
        log.warning(told)


def start(run: Run, methods: list[PruningMethod]) -> None:
    """Make, or find, the pruned base of a run and load it on every process.

    Raises:
        ValueError, TypeError: for arguments or data that do not fit, before the first forward.
        RuntimeError: on the other processes, if one failed.
    """
    facts = preflight(run, methods)
    run.dense = Architecture.of(facts.model)
    with run.place.group.failing_together():
        with run.phases.phase("fingerprint model and data"):
            base, record = _find_base(facts)
        if record is None:
            _make_base(facts, base)
        else:
            _reuse_base(facts, base, record)
        run.forget_model()
        record = read_measured(base.directory)
        if record is None:
            raise FileNotFoundError(
                f"this process does not see {base.directory}, which rank 0 wrote; trainer."
                "default_root_dir must be on a disk that all nodes share"
            )
        run.use_base(base.directory, record)
    run.checked = True


def prune_only(run: Run, methods: list[PruningMethod]) -> None:
    """Make, or find, the pruned base of a run, and write the report of it."""
    start(run, methods)
    run.checked = False  # a fit after it has checks of its own
    assert run.record is not None
    report(run, run.record)
    run.release_directory()


def start_recovery(run: Run) -> None:
    """Get ready to train the pruned base, or the model as it was loaded if nothing pruned it."""
    if not run.checked:
        preflight(run)
    run.checked = False  # the next fit checks again
    prepare_teacher(run)
    if run.dense is None:
        run.dense = Architecture.of(run.load_model())
    if run.record is None and can_measure(run):
        record = partial(start_record, run, run.load_model())
        run.record = run.place.group.run_on_rank_zero(record)


def prepare(run: Run) -> PreparedModel:
    """Make the model trainable, in place, before the optimizer exists: in bits, with adapters."""
    with run.phases.phase("prepare the training"):
        model = run.load_model()
        settings = replace(
            run.settings,
            gradual=run.gradual,
            seed=run.seed,
            gradient_checkpointing=_checkpoints(run, model),
        )
        run.prepared = PreparedModel(
            model, run.plans(), settings, partial(add_quantized, run), run.device
        )
    run.holder.model = run.prepared.model
    if run.prepared.zeros.warning and settings.recovery != "none":
        run.warn(run.prepared.zeros.warning)
    return run.prepared


def _checkpoints(run: Run, model: PreTrainedModel) -> bool:
    """Return whether activations are computed again in the backward; all ranks do the same."""
    asked, place = run.settings.gradient_checkpointing, getattr(run, "place", None)
    if asked is not None:
        return asked
    if place is None or place.stage != "fit":
        return False
    batch_size, seq_len = (getattr(place.data, name, None) for name in ("batch_size", "seq_len"))
    if not (type(batch_size) is type(seq_len) is int and batch_size > 0 and seq_len > 1):
        return False  # data of the user's own, which need not say so
    strategy = "fsdp2" if place.shards_weights else "ddp"
    batch = Batch(batch_size, seq_len, place.group.size, strategy)
    free = free_memory(run.device) + (parameter_bytes(model) if model.device == run.device else 0)
    needed = needs_checkpointing(model, run.settings, batch, run.device, free)
    return any(place.group.gather(needed))


# --- the pruned base -------------------------------------------------------------------------


def _find_base(facts: Facts) -> tuple[Base, RunRecord | None]:
    """Return where the pruned base is or will be, and its record if it is there."""
    run, group = facts.run, facts.run.place.group
    fingerprint, earlier = base_fingerprints(facts.model, facts.methods, facts.windows)
    evaluation = fingerprint_of(describe_windows(*split_windows(facts.held_out)))
    both = f"{fingerprint} {evaluation}"
    group.check_same("the fingerprint of model, arguments and windows", both)
    root = Path(group.run_on_rank_zero(lambda: str(run.place.root)))
    for known in (fingerprint, earlier):
        if known is None:
            continue
        base = Base(root / f"pruned-{known}", known)
        group.run_on_rank_zero(partial(check_replaceable, base.directory))
        record = group.run_on_rank_zero(partial(read_measured, base.directory))
        if record is not None:
            group.run_on_rank_zero(partial(check_base, base.directory, known))
            return base, record
    return Base(root / f"pruned-{fingerprint}", fingerprint), None


def _reuse_base(facts: Facts, base: Base, record: RunRecord) -> None:
    """Keep the decision; measure again if text, timing or device of the evaluation are others."""
    run, group = facts.run, facts.run.place.group
    log.info("reusing %s: same model, arguments and calibration", base.directory)
    record.costs = [replace(cost, reused=True) for cost in record.costs]
    now = group.run_on_rank_zero(partial(describe_evaluation, run))
    place = device_for(facts.model, run.place.device)
    device = group.run_on_rank_zero(lambda: device_name(place))
    changed = changed_examinations(record.evaluation, now)
    if not measures_the_same(record.evaluation, now) or record.device != device:
        _measure_base(facts, base, record, _stage_anew)
    elif changed:
        log.info("examining the base again: %s", ", ".join(sorted(changed)))
        again = partial(_stage_examined_again, changed)
        _measure_base(facts, base, record, again)
    asked = {"serving", *(examiner.examines for examiner in examiners_of(run))}
    record.stages = [_without_others(stage, asked) for stage in record.stages]
    record.device, record.evaluation = device, describe_evaluation(run)
    group.run_on_rank_zero(lambda: write_measured(base.directory, record))


# Called as measure(facts, a stage of the record, its model, stages measured before).
MeasureStage: TypeAlias = Callable[[Facts, Stage, PreTrainedModel, list[Stage]], Stage]


def _measure_base(facts: Facts, base: Base, record: RunRecord, measure: MeasureStage) -> None:
    """Measure the stages of a base that is there again: the dense and the pruned model."""
    run, stages = facts.run, record.stages
    for number in range(len(stages)):
        told = collapse_warnings(stages[: number + 1])
        record.warnings = [text for text in record.warnings if text not in told]
    model = move_if_it_fits(facts.model, run.place.device)
    record.stages = []
    for stage in stages:
        if stage.name == "pruned":
            run.use_result(base.directory)
            model = move_if_it_fits(run.load_model(), run.place.device)
        record.stages.append(measure(facts, stage, model, record.stages))
        warn_of_collapse(record)


def _without_others(stage: Stage, asked: set[str]) -> Stage:
    """Return a stage without the answers of examiners that are not asked any more."""
    answers = {name: answer for name, answer in stage.examined.items() if name in asked}
    return replace(stage, examined=answers)


def _stage_anew(facts: Facts, stage: Stage, model: PreTrainedModel, earlier: list[Stage]) -> Stage:
    with facts.run.phases.phase(f"evaluate {stage.name}"):
        return measure_run_stage(facts.run, stage.name, model, facts.held_out, earlier=earlier)


def _stage_examined_again(
    changed: set[str], facts: Facts, stage: Stage, model: PreTrainedModel, earlier: list[Stage]
) -> Stage:
    group = group_of(facts.held_out)
    return examine_stage(facts.run, stage, model, earlier, group, only=changed)


def _make_base(facts: Facts, base: Base) -> None:
    """Measure, score, plan, apply and save, all processes together."""
    run, group = facts.run, facts.run.place.group
    earlier = {*run.phases.rows}  # phases that the base does not need
    model = move_if_it_fits(facts.model, run.place.device)
    record = new_record(run.name, model, base.fingerprint, describe_evaluation(run))
    with run.phases.phase("evaluate dense"):
        run.dense_fault = group.run_on_rank_zero(partial(generation_fault, model))
    _measure(facts, record, "dense", model)
    dense = copy.deepcopy(model.config)
    model, plans = _prune(facts, record, model)
    if not all(method.gradual for method in facts.methods):
        _measure(facts, record, "pruned", model)
    with run.phases.phase("save and verify pruned"), explaining_write_errors(base.directory):
        saved = group.run_on_rank_zero(partial(_save_base, facts, base.directory, model, plans))
    note_costs(run, record, without=earlier)
    add_engines(record, dense, model.config)
    record.evaluation = describe_evaluation(run)  # files of the dense model are there now
    record.verification[base.directory.name] = saved.verification
    record.stages[-1] = replace(record.stages[-1], size_bytes=saved.size_bytes)
    group.run_on_rank_zero(lambda: write_measured(base.directory, record))


def _measure(facts: Facts, record: RunRecord, name: str, model: PreTrainedModel) -> None:
    """Add one state of the model to the record; the first one also gives F."""
    run = facts.run
    with run.phases.phase(f"evaluate {name}"):
        stage = measure_run_stage(run, name, model, facts.held_out, earlier=record.stages)
        record.stages.append(stage)
        warn_of_collapse(record)
        if name == "dense":
            record.forward_seconds = forward_seconds(model, facts.windows)


def _prune(
    facts: Facts, record: RunRecord, model: PreTrainedModel
) -> tuple[PreTrainedModel, list[Plan]]:
    """Score, plan and apply each method in turn; gradual ones apply while the model trains."""
    plans: list[Plan] = []
    for method in facts.methods:
        device = facts.run.place.device
        name, phase = type(method).__name__, facts.run.phases.phase
        with phase(f"score and plan ({name})"), _computing_on(device, method):
            plan = method.plan(model, facts.windows)
        plans.append(plan)
        if method.gradual:
            continue
        with phase(f"apply ({name})"), _computing_on(device, method):
            model = method.apply(model, plan, facts.windows, record.outcomes)
    record.plans = [plan.to_dict() for plan in plans]
    return model, plans


@contextmanager
def _computing_on(device: torch.device, method: PruningMethod) -> Iterator[None]:
    """Let a method compute on the run's device, and afterwards where it did before."""
    before, method.device = method.device, device
    try:
        yield
    finally:
        method.device = before


def _save_base(
    facts: Facts, directory: Path, model: PreTrainedModel, plans: list[Plan]
) -> SavedModel:
    """Save the pruned model with all plans that led to it."""
    run = facts.run
    # What was done to the model before this run still holds: its zeros stay planned zeros.
    plans = [*plans_beside(Path(run.name).expanduser()), *plans]
    return save(
        model,
        run.checked_tokenizer(),
        directory,
        extra_files=plan_texts(plans),
        trust_remote_code=run.trust_remote_code,
        # Methods that may leave a class of ours sometimes leave one of transformers.
        export_remote_code=any(method.export_remote_code for method in facts.methods)
        and code_file(model.config.model_type) is not None,
        dense_fault=run.dense_fault,
    )
