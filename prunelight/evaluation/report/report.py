"""Turns the record of one run into report.json, report.md, pictures and a console table.

The report gives what travels between machines: changes against the dense model, time in F (one
forward of the calibration set through the dense model), memory in checkpoints and in decoder
layers. Other files measure (evaluation/stages.py) and draw (layer_plots.py). This module needs
neither torch nor lightning, so it renders a report.json on any machine.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from prunelight.evaluation.report.heat_maps import plot_cka
from prunelight.evaluation.report.layer_plots import plot_layers
from prunelight.evaluation.report.plan_facts import (
    Json,
    PlanFacts,
    by_sublayer,
    explained_variance,
    percent,
)
from prunelight.evaluation.report.record import RunRecord, Stage
from prunelight.evaluation.report.writing import bullets, markdown_table, write_whole
from prunelight.planning.steps import SliceHidden, Sparsify


def summary_table(record: RunRecord) -> Table:
    """Return the table for a console: one column a stage, costs in the caption."""
    costs = [
        "{}: {} ({} F), peak {} ({} checkpoints)".format(*row)
        for row in _cost_rows(record, least=0.01)
    ]
    title, caption = escape(f"{_methods(record)}: {record.model}"), escape("\n".join(costs))
    table = Table(title=title, caption=caption, caption_justify="left")
    for index, name in enumerate(["", *(stage.name for stage in record.stages)]):
        table.add_column(escape(name), justify="right" if index else "left")
    for row in _stage_rows(record):
        table.add_row(*map(escape, row))
    return table


def write_report(directory: Path, record: RunRecord) -> list[Path]:
    """Write report.json, layers.png (layers-2.png, ...) and report.md; return their paths.

    Each file appears by a rename. report.json comes first, so the record is safe before anything is
    drawn. report.md comes last, so every picture that it names is there.

    Args:
        directory: is created if needed; paths in `record.verification` are relative to it.
        record: of the run.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _write_record(directory, record)
    sections, pictures = _plan_sections(record)
    for name, draw in pictures.items():
        write_whole(directory / name, draw())
    write_whole(directory / "report.md", _markdown(record, sections))
    return [directory / name for name in ("report.json", *pictures, "report.md")]


def write_texts(directory: Path, record: RunRecord) -> list[Path]:
    """Write report.json and report.md once more, without drawing the pictures; return all paths."""
    _write_record(directory, record)
    sections, pictures = _plan_sections(record)
    write_whole(directory / "report.md", _markdown(record, sections))
    return [directory / name for name in ("report.json", *pictures, "report.md")]


def _write_record(directory: Path, record: RunRecord) -> None:
    text = json.dumps(record.to_dict(), indent=2, allow_nan=False)
    write_whole(directory / "report.json", text + "\n")


def _plan_sections(record: RunRecord) -> tuple[list[str], dict[str, Callable[[], Any]]]:
    """Return the sections on the plans, and the pictures in them: name -> what draws it."""
    sections: list[str] = []
    pictures: dict[str, Callable[[], Any]] = {}
    outcomes = iter(record.outcomes)
    for plan in _plans(record):
        step_outcomes: list[Json] = []
        for step in plan.steps:
            # Zeros that a schedule adds later have no outcome.
            later = plan.schedule and isinstance(step, Sparsify)
            step_outcomes.append(next(outcomes, {}) if step.has_outcome and not later else {})
        # Of the last step of each kind; no two kinds have an outcome of the same name.
        last = {x.kind: outcome for x, outcome in zip(plan.steps, step_outcomes, strict=True)}
        together = {name: value for outcome in last.values() for name, value in outcome.items()}
        sections += _plan_section(plan, step_outcomes) + _layer_table(plan, together)
        number = len(pictures) + 1
        if plan.score_lists() or any(step.has_outcome for step in plan.steps):
            name = f"layers-{number}.png" if number > 1 else "layers.png"
            what = "widths" if plan.steps_of(SliceHidden) else "scores"
            sections.append(f"![{what} of the decoder layers]({name})")
            pictures[name] = partial(plot_layers, plan, together)
            number += 1
        if "cka" in plan.found:
            name = f"cka-{number}.png"
            sections.append(f"![CKA of the hidden states, merged windows outlined]({name})")
            pictures[name] = partial(plot_cka, plan.found["cka"], plan.title, plan.merged_groups)
    return sections, pictures


def _plans(record: RunRecord) -> list[PlanFacts]:
    return [PlanFacts(plan) for plan in record.plans]


def _plan_section(plan: PlanFacts, outcomes: list[Json]) -> list[str]:
    """Return the section of one plan: what was done and why."""
    parts = [f"## {plan.method}: {plan.nominal()}"]
    for step, outcome in zip(plan.steps, outcomes, strict=True):
        if isinstance(step, Sparsify):
            parts += _sparsify_section(plan, step, outcome)
        elif isinstance(step, SliceHidden):
            parts += _slice_section(plan, step, outcome)
        else:
            parts.append(f"Step `{step.kind}`:\n{bullets(step.facts)}")
    # Settings within settings stand with their step.
    arguments = {k: v for k, v in plan.arguments.items() if not isinstance(v, dict)}
    calibration = {f"calibration {k}": v for k, v in plan.calibration.items()}
    parts.append(f"Decided with:\n{bullets({**arguments, **calibration})}")
    if findings := {k: _finding(k, v) for k, v in plan.found.items() if k != "cka"}:
        parts.append(f"Found:\n{bullets(findings)}")
    return parts


def _finding(name: str, value: Any) -> Any:
    """Return a finding as a report shows it."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_finding(key, x)}" for key, x in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    return _count(value) if name.startswith("parameters") else value


def _sparsify_section(plan: PlanFacts, step: Sparsify, outcome: Json) -> list[str]:
    """Return what a sparsify step did, in totals; report.json has the share of each matrix."""
    shares = [share for share in plan.layer_zeros(step, outcome).layers if math.isfinite(share)]
    facts = step.facts
    if shares:
        facts["sparsity of decoder layers"] = f"{percent(min(shares))} to {percent(max(shares))}"
    notes = "".join(f"\n- {note}" for note in outcome.get("notes", ()))
    kind = f"{step.pattern} zeros" if step.pattern else "Unstructured zeros"
    parts = [
        f"Step `sparsify`:\n{bullets({**facts, **step.options})}{notes}",
        f"{kind} are stored like any other weight and do not by themselves make inference faster "
        "or the files smaller: speed comes from depth, width and slicing.",
    ]
    if schedule := plan.schedule:
        parts.append(
            "Sparsity rises from step {start_step} to step {end_step} every {every} steps along a "
            "{curve} curve.".format_map(schedule)
        )
    return parts


def _slice_section(plan: PlanFacts, step: SliceHidden, outcome: Json) -> list[str]:
    """Return what a slice step did, in totals; the table of layers has each width."""
    shared, hidden = step.rotation == "shared", plan.model["hidden_size"]
    sites, dims = step.sliced_sites(hidden), step.residual_dims
    facts = {
        "widths at attentions and MLPs": f"{_span([dims[i] for i in sites], str)} of {hidden}",
        "mean share removed": percent(step.share_removed(hidden)),
        "width of the embeddings": dims[0],
        **{name: getattr(step, name) for name in ("signal", "orientation", "rotation")},
    }
    if explained := outcome.get("explained_variance"):
        measured = explained if shared else [explained[i] for i in sites]
        facts["explained variance"] = _span(measured, "{:.4g}".format)
    parts = [
        f"Step `slice_hidden`:\n{bullets(facts)}",
        "With one rotation for all layers this is a stock model, which loads and runs like any "
        "other; a head that was untied is counted in the parameters."
        if shared
        else "The class is ours: `import prunelight` before `from_pretrained`, unless its remote "
        "code was exported; shortcuts between the rotations, and a head that was untied, are "
        "counted in the parameters.",
    ]
    if plan.found.get("parameters", 0) >= plan.found.get("parameters_before", math.inf):
        added = "An untied head adds" if shared else "Shortcuts (and a head that was untied) add"
        parts.append(f"{added} more parameters than this slice removes.")
    return parts


def _span(values: Sequence[float], show: Callable[[Any], str]) -> str:
    """Return the lowest to the highest of some values, or the one value that all have."""
    return " to ".join(dict.fromkeys(map(show, (min(values), max(values)))))


def _layer_table(plan: PlanFacts, outcome: Json) -> list[str]:
    """Return one row a decoder layer: scores, widths, zeros of the last step, removed or kept."""
    num_layers = plan.num_layers
    columns = {"layer": [str(layer) for layer in range(num_layers)]}
    for name, scores in plan.score_lists().items():
        missing = num_layers - len(scores)
        title = name.replace("_", " ") + (" from here" if missing else "")
        columns[title] = _cells(scores) + [""] * missing
    for step in plan.steps_of(SliceHidden):
        widths, explained = by_sublayer(step.residual_dims), explained_variance(step, outcome)
        columns |= {f"width at {name}": [*map(str, x)] for name, x in widths.items()}
        columns |= {f"explained variance at {name}": _cells(x) for name, x in explained.items()}
    for sparsify in plan.steps_of(Sparsify)[-1:]:
        zeros = plan.layer_zeros(sparsify, outcome)
        columns["sparsity"] = [percent(x) if math.isfinite(x) else "" for x in zeros.layers]
        if zeros.errors:
            columns["reconstruction error"] = [f"{error:.4g}" for error in zeros.errors]
    if layer_outcomes := plan.layer_outcomes():
        columns["fate"] = [layer_outcomes.get(i, "kept") for i in range(num_layers)]
    table = markdown_table(list(columns), list(zip(*columns.values(), strict=True)))
    title = f"<details><summary>All {num_layers} decoder layers</summary>"
    return [title, table, "</details>"]


def _cells(values: Sequence[float]) -> list[str]:
    return ["" if math.isnan(value) else f"{value:.4g}" for value in values]


def _markdown(record: RunRecord, plan_sections: list[str]) -> str:
    parts = [f"# Pruning report: {record.model}", _result(record)]
    if record.warnings:
        parts.append("\n".join(["> [!WARNING]", *(f"> - {text}" for text in record.warnings)]))
    stages = [stage.name for stage in record.stages]
    parts.append(markdown_table(["", *stages], _stage_rows(record)))
    if any(stage.factors for stage in record.stages):
        parts.append(
            "Speeds: each model was timed in turn with the dense one. The factor is the median "
            "over the rounds, with the second lowest and second highest (of fewer than 6 rounds, "
            "the lowest and highest). Where these lie on both sides of 1, no difference shows "
            "beyond noise. Figures are the dense model's times the factor. A model of the shape of "
            "an earlier one is as fast, and has its figures."
        )
    parts += [*(f"## {title}\n\n{text}" for title, text in record.sections.items()), *plan_sections]
    if record.costs:
        head = ["phase", "time", "in F", "peak memory", "in checkpoints", "in decoder layers"]
        unit = record.forward_seconds
        parts += [
            "## Cost",
            markdown_table(head, _cost_rows(record)),
            "F is one forward of the calibration set through the dense model"
            f"{f' ({unit:.3g} s here)' if math.isfinite(unit) else ''}. Peak memory is that of the "
            "whole process on a CPU, what torch allocated on CUDA. The time of a phase does not "
            "count for the one around it; reused rows do not count for this start.",
        ]
    where = {"device": record.device, "dtype": record.dtype, "fingerprint": record.fingerprint}
    for title, values, otherwise in (
        ("Recovery", record.recovery, "None: the weights were not trained after pruning."),
        ("Evaluation data", record.evaluation, "Not recorded."),
        ("Verification", record.verification, "No model was saved."),
        ("Versions", {**where, **record.versions}, ""),
    ):
        parts += [f"## {title}", bullets(values) or otherwise]
    if record.verification:
        name = json.dumps(list(record.verification)[-1])
        own_class = any(plan.has_own_class for plan in _plans(record))
        ours = "import prunelight  # its class\n" if own_class else ""
        parts += [
            "## How to load the result\n\nIn the directory of this report:\n\n```python\n"
            f"{ours}from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f"model = AutoModelForCausalLM.from_pretrained({name})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({name})\n```"
        ]
    if record.loads_in:
        answers = "\n".join(f"- {engine}: {answer}" for engine, answer in record.loads_in.items())
        parts.append(f"## Whether other programs read the result\n\n{answers}")
    return "\n\n".join(parts) + "\n"


def _count(value: float) -> str:
    power = min(int(math.log10(max(value, 1)) // 3), 4)
    return f"{value / 1000**power:.1f}{' KMBT'[power]}" if power else str(value)


def _decimal(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= value < 1e6 else f"{value:.4g}"


# Label, field of Stage, how a number is shown. Shares of zeros are shown if a plan sparsifies.
_FIGURES: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("layers", "num_layers", str),
    ("parameters", "parameters", _count),
    ("size (MB)", "size_bytes", lambda value: f"{value / 1e6:,.1f}"),
    ("perplexity", "perplexity", _decimal),
    ("next-token accuracy", "accuracy", "{:.4f}".format),
    ("prefill tokens/s", "prefill_tokens_per_second", _decimal),
    ("decode tokens/s", "decode_tokens_per_second", _decimal),
    ("latency (s)", "latency_seconds", "{:.3f}".format),
    ("throughput (tokens/s)", "throughput", _decimal),
    ("zeros in decoder linears", "linear_sparsity", percent),
    ("zeros in all parameters", "sparsity", percent),
)

_SPEEDS = ("per_second", "latency_seconds", "throughput")

_HEADLINE = ("layers", "parameters", "zeros in decoder linears", "perplexity", "decode tokens/s")


def _result(record: RunRecord) -> str:
    """Return the run in one sentence, and the true share removed beside the nominal ratios."""
    dense, last = record.stages[0], record.stages[-1]
    rows = [row for row in _stage_rows(record) if row[0] in _HEADLINE]
    arrows = ", ".join(f"{row[0]} {row[1]} -> {row[-1]}" for row in rows)
    true = percent(1 - last.parameters / dense.parameters)
    if _sparsified(record):
        true += f"; zeros among all parameters: {percent(last.sparsity)}"
    ratios = " + ".join(plan.nominal() for plan in _plans(record)) or "nothing pruned"
    return (
        f"{_methods(record)}, {dense.name} -> {last.name}: {arrows}.\n\n"
        f"- Nominal ratio: {ratios}\n- True share of all parameters removed: {true}"
    )


def _stage_rows(record: RunRecord) -> list[list[str]]:
    """Return one row a figure, one cell a stage, with the change against the dense stage."""
    dense, rows, sparsified = record.stages[0], [], _sparsified(record)
    for label, name, show in _FIGURES:
        if show is percent and not sparsified:
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
            change = _factor(stage, name) if speed else _change(value, base)
            spread = stage.latency_deviation if name == "latency_seconds" else None
            shown = show(value) + (f" ± {spread:.3f}" if spread is not None else "")
            row.append(shown + ("" if stage is dense or show is percent else change))
        rows.append(row)
    return rows


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


def _change(value: float, base: float | None) -> str:
    if base is None or not (math.isfinite(value) and math.isfinite(base) and base > 0):
        return ""
    if value > 10 * base:
        return f" (\u00d7{value / base:.3g})"
    return f" ({round(100 * (value / base - 1), 1) + 0.0:+.1f} %)"  # + 0.0: never "-0.0 %"


def _cost_rows(record: RunRecord, least: float = 0.0) -> list[list[str]]:
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
            name += f" ({_duration(cost.earlier_seconds)} of it in earlier starts)"
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
    return [name, _duration(seconds), forwards, f"{peak_bytes / 1e9:.3g} GB", *peaks]


def _duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 60 else f"{seconds / 60:.3g} min"


def _sparsified(record: RunRecord) -> bool:
    return any(plan.steps_of(Sparsify) for plan in _plans(record))


def _methods(record: RunRecord) -> str:
    return " + ".join(plan["method"] for plan in record.plans) or "No pruning"
