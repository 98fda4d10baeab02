"""Measure one state of a model for the report, and start the record of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from prunelight.calibration.shared_windows import group_of
from prunelight.calibration.windows import Windows
from prunelight.evaluation.perplexity import evaluate
from prunelight.evaluation.report.record import RunRecord, Stage
from prunelight.evaluation.speed import Latency, measure_speed
from prunelight.models.families.layers import decoder_layers
from prunelight.models.sizes import linear_sparsity, parameter_bytes, parameter_count, zero_share
from prunelight.planning.fingerprints import library_versions
from prunelight.runtime.devices import device_name
from prunelight.runtime.local_paths import without_folders


def measure_stage(
    name: str,
    model: PreTrainedModel,
    windows: Windows,
    latency_of: Callable[[PreTrainedModel], Latency] | None = None,
) -> Stage:
    """Measure one state of a model for the report: sizes, zeros, quality on windows, and speed.

    Processes that share the windows evaluate them together. Only rank 0 measures speed.

    Args:
        name: of the stage in the report.
        model: the state to measure.
        windows: held-out windows.
        latency_of: measures the latency of generation; None leaves the latency out.
    """
    group = group_of(windows)
    # Latency comes first: it fails early if its text is too long for the model.
    latency = None if latency_of is None else group.run_on_rank_zero(partial(latency_of, model))
    quality, speed = evaluate(model, windows), group.run_on_rank_zero(partial(measure_speed, model))
    return Stage(
        name=name,
        num_layers=len(decoder_layers(model)),
        parameters=parameter_count(model),
        size_bytes=parameter_bytes(model),
        perplexity=quality.perplexity,
        accuracy=quality.accuracy,
        prefill_tokens_per_second=speed.prefill,
        decode_tokens_per_second=speed.decode,
        sparsity=zero_share(model.parameters()),
        linear_sparsity=linear_sparsity(model),
        **({} if latency is None else asdict(latency)),
    )


def new_record(
    name: str, model: PreTrainedModel, fingerprint: str, evaluation: dict[str, Any]
) -> RunRecord:
    """Start the record of a run from the dense model, before anything is measured."""
    return RunRecord(
        model=without_folders(name),
        device=device_name(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        fingerprint=fingerprint,
        checkpoint_bytes=parameter_bytes(model),
        layer_bytes=max(parameter_bytes(layer) for layer in decoder_layers(model)),
        evaluation=evaluation,
        versions=library_versions(),
    )
