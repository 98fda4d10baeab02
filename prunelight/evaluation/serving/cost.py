"""What serving a model costs beside the dense one, as JSON for reports: measured against ideal.

The ideal factor of prefill is the inverse ratio of multiply-adds, that of decoding the inverse
ratio of bytes that memory delivers for a token: weights and cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, astuple, replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunelight.evaluation.report.plan_facts import Json
from prunelight.evaluation.report.record import Stage
from prunelight.evaluation.serving.measured import (
    MeasuredCost,
    ServingProtocol,
    TimedBatch,
    check_lengths,
    compare_batches,
    measure_cost,
)
from prunelight.evaluation.serving.shape import ShapeCost, shape_cost
from prunelight.evaluation.serving.verdicts import hardware, verdicts, zeros_pattern
from prunelight.evaluation.speed import Architecture
from prunelight.models.families.layers import decoder_layers
from prunelight.models.placement import compute_device
from prunelight.models.sizes import is_quantized
from prunelight.runtime.processes import ProcessGroup

_ROUNDS_ALONE = 5  # of a model that is compared with no other

RATES = ("prefill_tokens_per_second", "decode_tokens_per_second")


def serving_cost(
    model: PreTrainedModel,
    reference: PreTrainedModel | None = None,
    *,
    protocol: ServingProtocol = ServingProtocol(),  # noqa: B008 (frozen)
) -> Json:
    """Return what serving a model costs on this machine, beside a reference, timed in turn.

    Returns:
        {"serving": of the model, "reference_serving": of the reference, where there is one}. Each
        holds "shape" (`ShapeCost`), "batches" (batch size -> rates, seconds and memory; each figure
        with a spread is [median, low, high]), "notes" and "verdicts". With a reference, "ratios"
        holds for each batch size and rate the factor "measured" [median, low, high] and "ideal".

    Raises:
        ValueError: if prompt and new tokens are longer than a model allows.
    """
    models = [model] if reference is None else [model, reference]
    check_lengths(models, protocol)
    costs = measure_cost(models, protocol)
    length = costs[0].single.prompt_tokens
    jsons = [
        {**_facts(one, shape_cost(one, prompt_tokens=length)), **_timed(cost)}
        for one, cost in zip(models, costs, strict=True)
    ]
    if reference is None:
        return {"serving": jsons[0] | {"verdicts": verdicts(jsons[0], None)}}
    own, other = jsons
    own["ratios"] = _ratios(costs[0], costs[1], own["shape"], other["shape"])
    own["verdicts"], other["verdicts"] = verdicts(own, other), verdicts(other, None)
    return {"serving": own, "reference_serving": other}


class ServingExaminer:
    """Measures the cost of serving each stage of a run, as `stage_cost` does.

    Args:
        dense: what the dense model was built from; None measures each stage alone.
        protocol: how it is timed; a brief one, as all stages of a run are timed.

    Attributes:
        examines: the name of the answer in a stage.
    """

    examines = "serving"

    def __init__(
        self, dense: Architecture | None = None, protocol: ServingProtocol | None = None
    ) -> None:
        self.dense = dense
        self.protocol = protocol or BRIEFLY

    def check_examination(self, name: str, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Check nothing: lengths are clipped to what the model allows."""

    def describe_examination(self) -> Json:
        """Return how serving is timed."""
        return asdict(self.protocol)

    def examine(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        earlier: Sequence[Stage],
        group: ProcessGroup,
    ) -> Json:
        """Return what serving the model costs, measured on rank 0: "serving" of `serving_cost`."""
        measured: Json = group.run_on_rank_zero(partial(self._examine, model, earlier))
        return measured

    def _examine(self, model: PreTrainedModel, earlier: Sequence[Stage]) -> Json:
        place = compute_device(model)
        dense = self.dense.build(place) if earlier and self.dense is not None else None
        return stage_cost(model, dense, earlier, self.protocol)


def stage_cost(
    model: PreTrainedModel,
    dense: PreTrainedModel | None,
    earlier: Sequence[Stage],
    protocol: ServingProtocol | None = None,
) -> Json:
    """Return what serving a stage of a run costs: "serving" of `serving_cost`.

    Beside a dense model, figures are those of the dense stage times the factor: the clock of this
    moment, which is not that of the dense stage, cancels. A model of the shape of an earlier stage
    is as fast, and is not timed again.

    Args:
        model: in the state that is measured.
        dense: a model that is as fast as the dense one; None times the model alone.
        earlier: stages measured before; the first is the dense model.
        protocol: how it is timed; None for a brief one.
    """
    protocol = BRIEFLY if protocol is None else protocol
    known = [stage.examined["serving"] for stage in earlier if "serving" in stage.examined]
    own = _facts(model, shape_cost(model))
    first = known[0] if known else None
    same = next((other for other in known if _same_shape(own, other)), None)
    if same is not None:
        own |= {name: same[name] for name in ("batches", "ratios", "notes") if name in same}
    elif dense is None:
        rounds = min(protocol.num_rounds, _ROUNDS_ALONE)
        own |= _timed(measure_cost([model], replace(protocol, num_rounds=rounds))[0])
    else:
        cost, other = measure_cost([model, dense], protocol)
        first = _facts(dense, shape_cost(dense)) if first is None else first
        own |= _timed(cost)
        own["ratios"] = _ratios(cost, other, own["shape"], first["shape"])
        _undo_drift(own, first)
    return own | {"verdicts": verdicts(own, first)}


# As all stages of a run are timed: as many prompt tokens at batch 8 as at batch 1.
BRIEFLY = ServingProtocol(new_tokens=24, batch_prompt_tokens=32, num_batch_rounds=3)


def stage_speeds(serving: Json) -> dict[str, Any]:
    """Return the fields of a `Stage` that tell its speed at batch 1, of a serving cost."""
    single = serving["batches"]["1"]
    ratios = serving.get("ratios", {}).get("1", {})
    return {
        **{rate: single[rate][0] for rate in RATES},
        "factors": {rate: ratios[rate]["measured"] for rate in RATES if rate in ratios},
    }


def _facts(model: PreTrainedModel, shape: ShapeCost) -> Json:
    """Return what is known of a model without a clock."""
    try:
        num_layers = len(decoder_layers(model))
    except TypeError:
        num_layers = None
    return {
        "hardware": hardware(compute_device(model)),
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "packed": is_quantized(model),
        "num_layers": num_layers,
        "zeros_pattern": zeros_pattern(model),
        "shape": asdict(shape)
        | {"prefill_multiply_adds_per_token": shape.prefill_multiply_adds_per_token},
    }


def _same_shape(own: Json, other: Json) -> bool:
    """Whether two models are as fast: zeros and trained values make none faster."""
    values = ("nonzeros",)
    shapes = [{n: x for n, x in each["shape"].items() if n not in values} for each in (own, other)]
    return shapes[0] == shapes[1] and not own["packed"] and own["dtype"] == other["dtype"]


def _timed(cost: MeasuredCost) -> Json:
    return {
        "batches": {str(batch.batch_size): _batch(batch) for batch in cost.batches},
        "notes": [*cost.notes],
    }


def _batch(batch: TimedBatch) -> Json:
    figures = {rate: [*astuple(getattr(batch, rate))] for rate in RATES}
    return {
        "prompt_tokens": batch.prompt_tokens,
        "new_tokens": batch.new_tokens,
        "num_rounds": len(batch.rounds),
        "time_to_first_token": [*astuple(batch.time_to_first_token)],
        **figures,
        "working_bytes": batch.working_bytes,
    }


def _ratios(own: MeasuredCost, other: MeasuredCost, shape: Json, other_shape: Json) -> Json:
    """Return, for each batch size and rate, its factor against another model, and the ideal."""
    return {
        str(batch.batch_size): _factors(batch, beside, shape, other_shape)
        for batch, beside in zip(own.batches, other.batches, strict=True)
    }


def _factors(own: TimedBatch, other: TimedBatch, shape: Json, other_shape: Json) -> Json:
    prefill, decode = compare_batches(own, other)
    ideal = other_shape["prefill_multiply_adds"] / shape["prefill_multiply_adds"]
    bytes_read, other_bytes = (_decode_bytes(each, own) for each in (shape, other_shape))
    return {
        RATES[0]: {"measured": [*astuple(prefill)], "ideal": ideal},
        RATES[1]: {"measured": [*astuple(decode)], "ideal": other_bytes / bytes_read},
    }


def _decode_bytes(shape: Json, batch: TimedBatch) -> float:
    """Return the bytes of weights and cache that a token of a batch reads, in the mean step."""
    names = ShapeCost.__dataclass_fields__
    cost = ShapeCost(**{name: shape[name] for name in names})
    tokens = batch.prompt_tokens + batch.new_tokens / 2
    return cost.decode_bytes_per_token(batch.batch_size, tokens)


def _undo_drift(own: Json, first: Json) -> None:
    """Give rates by the clock of the dense stage: its rate times the factor, in place."""
    for size, ratios in own["ratios"].items():
        batch, dense = own["batches"][size], first.get("batches", {}).get(size)
        if dense is None:
            continue
        for rate in RATES:
            batch[rate] = [dense[rate][0] * factor for factor in ratios[rate]["measured"]]
        median, low, high = ratios[RATES[0]]["measured"]
        seconds = dense["time_to_first_token"][0]
        batch["time_to_first_token"] = [seconds / factor for factor in (median, high, low)]
