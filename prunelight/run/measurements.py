"""What a run measures of its model for the report, always on the same held-out windows."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from prunelight.calibration.data_windows import has_validation_batches, validation_windows_of
from prunelight.calibration.windows import Windows, split_windows
from prunelight.evaluation.report.record import Cost, RunRecord, Stage
from prunelight.evaluation.speed import measure_latency
from prunelight.evaluation.stages import measure_stage, new_record
from prunelight.models.engines import loads_in, misreadings
from prunelight.models.placement import move_if_it_fits, to_device
from prunelight.models.sizes import stored_bytes
from prunelight.planning.fingerprints import describe_windows, model_fingerprint
from prunelight.run.run_state import Run
from prunelight.runtime.local_paths import without_folders
from prunelight.runtime.measuring import Measurement, measuring

log = logging.getLogger(__name__)


def measure_run_stage(
    run: Run, name: str, model: PreTrainedModel, windows: Windows | None = None
) -> Stage:
    """Measure one state of a run's model.

    Args:
        run: that the model belongs to.
        name: of the state, such as "pruned".
        model: in that state.
        windows: held-out windows of this process, where all processes measure together; None
            takes all of them.
    """
    timing = None
    if run.latency is not None:
        tokenizer = run.checked_tokenizer()
        timing = partial(measure_latency, tokenizer=tokenizer, protocol=run.latency)
    windows = held_out_windows(run) if windows is None else windows
    return measure_stage(name, model, windows, timing)


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
    """Return facts about the held-out windows: source, numbers and fingerprint."""
    data = run.place.data
    source = getattr(data, "sources", {}).get("validation", type(data).__name__)
    windows = describe_windows(*split_windows(held_out_windows(run)))
    timing = {} if run.latency is None else {"latency": asdict(run.latency)}
    return {"source": without_folders(str(source)), **windows, **timing}


def start_record(run: Run, model: PreTrainedModel) -> RunRecord:
    """Return the record of a run that recovers a model as it is, with the model measured."""
    described = describe_evaluation(run)
    record = new_record(run.name, model, model_fingerprint(model), described)
    model = move_if_it_fits(model, run.place.device)
    record.stages.append(measure_run_stage(run, "dense", model))
    return record


def add_quantized(run: Run, model: PreTrainedModel) -> None:
    """Add the base in 4 or 8 bits, moved to the run's device, to the record if there is one.

    Parameters and zeros are those of the base in full precision: packed weights hide both.
    """
    record = run.record
    if record is None or any(stage.name == "quantized" for stage in record.stages):
        return
    full, model = record.stages[-1], to_device(model, run.place.device)
    with measuring(model.device) as phase:
        stage = measure_run_stage(run, "quantized", model)
    same = {n: getattr(full, n) for n in ("parameters", "sparsity", "linear_sparsity")}
    record.stages.append(replace(stage, size_bytes=stored_bytes(model), **same))
    add_cost(record, "evaluate quantized", phase)


def add_engines(record: RunRecord, dense: PretrainedConfig, pruned: PretrainedConfig) -> None:
    """Add which programs read the pruned model; warn of those that read it wrong by the pruning."""
    record.loads_in = loads_in(pruned)
    before = misreadings(dense)
    for engine, reason in misreadings(pruned).items():
        if engine not in before:
            text = f"{engine} {reason}"
            log.warning(text)
            record.warnings.append(text)


def add_cost(record: RunRecord, name: str, phase: Measurement) -> None:
    """Add what a phase cost to the record of a run."""
    forwards = phase.seconds / record.forward_seconds
    record.costs.append(Cost(name, phase.seconds, forwards, phase.peak_bytes))
