"""What a run measures of its model for the report, always on the same held-out windows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from transformers import PreTrainedModel

from prunelight.calibration.windows import Windows, split_windows
from prunelight.evaluation.report.record import Cost, RunRecord, Stage
from prunelight.evaluation.speed import measure_latency
from prunelight.evaluation.stages import measure_stage, new_record
from prunelight.models.placement import move_if_it_fits, to_device
from prunelight.models.sizes import stored_bytes
from prunelight.planning.fingerprints import describe_windows, model_fingerprint
from prunelight.runtime.measuring import measuring


def add_quantized(
    record: RunRecord | None,
    measure: Callable[[PreTrainedModel], Stage],
    model: PreTrainedModel,
    *,
    device: torch.device,
) -> None:
    """Add the base in 4 or 8 bits, moved to a device, to the record of a run if there is one.

    Parameters and zeros are told of the base in full precision: packed weights hide both.
    """
    if record is None or any(stage.name == "quantized" for stage in record.stages):
        return
    full, model = record.stages[-1], to_device(model, device)
    with measuring(model.device) as phase:
        stage = measure(model)
    same = {n: getattr(full, n) for n in ("parameters", "sparsity", "linear_sparsity")}
    record.stages.append(replace(stage, size_bytes=stored_bytes(model), **same))
    forwards = phase.seconds / record.forward_seconds
    record.costs.append(Cost("evaluate quantized", phase.seconds, forwards, phase.peak_bytes))


def measure_run_stage(
    module: Any, name: str, model: PreTrainedModel, windows: Windows | None = None
) -> Stage:
    """Measure one state of a run's model.

    Args:
        module: the RecoveryModule.
        name: of the state, such as "pruned".
        model: in that state.
        windows: a share of the held-out windows, for ranks that measure together; None: all.
    """
    timing = None
    if module.latency is not None:
        tokenizer = module.checked_tokenizer()
        timing = partial(measure_latency, tokenizer=tokenizer, protocol=module.latency)
    windows = evaluation_windows(module.trainer) if windows is None else windows
    return measure_stage(name, model, windows, timing)


def evaluation_windows(trainer: Trainer) -> Windows:
    """Return the held-out windows on which dense, pruned and recovered model are compared."""
    return trainer.datamodule.validation_windows()  # type: ignore[attr-defined]


def describe_evaluation(module: Any) -> dict[str, Any]:
    """Return facts about the evaluation windows: source, numbers and fingerprint."""
    data: Any = getattr(module.trainer, "datamodule", None)
    source = getattr(data, "sources", {}).get("validation", type(data).__name__)
    windows = evaluation_windows(module.trainer)
    timing = {} if module.latency is None else {"latency": asdict(module.latency)}
    return {"source": str(source), **describe_windows(*split_windows(windows)), **timing}


def start_record(module: Any, model: PreTrainedModel) -> RunRecord:
    """Return the record of a run that recovers a model as it is, with what that is."""
    described = describe_evaluation(module)
    record = new_record(module.name, model, model_fingerprint(model), described)
    model = move_if_it_fits(model, module.trainer.strategy.root_device)
    record.stages.append(measure_run_stage(module, "dense", model))
    return record
