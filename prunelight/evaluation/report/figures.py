"""The figures of a run as every form of its report shows them: rows of texts, no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from prunelight.evaluation.report.plan_facts import Json, PlanFacts, percent
from prunelight.evaluation.report.record import RunRecord, Stage
from prunelight.planning.steps import Sparsify


def count(value: float) -> str:
    """Return a number with its thousands as a letter: 134.5M."""
    power = min(int(math.log10(max(value, 1)) // 3), 4)
    return f"{value / 1000**power:.1f}{' KMBT'[power]}" if power else str(value)


def decimal(value: float) -> str:
    """Return a number with four digits."""
    return f"{value:,.0f}" if 1000 <= value < 1e6 else f"{value:.4g}"


# Label, field of Stage, how a number is shown. Shares of zeros are shown if a plan sparsifies.
_FIGURES: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("layers", "num_layers", str),
    ("parameters", "parameters", count),
    ("size (MB)", "size_bytes", lambda value: f"{value / 1e6:,.1f}"),
    ("perplexity", "perplexity", decimal),
    ("next-token accuracy", "accuracy", "{:.4f}".format),
    ("prefill tokens/s", "prefill_tokens_per_second", decimal),
    ("decode tokens/s", "decode_tokens_per_second", decimal),
    ("latency (s)", "latency_seconds", "{:.3f}".format),
    ("throughput (tokens/s)", "throughput", decimal),
    ("zeros in decoder linears", "linear_sparsity", percent),
    ("zeros in all parameters", "sparsity", percent),
)

_SPEEDS = ("per_second", "latency_seconds", "throughput")


def stage_rows(record: RunRecord) -> list[list[str]]:
    """Return one row a figure, one cell a stage, with the change against the dense stage."""
    dense, rows, with_zeros = record.stages[0], [], sparsified(record)
    for label, name, show in _FIGURES:
        if show is percent and not with_zeros:
            continue
        if all(getattr(stage, name) is None for stage in record.stages):
            continue
        row = [label]
        for stage in record.stages:
            value, base = getattr(stage, name), getattr(dense, name)
            if value is None:
                row.append("")
                continue
            speed = name.endswith(_SPEEDS)
            if speed and _is_noise(stage, name):
                row.append("no difference beyond noise")
                continue
            told = _factor(stage, name) if speed else change(value, base)
            spread = stage.latency_deviation if name == "latency_seconds" else None
            shown = show(value) + (f" ± {spread:.3f}" if spread is not None else "")
            row.append(shown + ("" if stage is dense or show is percent else told))
        if name == "perplexity":
            row[0] += f" {first}" if (first := record.evaluation.get("first_text")) else ""
        rows.append(row)
        if name == "accuracy":
            rows += _further_rows(record.stages)
    return rows


def _further_rows(stages: Sequence[Stage]) -> list[list[str]]:
    """Return the perplexity on each held-out text behind the first, one row a text."""
    told = [further_texts(stage) for stage in stages]
    rows = []
    for name in dict.fromkeys(name for texts in told for name in texts):
        values = [texts.get(name, {}).get("perplexity") for texts in told]
        cells = ["" if x is None else decimal(x) + change(x, values[0]) for x in values]
        cells[0] = "" if values[0] is None else decimal(values[0])
        rows.append([f"perplexity {name}", *cells])
    return rows


def further_texts(stage: Stage) -> dict[str, Json]:
    """Return what was found of a stage on each held-out text behind the first."""
    found = stage.examined.get("texts")
    return found if isinstance(found, dict) else {}


def _factor(stage: Stage, name: str) -> str:
    """Return how much faster a stage is than the dense one, if both were timed in turn."""
    if name not in stage.factors:
        return ""
    median, low, high = stage.factors[name]
    return f" (\u00d7{median:.3g}, {low:.3g} to {high:.3g})"


def _is_noise(stage: Stage, name: str) -> bool:
    """Whether the factor of a speed may as well be 1: its rounds lie on both sides of it."""
    _, low, high = stage.factors.get(name, (math.nan, math.nan, math.nan))
    return low <= 1 <= high


def change(value: float, base: float | None) -> str:
    """Return how far a value is from another, in brackets; "" if that cannot be said."""
    if base is None or not (math.isfinite(value) and math.isfinite(base) and base > 0):
        return ""
    if value > 10 * base:
        return f" (\u00d7{value / base:.3g})"
    return f" ({round(100 * (value / base - 1), 1) + 0.0:+.1f} %)"  # + 0.0: never "-0.0 %"


def cost_rows(record: RunRecord, least: float = 0.0) -> list[list[str]]:
    """Return one row a phase, and one for all phases of this start.

    Args:
        record: of the run.
        least: share of the time of this start that a phase must have taken to be told.
    """
    ours = [cost for cost in record.costs if not cost.reused]
    seconds = math.fsum(cost.seconds - cost.earlier_seconds for cost in ours)
    rows = []
    for cost in record.costs:
        name = f"{cost.name} (reused)" if cost.reused else cost.name
        if cost.earlier_seconds:
            name += f" ({duration(cost.earlier_seconds)} of it in earlier starts)"
        if cost.reused or cost.seconds >= least * seconds:
            rows.append(_cost_row(record, name, cost.seconds, cost.peak_bytes))
    if len(ours) > 1:
        peak = max(cost.peak_bytes for cost in ours)
        rows.append(_cost_row(record, "this start, all in all", seconds, peak))
    return rows


def _cost_row(record: RunRecord, name: str, seconds: float, peak_bytes: int) -> list[str]:
    unit = record.forward_seconds
    forwards = f"{seconds / unit:.3g}" if math.isfinite(unit) else "?"
    peaks = [f"{peak_bytes / x:.3g}" for x in (record.checkpoint_bytes, record.layer_bytes)]
    return [name, duration(seconds), forwards, f"{peak_bytes / 1e9:.3g} GB", *peaks]


def duration(seconds: float) -> str:
    """Return a time with its unit."""
    return f"{seconds:.3g} s" if seconds < 60 else f"{seconds / 60:.3g} min"


def sparsified(record: RunRecord) -> bool:
    """Return whether a plan of the run makes zeros."""
    return any(plan.steps_of(Sparsify) for plan in plans_of(record))


def methods_of(record: RunRecord) -> str:
    """Return the names of the methods of a run, in their order."""
    return " + ".join(plan["method"] for plan in record.plans) or "No pruning"


def finding(name: str, value: Any) -> Any:
    """Return a finding as a report shows it."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {finding(key, x)}" for key, x in value.items())
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "; ".join(finding(name, row) for row in value)
    if isinstance(value, list) and any(isinstance(x, float) for x in value):
        return ", ".join(str(finding(name, x)) for x in value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return count(value) if name.startswith("parameters") else value


def plans_of(record: RunRecord) -> list[PlanFacts]:
    """Return the plans of a run, in their order."""
    return [PlanFacts(plan) for plan in record.plans]


class Carried(NamedTuple):
    """A plan, and what its steps did."""

    plan: PlanFacts
    outcomes: list[Json]  # of each step; {} for one that has none

    @property
    def together(self) -> Json:
        """Return the outcomes of the last step of each kind; no two kinds share a name."""
        last = {x.kind: outcome for x, outcome in zip(self.plan.steps, self.outcomes, strict=True)}
        return {name: value for outcome in last.values() for name, value in outcome.items()}


def plans_carried_out(record: RunRecord) -> list[Carried]:
    """Return the plans of a run, each with what its steps did."""
    outcomes, carried = iter(record.outcomes), []
    for plan in plans_of(record):
        own: list[Json] = []
        for step in plan.steps:
            # Zeros that a schedule adds later have no outcome.
            later = plan.schedule and isinstance(step, Sparsify)
            own.append(next(outcomes, {}) if step.has_outcome and not later else {})
        carried.append(Carried(plan, own))
    return carried
