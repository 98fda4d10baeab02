"""Measure one state of a model for the report, and start the record of a run."""

from __future__ import annotations

from dataclasses import asdict, astuple, dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunelight.calibration.shared_windows import group_of
from prunelight.calibration.windows import Windows
from prunelight.evaluation.perplexity import evaluate
from prunelight.evaluation.report.record import RunRecord, Stage
from prunelight.evaluation.serving.cost import stage_cost, stage_speeds
from prunelight.evaluation.serving.timing import Spread
from prunelight.evaluation.speed import (
    Architecture,
    LatencyProtocol,
    compare_latency,
    measure_latency,
)
from prunelight.models.families.layers import decoder_layers
from prunelight.models.placement import compute_device
from prunelight.models.sizes import linear_sparsity, parameter_bytes, parameter_count, zero_share
from prunelight.planning.fingerprints import library_versions, without_folders
from prunelight.runtime.devices import device_name

# Fields of a Stage that say how fast it is.
SPEEDS = (
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
    "latency_seconds",
    "latency_deviation",
    "throughput",
    "factors",
)


@dataclass(frozen=True)
class Beside:
    """The dense model, as what a later stage is compared with: its stage, and how to build it."""

    stage: Stage
    architecture: Architecture


def measure_stage(
    name: str,
    model: PreTrainedModel,
    windows: Windows,
    protocol: LatencyProtocol | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    beside: Beside | None = None,
    timed: Stage | None = None,
) -> Stage:
    """Measure one state of a model for the report: sizes, zeros, quality on windows, and speed.

    Processes that share the windows evaluate them together. Only rank 0 measures speed.

    Args:
        name: of the stage in the report.
        model: the state to measure.
        windows: held-out windows.
        protocol: by which the latency of generation is timed; None leaves it out.
        tokenizer: of the prompt of the protocol.
        beside: the dense model, to which speeds are compared in turn; None measures them alone.
        timed: an earlier stage of the same architecture, whose speeds are taken.
    """
    group = group_of(windows)
    timing = None if protocol is None else (tokenizer, protocol)
    speeds = group.run_on_rank_zero(partial(_speeds, model, beside, timed, timing))
    quality = evaluate(model, windows)
    return Stage(
        name=name,
        num_layers=len(decoder_layers(model)),
        parameters=parameter_count(model),
        size_bytes=parameter_bytes(model),
        perplexity=quality.perplexity,
        accuracy=quality.accuracy,
        sparsity=zero_share(model.parameters()),
        linear_sparsity=linear_sparsity(model),
        **speeds,
    )


def _speeds(
    model: PreTrainedModel,
    beside: Beside | None,
    timed: Stage | None,
    timing: tuple[Any, LatencyProtocol] | None,
) -> dict[str, Any]:
    """Return the fields of a stage that tell what serving it costs.

    Beside a dense model, the figures are those of the dense stage times the factor: the clock of
    this moment, which is not that of the dense stage, cancels.
    """
    if timed is not None:
        speeds = {name: getattr(timed, name) for name in SPEEDS}
        earlier = [timed] if beside is None else [beside.stage, timed]
        return speeds | {"examined": {"serving": stage_cost(model, None, earlier)}}
    dense = None if beside is None else beside.architecture.build(compute_device(model))
    # Latency comes first: it fails early if its text is too long for the model.
    latency = _latency(model, dense, beside, timing)
    serving = stage_cost(model, dense, [] if beside is None else [beside.stage])
    speeds = stage_speeds(serving)
    if beside is not None:
        for name, (median, _, _) in speeds["factors"].items():
            speeds[name] = getattr(beside.stage, name) * median
    factors = speeds["factors"] | latency.pop("factors", {})
    return {**speeds, **latency, "factors": factors, "examined": {"serving": serving}}


def _latency(
    model: PreTrainedModel,
    dense: PreTrainedModel | None,
    beside: Beside | None,
    timing: tuple[Any, LatencyProtocol] | None,
) -> dict[str, Any]:
    """Return the fields of a stage that tell its latency by a protocol; none without one."""
    if timing is None:
        return {}
    if beside is None or dense is None or beside.stage.latency_seconds is None:
        return asdict(measure_latency(model, *timing))
    latency, factor = compare_latency(model, dense, *timing)
    rate = Spread(1 / factor.median, 1 / factor.high, 1 / factor.low)
    drift = beside.stage.latency_seconds * factor.median / latency.latency_seconds
    return {
        "latency_seconds": latency.latency_seconds * drift,
        "latency_deviation": latency.latency_deviation * drift,
        "throughput": latency.throughput / drift,
        "factors": {"latency_seconds": [*astuple(factor)], "throughput": [*astuple(rate)]},
    }


def new_record(
    name: str, model: PreTrainedModel, fingerprint: str, evaluation: dict[str, Any]
) -> RunRecord:
    """Start the record of a run from the dense model, before anything is measured."""
    return RunRecord(
        model=without_folders(name),
        device=device_name(compute_device(model)),
        dtype=str(model.dtype).removeprefix("torch."),
        fingerprint=fingerprint,
        checkpoint_bytes=parameter_bytes(model),
        layer_bytes=max(parameter_bytes(layer) for layer in decoder_layers(model)),
        evaluation=evaluation,
        versions=library_versions(),
    )
