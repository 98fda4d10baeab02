"""What examiners found of the stages of a run, as rows of texts: tasks, divergence, serving.

`Stage.examined` holds plain JSON. What a stage lacks is left out: a record of an older version, or
of a run that measured less, has fewer rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from prunelight.evaluation.probes.results import COLLAPSED, PROBES
from prunelight.evaluation.report.figures import count, decimal, further_texts
from prunelight.evaluation.report.plan_facts import Json
from prunelight.evaluation.report.record import RunRecord, Stage

NOISE = 1.96  # standard errors within which two figures are a tie


class Grid(NamedTuple):
    """A table: names of its columns, and its rows."""

    head: list[str]
    rows: list[list[str]]


def part(stage: Stage, name: str) -> Json:
    """Return what an examiner found of a stage; {} if nothing."""
    found = stage.examined.get(name)
    return found if isinstance(found, dict) else {}


# --- held-out texts --------------------------------------------------------------------------


def text_grid(record: RunRecord) -> Grid | None:
    """Return perplexity and next-token accuracy on each text, and how its windows were made.

    None where a run measured one text only.
    """
    stages, told = record.stages, record.evaluation
    names = dict.fromkeys(name for stage in stages for name in further_texts(stage))
    if not names:
        return None
    first = [str(told.get("first_text", "first text"))]
    first += [f"{decimal(stage.perplexity)} ({stage.accuracy:.4f})" for stage in stages]
    rows = [[*first, str(told.get("protocol", ""))]]
    for name in names:
        found = [further_texts(stage).get(name, {}) for stage in stages]
        cells = [f"{decimal(x['perplexity'])} ({x['accuracy']:.4f})" if x else "" for x in found]
        rows.append([name, *cells, str(next(x for x in found if x).get("protocol", ""))])
    return Grid(["perplexity (next-token accuracy)", *(s.name for s in stages), "windows"], rows)


# --- tasks -----------------------------------------------------------------------------------


def tasks_of(stage: Stage) -> dict[str, Json]:
    """Return the results of a stage by task."""
    found = part(stage, "tasks")
    found = found.get("tasks", found)
    return {n: x for n, x in found.items() if isinstance(x, dict) and _number(x.get("value"))}


def task_names(stages: Sequence[Stage]) -> list[str]:
    """Return the tasks that any stage was asked, in their order."""
    return list(dict.fromkeys(name for stage in stages for name in tasks_of(stage)))


def flips_of(dense: Stage, stage: Stage, task: str) -> tuple[int, int, int] | None:
    """Return right -> wrong, wrong -> right and the number of questions; None if not known."""
    told = part(stage, "flips") or part(stage, "tasks").get("flips", {})
    if isinstance(told, dict) and isinstance(flips := told.get(task), dict):
        names = ("right_to_wrong", "wrong_to_right", "num_questions")
        return tuple(int(flips[name]) for name in names)  # type: ignore[return-value]
    one, other = (tasks_of(x).get(task, {}) for x in (dense, stage))
    before, after = one.get("outcomes") or "", other.get("outcomes") or ""
    same = one.get("fingerprint") == other.get("fingerprint") and len(before) == len(after)
    if stage is dense or not before or not same:
        return None
    pairs = [*zip(before, after, strict=True)]
    return pairs.count(("1", "0")), pairs.count(("0", "1")), len(pairs)


def is_tie(dense: Stage, stage: Stage, task: str) -> bool:
    """Return whether a stage may be as good as the dense one on a task, for all that was asked.

    With flips this is a sign test on the questions whose answer changed; without them the
    difference is compared with its standard error.
    """
    if (flips := flips_of(dense, stage, task)) is not None:
        lost, won, _ = flips
        return abs(lost - won) <= NOISE * math.sqrt(lost + won)
    one, other = (tasks_of(x)[task] for x in (dense, stage))
    error = math.hypot(one.get("stderr") or 0.0, other.get("stderr") or 0.0)
    return abs(one["value"] - other["value"]) <= NOISE * error


def task_grid(stages: Sequence[Stage]) -> Grid | None:
    """Return one row a task: accuracy with its standard error, and flips against the dense one."""
    names, dense = task_names(stages), stages[0]
    if not names:
        return None
    told = [stage for stage in stages if tasks_of(stage)]
    last = told[-1]
    compared = last is not dense and bool(tasks_of(dense))
    rows = []
    for name in names:
        results = [tasks_of(stage).get(name) for stage in told]
        first: Json = next(result for result in results if result)
        row = [f"{name} ({first.get('metric', '')}, {_shots(first)})"]
        row += [_with_error(result) for result in results]
        if compared:
            known = name in tasks_of(dense) and name in tasks_of(last)
            flips = flips_of(dense, last, name) if known else None
            row.append("" if flips is None else f"{flips[0]} / {flips[1]} of {flips[2]}")
            row.append(("tie" if is_tie(dense, last, name) else "differs") if known else "")
        rows.append(row)
    if len(names) > 1:
        means = [f"{mean_of_tasks(stage):.3f}" for stage in told]
        rows.append(["mean", *means, *(["", ""] if compared else [])])
    more = ["right→wrong / wrong→right", "beyond noise?"] if compared else []
    return Grid(["task", *(stage.name for stage in told), *more], rows)


def mean_of_tasks(stage: Stage) -> float:
    """Return the mean over the tasks of a stage; NaN if it was asked none."""
    values = [float(result["value"]) for result in tasks_of(stage).values()]
    return math.fsum(values) / len(values) if values else math.nan


def _shots(result: Json) -> str:
    shots, asked = result.get("num_fewshot", 0), result.get("num_questions", "?")
    return f"{shots}-shot, {asked} questions"


def _with_error(result: Json | None) -> str:
    if not result:
        return ""
    error = result.get("stderr")
    return f"{result['value']:.3f}" + (f" ± {error:.3f}" if _number(error) else "")


# --- divergence ------------------------------------------------------------------------------


def interval(value: Any, show: str = ".3g") -> str:
    """Return a figure with its 95 % interval, of an `Interval` as JSON."""
    if isinstance(value, dict):
        ends = [format(value[name], show) for name in ("value", "low", "high") if name in value]
        return ends[0] if len(ends) < 3 else f"{ends[0]} ({ends[1]} to {ends[2]})"
    return format(value, show) if _number(value) else ""


def middle(value: Any) -> float:
    """Return the figure of an `Interval` as JSON, or a plain number; NaN if it is neither."""
    value = value.get("value") if isinstance(value, dict) else value
    return float(value) if _number(value) else math.nan


def divergences(stages: Sequence[Stage]) -> dict[str, Json]:
    """Return how far the stages are from the dense model: name of a stage -> Divergence."""
    found = {stage.name: part(stage, "divergence") for stage in stages}
    return {name: told for name, told in found.items() if "kl" in told}


def divergence_grid(stages: Sequence[Stage]) -> Grid | None:
    """Return one row a figure of the divergence, one column a stage that has one."""
    told = divergences(stages)
    if not told:
        return None
    names = (
        ("mean KL to the dense model (nats)", "kl"),
        ("median KL", "kl_median"),
        ("99th percentile of KL", "kl_p99"),
        ("same most likely token", "same_top1"),
        ("mean change of the right token's probability", "right_token_change"),
        ("RMS of that change", "right_token_change_rms"),
        ("ln of the perplexity ratio", "ln_perplexity_ratio"),
        ("compared tokens", "tokens"),
    )
    rows = [
        [label, *(_shown(x, key) for x in told.values())]
        for label, key in names
        if any(key in x for x in told.values())
    ]
    return Grid(["", *told], rows)


def _shown(divergence: Json, key: str) -> str:
    value = divergence.get(key)
    return f"{value:,}" if key == "tokens" and _number(value) else interval(value)


# --- probes ----------------------------------------------------------------------------------


def probes_of(stage: Stage) -> dict[str, Json]:
    """Return what the collapse probes found of a stage: name of a probe -> its figures."""
    return {n: x for n, x in part(stage, "probes").items() if isinstance(x, dict) and "total" in x}


def probe_names(stages: Sequence[Stage]) -> list[str]:
    """Return the probes that any stage was asked, in their order."""
    return list(dict.fromkeys(name for stage in stages for name in probes_of(stage)))


def asks(name: str) -> str:
    """Return what a probe asks, in words."""
    return PROBES[name].asks if name in PROBES else name.replace("_", " ")


def collapsed(stage: Stage) -> list[str]:
    """Return the probes by which a stage collapsed."""
    return [name for name, one in probes_of(stage).items() if one.get("verdict") == COLLAPSED]


def probe_grid(stages: Sequence[Stage]) -> Grid | None:
    """Return one row a probe: the right answers of each stage, and the verdict on the last."""
    names, told = probe_names(stages), [stage for stage in stages if probes_of(stage)]
    if not names:
        return None
    rows = []
    for name in names:
        results = [probes_of(stage).get(name, {}) for stage in told]
        rows.append([asks(name), *map(_right, results), str(results[-1].get("verdict", ""))])
    return Grid(["the model ...", *(stage.name for stage in told), "verdict"], rows)


def _right(result: Json) -> str:
    if result.get("note"):
        return "not asked"
    return f"{result['right']} of {result['total']}" if result.get("total") else ""


# --- serving ---------------------------------------------------------------------------------

_RATES = {"prefill_tokens_per_second": "prefill", "decode_tokens_per_second": "decode"}


def serving_grid(stages: Sequence[Stage]) -> Grid | None:
    """Return one row a figure of what serving costs, one column a stage."""
    told = {stage.name: part(stage, "serving") for stage in stages if part(stage, "serving")}
    if not told:
        return None
    shapes = [served.get("shape") or {} for served in told.values()]
    rows = []
    for label, key, show in (
        ("parameters", "parameters", count),
        ("of them not zero", "nonzeros", count),
        ("weights on disk (MB)", "disk_bytes", lambda x: f"{x / 1e6:,.1f}"),
        ("multiply-adds of a prompt token", "prefill_multiply_adds_per_token", count),
        ("cache per token (KiB)", "cache_bytes_per_token", lambda x: f"{x / 1024:.1f}"),
        ("weights read per token (MB)", "weight_bytes_per_token", lambda x: f"{x / 1e6:,.1f}"),
    ):
        if any(_number(shape.get(key)) for shape in shapes):
            cells = [show(x[key]) if _number(x.get(key)) else "" for x in shapes]
            rows.append([label, *cells])
    sizes = dict.fromkeys(size for served in told.values() for size in served.get("batches", {}))
    for size in sizes:
        batches = [served.get("batches", {}).get(size, {}) for served in told.values()]
        for key, label in (
            ("time_to_first_token", "time to first token (s)"),
            ("prefill_tokens_per_second", "prefill tokens/s"),
            ("decode_tokens_per_second", "decode tokens/s"),
        ):
            if any(batch.get(key) for batch in batches):
                rows.append([f"batch {size}: {label}", *(_spread(x.get(key)) for x in batches)])
        if any(_number(batch.get("working_bytes")) for batch in batches):
            shown = [x.get("working_bytes") for x in batches]
            label = f"batch {size}: memory beside the weights (MB)"
            rows.append([label, *(f"{x / 1e6:,.1f}" if _number(x) else "" for x in shown)])
    return Grid(["", *told], rows)


class Ratio(NamedTuple):
    """How much faster than the dense model: measured in turn, and by the shape alone."""

    what: str
    median: float
    low: float
    high: float
    ideal: float


def ratios_of(stage: Stage) -> list[Ratio]:
    """Return the factors of a stage's speeds against the dense model's, beside the ideal."""
    found = []
    for size, rates in (part(stage, "serving").get("ratios") or {}).items():
        for rate, told in rates.items():
            measured = told.get("measured") or []
            if len(measured) == 3 and all(map(_number, measured)):
                what = f"{_RATES.get(rate, rate)}, batch {size}"
                median, low, high = map(float, measured)
                ideal = float(told.get("ideal") or math.nan)
                found.append(Ratio(what, median, low, high, ideal))
    return found


def speeds_of(stage: Stage) -> list[tuple[str, float, float, float]]:
    """Return what is faster than the dense model, and how much: name, median, low, high."""
    if ratios := ratios_of(stage):
        return [(x.what, x.median, x.low, x.high) for x in ratios]
    known = [(what, stage.factors[rate]) for rate, what in _RATES.items() if rate in stage.factors]
    return [(what, median, low, high) for what, (median, low, high) in known]


def verdicts_of(stage: Stage) -> list[str]:
    """Return the plain sentences on what serving a stage costs."""
    return [str(text) for text in part(stage, "serving").get("verdicts") or []]


def _spread(values: Any) -> str:
    if not isinstance(values, list) or not all(map(_number, values)) or not values:
        return ""
    return decimal(values[0]) + (f" ({values[1]:.3g} to {values[2]:.3g})" if values[2:] else "")


# --- samples ---------------------------------------------------------------------------------


def samples_beside(stages: Sequence[Stage]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return each prompt with what the stages go on with: (prompt, [(stage, text), ...])."""
    prompts: dict[str, list[tuple[str, str]]] = {}
    for stage in stages:
        found = stage.examined.get("samples")
        for sample in (found.get("samples", []) if isinstance(found, dict) else found) or []:
            if isinstance(sample, dict) and "prompt" in sample:
                rows = prompts.setdefault(str(sample["prompt"]), [])
                rows.append((stage.name, str(sample.get("text", ""))))
    return list(prompts.items())


def measured_names(stages: Iterable[Stage]) -> set[str]:
    """Return the names of all examiners that found something."""
    return {name for stage in stages for name, found in stage.examined.items() if found}


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
