"""Turns the record of one run into report.json, report.md, pictures and a console table.

What is reported is what travels between machines: changes against the dense model, time in units
of F (one forward of the calibration set through the dense model), memory in units of the
checkpoint and of one decoder layer. Measuring is not done here (see evaluation.py), nor drawing
(plots.py): this module needs neither torch nor lightning and can render a report.json that another
machine wrote.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from prunelight.plots import (
    drawable,
    layer_table,
    nominal,
    percent,
    plot_layers,
    sparsify_facts,
    sparsify_steps,
)

FORMAT = 1


@dataclass(frozen=True)
class Stage:
    """One measured state of the model; accuracy is next-token accuracy in [0, 1].

    `sparsity` is the share of zeros among all parameters, `linear_sparsity` that among the weights
    of decoder layers that can be sparsified.
    """

    name: str  # "dense" | "pruned" | "recovered"; the others are compared with "dense"
    num_layers: int
    parameters: int
    size_bytes: int  # of the weights on disk
    perplexity: float
    accuracy: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    sparsity: float = 0.0
    linear_sparsity: float = 0.0


@dataclass(frozen=True)
class Cost:
    """What one phase of the run cost; peak memory is process RSS on CPU, allocated on CUDA."""

    name: str
    seconds: float
    forwards: float  # seconds in units of F
    peak_bytes: int
    reused: bool = False  # taken from an earlier run with the same fingerprint


@dataclass
class RunRecord:
    """All that a report says about one run.

    `plans` holds `Plan.to_dict()` of each callback, `outcomes` what `surgery.apply` told of each of
    their sparsify steps, in order.
    """

    model: str
    device: str
    dtype: str
    fingerprint: str  # of the pruned base
    plans: list[dict[str, Any]]
    stages: list[Stage]
    costs: list[Cost]
    checkpoint_bytes: int  # of the dense model
    layer_bytes: int  # of one dense decoder layer
    recovery: dict[str, Any]
    evaluation: dict[str, Any]
    verification: dict[str, str]  # directory -> how it was verified; the last one is the result
    versions: dict[str, str]
    warnings: list[str]
    forward_seconds: float = math.nan  # F on this device
    outcomes: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON data: NaN and infinities become "NaN", "Infinity" and "-Infinity".

        JSON has no such numbers and null would hide which it was; `float()` reads these strings.
        """
        text = json.dumps({"format": FORMAT, **asdict(self)}, default=str)
        return json.loads(text, parse_constant=str)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RunRecord:
        """The inverse of `to_dict`; raises ValueError for a record of another format."""
        if data.get("format") != FORMAT:
            raise ValueError(
                f"report format={data.get('format')!r} must be {FORMAT}; read it with the version "
                "of prunelight that wrote it"
            )
        text = re.sub(r'"(NaN|-?Infinity)"(?!:)', r"\1", json.dumps(data))
        values = {key: value for key, value in json.loads(text).items() if key != "format"}
        values["stages"] = [Stage(**stage) for stage in values["stages"]]
        values["costs"] = [Cost(**cost) for cost in values["costs"]]
        return cls(**values)


def summary_table(record: RunRecord) -> Table:
    """The before and after table for a console: one column a stage, costs in the caption."""
    costs = ["{}: {} F, peak {} checkpoints".format(*row) for row in _cost_rows(record)]
    table = Table(
        title=escape(f"{_methods(record)}: {record.model}"),
        caption=escape("\n".join(costs)),
        caption_justify="left",
    )
    for index, name in enumerate(["", *(stage.name for stage in record.stages)]):
        table.add_column(escape(name), justify="right" if index else "left")
    for row in _stage_rows(record):
        table.add_row(*map(escape, row))
    return table


def write_report(directory: Path, record: RunRecord) -> list[Path]:
    """Write report.json, layers.png (layers-2.png, ...) and report.md; returns their paths.

    Each file appears by a rename. The record is safe before anything is drawn, and report.md comes
    last, so it never names a picture that is not there. Paths in `record.verification` are
    relative to `directory`, which is created if needed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    names = ["report.json"]
    with _replacing(directory / names[0]) as temporary:
        text = json.dumps(record.to_dict(), indent=2, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")
    sections: list[str] = []
    outcomes = iter(record.outcomes)
    for plan in record.plans:
        told = [next(outcomes, {}) for _ in sparsify_steps(plan)]
        picture = f"layers-{len(names)}.png" if len(names) > 1 else "layers.png"
        if shown := drawable(plan):
            with _replacing(directory / picture) as temporary:
                plot_layers(plan, told[-1] if told else None).savefig(temporary, format="png")
            names.append(picture)
        sections += _plan_section(plan, told, picture if shown else None, _measured(record))
    with _replacing(directory / "report.md") as temporary:
        temporary.write_text(_markdown(record, sections), encoding="utf-8")
    return [directory / name for name in (*names, "report.md")]


def _measured(record: RunRecord) -> float:
    """Share of zeros in decoder linears, if one step alone made them; else 0."""
    steps = [step for plan in record.plans for step in plan["steps"]]
    return max((s.linear_sparsity for s in record.stages), default=0.0) if len(steps) == 1 else 0.0


def _plan_section(
    plan: dict[str, Any], outcomes: list[dict[str, Any]], picture: str | None, measured: float
) -> list[str]:
    """What one plan did and why; the long table of layers is folded away."""
    parts, remaining = [f"## {plan['method']}: {nominal(plan)}"], iter(outcomes)
    for step in plan["steps"]:
        if step["kind"] == "sparsify":
            parts += _sparsify_section(plan, step, next(remaining), measured)
        else:
            details = {key: value for key, value in step.items() if key != "kind"}
            parts.append(f"Step `{step['kind']}`:\n{_bullets(details)}")
    # Settings within settings are told with their step.
    arguments = {k: v for k, v in plan["arguments"].items() if not isinstance(v, dict)}
    calibration = {f"calibration {k}": v for k, v in (plan.get("calibration") or {}).items()}
    parts.append(f"Decided with:\n{_bullets({**arguments, **calibration})}")
    if picture:
        parts.append(f"![scores of the decoder layers]({picture})")
    columns = layer_table(plan, outcomes[-1] if outcomes else None)
    rows = list(zip(*columns.values(), strict=True))
    title = f"<details><summary>All {len(rows)} decoder layers</summary>"
    table = [title, _table(list(columns), rows), "</details>"]
    return parts + table if len(columns) > 1 else parts


def _sparsify_section(
    plan: dict[str, Any], step: dict[str, Any], outcome: dict[str, Any], measured: float
) -> list[str]:
    """What a sparsify step did, in totals; the share of each matrix is left to report.json."""
    facts = {**sparsify_facts(plan, step, outcome, measured), **step.get("options", {})}
    notes = "".join(f"\n- {note}" for note in outcome.get("notes", ()))
    kind = f"{step['pattern']} zeros" if step.get("pattern") else "Unstructured zeros"
    parts = [
        f"Step `sparsify`:\n{_bullets(facts)}{notes}",
        f"{kind} are stored like any other weight and do not by themselves make inference faster "
        "or the files smaller: speed comes from depth, width and slicing.",
    ]
    schedule = plan["arguments"].get("schedule")
    return parts if schedule is None else [*parts, _schedule_sentence(schedule)]


def _schedule_sentence(schedule: dict[str, Any]) -> str:
    text = "from step {start_step} to step {end_step} every {every} steps along a {curve} curve."
    return f"Sparsity rises {text.format_map(schedule)}"


def _markdown(record: RunRecord, plan_sections: list[str]) -> str:
    parts = [f"# Pruning report: {record.model}", _result(record)]
    if record.warnings:
        parts.append("\n".join(["> [!WARNING]", *(f"> - {text}" for text in record.warnings)]))
    stages = [stage.name for stage in record.stages]
    parts += [_table(["", *stages], _stage_rows(record)), *plan_sections]
    if record.costs:
        head = ["phase", "time in F", "peak memory in checkpoints", "in decoder layers", "seconds"]
        parts += ["## Cost", _table(head, _cost_rows(record))]
        unit = record.forward_seconds
        parts.append(
            "F is one forward of the calibration set through the dense model"
            f"{f' ({unit:.3g} s here)' if math.isfinite(unit) else ''}. Peak memory is that of the "
            "whole process on a CPU, what torch allocated on CUDA."
        )
    where = {"device": record.device, "dtype": record.dtype, "fingerprint": record.fingerprint}
    for title, values, otherwise in (
        ("Recovery", record.recovery, "None: the weights were not trained after pruning."),
        ("Evaluation data", record.evaluation, "Not recorded."),
        ("Verification", record.verification, "No model was saved."),
        ("Versions", {**where, **record.versions}, ""),
    ):
        parts += [f"## {title}", _bullets(values) or otherwise]
        if title == "Recovery":
            parts += _lost_zeros(record)
    if record.verification:
        parts += ["## How to load the result", _loading(list(record.verification)[-1])]
    return "\n\n".join(parts) + "\n"


def _lost_zeros(record: RunRecord) -> list[str]:
    """One sentence if the recovery was free to fill zeros, and did."""
    stages = {stage.name: stage.linear_sparsity for stage in record.stages}
    before, after = stages.get("pruned", math.nan), stages.get("recovered", math.nan)
    if record.recovery.get("keep_zeros", True) or not after < before:
        return []
    what = "Merging the adapters" if record.recovery.get("mode") == "lora" else "Training"
    return [
        f"{what} filled zeros: {percent(before)} -> {percent(after)} of the weights of decoder "
        "linears are zero; recover with keep_zeros to keep them all."
    ]


def _loading(name: str) -> str:
    return (
        "In the directory of this report:\n\n```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({json.dumps(name)})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(name)})\n```"
    )


def _count(value: float) -> str:
    power = min(int(math.log10(max(value, 1)) // 3), 4)
    return f"{value / 1000**power:.1f}{' KMBT'[power]}" if power else str(value)


def _decimal(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= value < 1e6 else f"{value:.4g}"


_FIGURES: tuple[
    tuple[str, str, Callable[[Any], str]], ...
] = (  # label, field of Stage, how a number is shown
    ("layers", "num_layers", str),
    ("parameters", "parameters", _count),
    ("size (MB)", "size_bytes", lambda value: f"{value / 1e6:,.1f}"),
    ("perplexity", "perplexity", _decimal),
    ("next-token accuracy", "accuracy", "{:.4f}".format),
    ("prefill tokens/s", "prefill_tokens_per_second", _decimal),
    ("decode tokens/s", "decode_tokens_per_second", _decimal),
)
_ZEROS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (  # shown once something is sparsified
    ("zeros in decoder linears", "linear_sparsity", percent),
    ("zeros in all parameters", "sparsity", percent),
)
_HEADLINE = ("layers", "parameters", _ZEROS[0][0], "perplexity", "decode tokens/s")


def _result(record: RunRecord) -> str:
    """The run in one sentence, and the true share removed beside the nominal ratios."""
    if not record.stages:
        return "Nothing was measured."
    dense, last = _dense(record), record.stages[-1]
    told = [row for row in _stage_rows(record) if row[0] in _HEADLINE]
    if dense is None or dense is last:
        return f"The {last.name} model: {', '.join(f'{row[0]} {row[-1]}' for row in told)}."
    column = 1 + record.stages.index(dense)
    arrows = ", ".join(f"{row[0]} {row[column]} -> {row[-1]}" for row in told)
    true = f"{100 * (1 - last.parameters / max(dense.parameters, 1)):.1f} %"
    if _sparsified(record):
        true += f"; zeros among all parameters: {percent(last.sparsity)}"
    told_ratios = " + ".join(nominal(plan) for plan in record.plans) or "nothing pruned"
    return (
        f"{_methods(record)}, {dense.name} -> {last.name}: {arrows}.\n\n"
        f"- Nominal ratio: {told_ratios}\n- True share of all parameters removed: {true}"
    )


def _stage_rows(record: RunRecord) -> list[list[str]]:
    """One row a figure, one cell a stage, with the change against the dense stage."""
    figures = _FIGURES + (_ZEROS if _sparsified(record) else ())
    rows = [[label] for label, _, _ in figures]
    dense = _dense(record)
    for stage in record.stages:
        for row, (label, name, show) in zip(rows, figures, strict=True):
            value = getattr(stage, name)
            alone = dense in (None, stage) or (label, name, show) in _ZEROS
            base = math.nan if alone else getattr(dense, name)
            change = _change(value, base, factor=name.endswith("per_second"))
            row.append(show(value) + (f" ({change})" if change else ""))
    return rows


def _change(value: float, base: float, *, factor: bool) -> str:
    if not (math.isfinite(value) and math.isfinite(base) and base > 0):
        return ""
    if factor or value > 10 * base:
        return f"\u00d7{value / base:.3g}"
    return f"{round(100 * (value / base - 1), 1) + 0.0:+.1f} %"  # + 0.0: never "-0.0 %"


def _cost_rows(record: RunRecord) -> list[list[str]]:
    units = [max(record.checkpoint_bytes, 1), max(record.layer_bytes, 1)]
    rows = []
    for cost in record.costs:
        name = f"{cost.name} (reused)" if cost.reused else cost.name
        peaks = [f"{cost.peak_bytes / unit:.3g}" for unit in units]
        forwards = f"{cost.forwards:.3g}" if math.isfinite(cost.forwards) else "?"
        rows.append([name, forwards, *peaks, f"{cost.seconds:.3g}"])
    return rows


def _dense(record: RunRecord) -> Stage | None:
    return next((stage for stage in record.stages if stage.name == "dense"), None)


def _sparsified(record: RunRecord) -> bool:
    return any(sparsify_steps(plan) for plan in record.plans)


def _methods(record: RunRecord) -> str:
    return " + ".join(plan["method"] for plan in record.plans) or "No pruning"


def _bullets(values: dict[str, Any]) -> str:
    """One line an entry; what would be pages of numbers is left to report.json."""
    lines = [f"- {name.replace('_', ' ')}: {value}" for name, value in values.items()]
    return "\n".join(x if len(x) < 600 else f"{x[:80]} ... (in report.json)" for x in lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that takes its place on success and is gone on an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
