"""What a run measures of its model for the report, always on the same held-out windows."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from prunelight.calibration.data_windows import (
    further_names_of,
    further_windows_of,
    has_validation_batches,
    validation_windows_of,
)
from prunelight.calibration.shared_windows import group_of
from prunelight.calibration.windows import Windows, split_windows
from prunelight.evaluation.examiners import Examiner, examiners_among
from prunelight.evaluation.further_texts import TextsExaminer
from prunelight.evaluation.probes.dense_divergence import DenseDivergence
from prunelight.evaluation.probes.examiner import (
    ProbesExaminer,
    SamplesExaminer,
    collapse_warnings,
)
from prunelight.evaluation.report.record import Cost, RunRecord, Stage
from prunelight.evaluation.report.report import write_pictures, write_texts
from prunelight.evaluation.stages import Beside, measure_stage, new_record
from prunelight.models.engines import loads_in, misreadings
from prunelight.models.families.layers import decoder_layers
from prunelight.models.placement import move_if_it_fits, to_device
from prunelight.models.sizes import is_quantized, parameter_count, stored_bytes
from prunelight.planning.fingerprints import describe_windows, model_fingerprint, without_folders
from prunelight.run.run_state import DENSE_PREDICTIONS, Run
from prunelight.runtime.measuring import Measurement
from prunelight.runtime.origin import command_line, date_now, machine_facts, without_paths
from prunelight.runtime.processes import ProcessGroup
from prunelight.runtime.random_state import random_state_kept

log = logging.getLogger(__name__)


def measure_run_stage(
    run: Run,
    name: str,
    model: PreTrainedModel,
    windows: Windows | None = None,
    *,
    earlier: Sequence[Stage] = (),
) -> Stage:
    """Measure one state of a run's model, its speed in turn with the dense model's; examine it.

    Args:
        run: that the model belongs to.
        name: of the state, such as "pruned".
        model: in that state.
        windows: held-out windows of this process, where all processes measure together; None
            takes all of them.
        earlier: stages of this run; the first is the dense model. A model of the shape of one of
            them is as fast, and its speed is not measured again.
    """
    windows = held_out_windows(run) if windows is None else windows
    beside = Beside(earlier[0], run.dense) if earlier and run.dense else None
    tokenizer = None if run.latency is None else run.checked_tokenizer()
    timed = next((stage for stage in earlier if _same_shape(stage, model)), None)
    run.phases.lap()  # what serving costs resets the peak of memory
    stage = measure_stage(name, model, windows, run.latency, tokenizer, beside=beside, timed=timed)
    return examine_stage(run, stage, model, earlier, group_of(windows))


def examiners_of(run: Run) -> list[Examiner]:
    """Return what examines each stage of a run: its own examiners, and callbacks of its Trainer."""
    return [*_own_examiners(run), *added_examiners(run)]


def added_examiners(run: Run) -> list[Examiner]:
    """Return the callbacks of a run's Trainer that examine each stage."""
    callbacks: list[Any] = run.place.trainer.callbacks  # type: ignore[attr-defined]
    return examiners_among(callbacks)


def _own_examiners(run: Run) -> list[Examiner]:
    texts = _texts_examiner(run)
    if not run.probes:
        return texts
    samples = SamplesExaminer()
    directory = partial(Path, run.place.root, DENSE_PREDICTIONS)
    divergence = DenseDivergence(directory, partial(held_out_windows, run))
    return [*texts, samples, ProbesExaminer(samples), divergence]


def _texts_examiner(run: Run) -> list[Examiner]:
    """Return what measures the held-out texts behind the first; nothing where there is one."""
    if not further_names(run):
        return []
    return [TextsExaminer(partial(further_windows, run), partial(_protocols, run))]


def further_names(run: Run) -> tuple[str, ...]:
    """Return the names of the held-out texts behind the first."""
    place = run.place
    has_text = place.gives("validation_windows") or place.gives("val_dataloader")
    return further_names_of(place.data) if has_text else ()


def further_windows(run: Run) -> dict[str, Windows]:
    """Return the windows of each held-out text behind the first, by its name."""
    return further_windows_of(run.place.data, run.place.limit_val_batches)


def _protocols(run: Run) -> dict[str, str]:
    told: dict[str, str] = getattr(run.place.data, "validation_protocols", dict)()
    return told


def examine_stage(
    run: Run,
    stage: Stage,
    model: PreTrainedModel,
    earlier: Sequence[Stage],
    group: ProcessGroup,
    only: Collection[str] | None = None,
) -> Stage:
    """Return a stage with the answers of the examiners of a run; each is a phase of its own.

    Args:
        run: that the model belongs to.
        stage: what is measured of the model already.
        model: in the state of the stage.
        earlier: stages of this run; the first is the dense model.
        group: the processes that measure together.
        only: names of the examiners to ask; None asks all.
    """
    examined = dict(stage.examined)
    for examiner in examiners_of(run):
        name = examiner.examines
        if only is not None and name not in only:
            continue
        with run.phases.phase(f"examine {stage.name}: {name}"), random_state_kept():
            examined[name] = examiner.examine(model, run.checked_tokenizer(), earlier, group)
    return replace(stage, examined=examined)


def _same_shape(stage: Stage, model: PreTrainedModel) -> bool:
    """Whether a model has the shape of a stage's: zeros and trained values make none faster."""
    if is_quantized(model) or stage.name not in ("dense", "pruned"):
        return False
    shape = (len(decoder_layers(model)), parameter_count(model))
    return shape == (stage.num_layers, stage.parameters)


def held_out_windows(run: Run) -> Windows:
    """Return the held-out windows on which dense, pruned and recovered model are compared."""
    return validation_windows_of(run.place.data, run.place.limit_val_batches)


def can_measure(run: Run) -> bool:
    """Whether the data of a run gives held-out windows."""
    place = run.place
    if place.gives("validation_windows"):
        return True
    limit = place.limit_val_batches
    return place.gives("val_dataloader") and has_validation_batches(place.data, limit)


def describe_evaluation(run: Run) -> dict[str, Any]:
    """Return facts about the held-out windows, and the settings of what examines the stages."""
    data = run.place.data
    source = getattr(data, "sources", {}).get("validation", type(data).__name__)
    first: dict[str, Any] = {}
    if isinstance(source, dict):
        name, source = next(iter(source.items()))
        first = {"first_text": name, "protocol": _protocols(run)[name]}
    windows = describe_windows(*split_windows(held_out_windows(run)))
    timing = {} if run.latency is None else {"latency": asdict(run.latency)}
    examined = {each.examines: each.describe_examination() for each in examiners_of(run)}
    settings = {"examined": json.loads(json.dumps(examined))} if examined else {}
    return {"source": without_folders(str(source)), **first, **windows, **timing, **settings}


def warn_of_collapse(record: RunRecord) -> None:
    """Warn, now and in the record, of what perplexity hides of its last stage."""
    for text in collapse_warnings(record.stages):
        log.warning(text)
        record.warnings.append(text)


def measures_the_same(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two evaluations measure text and speed alike, whatever else they examine."""
    return all(then.get(key) == now.get(key) for key in ("fingerprint", "latency"))


def changed_examinations(then: Mapping[str, Any], now: Mapping[str, Any]) -> set[str]:
    """Return which examiners of an evaluation gave no answer, or had other settings, then."""
    before, after = then.get("examined", {}), now.get("examined", {})
    return {name for name, settings in after.items() if before.get(name) != settings}


def start_record(run: Run, model: PreTrainedModel) -> RunRecord:
    """Return the record of a run that recovers a model as it is, with the model measured."""
    described = describe_evaluation(run)
    record = new_record(run.name, model, model_fingerprint(model), described)
    model = move_if_it_fits(model, run.place.device)
    with run.phases.phase("evaluate dense"):
        record.stages.append(measure_run_stage(run, "dense", model))
    record.evaluation = describe_evaluation(run)  # files of the dense model are there now
    return record


def add_quantized(run: Run, model: PreTrainedModel) -> None:
    """Add the base in 4 or 8 bits, moved to the run's device, to the record if there is one.

    Parameters and zeros are those of the base in full precision: packed weights hide both.
    """
    record = run.record
    if record is None or any(stage.name == "quantized" for stage in record.stages):
        return
    full, model = record.stages[-1], to_device(model, run.place.device)
    with run.phases.phase("evaluate quantized"):
        stage = measure_run_stage(run, "quantized", model, earlier=record.stages)
    same = {n: getattr(full, n) for n in ("parameters", "sparsity", "linear_sparsity")}
    record.stages.append(replace(stage, size_bytes=stored_bytes(model), **same))
    warn_of_collapse(record)


def add_engines(record: RunRecord, dense: PretrainedConfig, pruned: PretrainedConfig) -> None:
    """Add which programs read the pruned model; warn of those that read it wrong by the pruning."""
    record.loads_in = loads_in(pruned)
    before = misreadings(dense)
    for engine, reason in misreadings(pruned).items():
        if engine not in before:
            text = f"{engine} {reason}"
            log.warning(text)
            record.warnings.append(text)


TRAINING = "recover"  # the phase that earlier starts of a run share


def training_cost(run: Run) -> Measurement:
    """Return what the training took up to now, over all starts."""
    run.phases.lap()
    row, earlier = run.phases.rows.get(TRAINING, Measurement()), run.earlier_training
    return Measurement(row.seconds + earlier.seconds, max(row.peak_bytes, earlier.peak_bytes))


def note_costs(run: Run, record: RunRecord, without: Collection[str] = ()) -> None:
    """Put into the record what the phases of this start took, beside what it reuses.

    Args:
        run: whose phases are told.
        record: of the run.
        without: names of phases to leave out.
    """
    costs = [cost for cost in record.costs if cost.reused]
    run.phases.lap()
    if run.earlier_training.seconds:  # nothing may be left of it in this start
        run.phases.rows.setdefault(TRAINING, Measurement())
    for name, phase in run.phases.rows.items():
        if name in without:
            continue
        earlier = run.earlier_training.seconds if name == TRAINING else 0.0
        total = training_cost(run) if name == TRAINING else phase
        forwards = total.seconds / record.forward_seconds
        costs.append(Cost(name, total.seconds, forwards, total.peak_bytes, earlier_seconds=earlier))
    record.costs = costs


def note_origin(run: Run, record: RunRecord) -> None:
    """Put into the record when, by which command, where and from which data it was made."""
    sources = getattr(run.place.data, "sources", {})
    record.date, record.command = date_now(), command_line(sys.argv)
    record.machine, record.seed = machine_facts(), run.seed
    record.data = {role: without_paths(str(source)) for role, source in sources.items()}


def report(run: Run, record: RunRecord) -> list[Path]:
    """Write the report, whose costs include its own; return its files."""
    note_origin(run, record)
    with run.phases.phase("write the report"):
        note_costs(run, record)
        write_pictures(run.place.root, record)
    note_costs(run, record)
    files = write_texts(run.place.root, record)
    run.phases.stop()
    return files
