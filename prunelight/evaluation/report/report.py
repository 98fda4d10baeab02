"""Turns the record of one run into report.json, report.md, report.html and a console table.

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

from prunelight.evaluation.report.examined import (
    divergence_grid,
    probe_grid,
    samples_beside,
    serving_grid,
    task_grid,
    text_grid,
)
from prunelight.evaluation.report.figures import (
    cost_rows,
    finding,
    methods_of,
    plans_carried_out,
    plans_of,
    sparsified,
    stage_rows,
)
from prunelight.evaluation.report.heat_maps import plot_cka
from prunelight.evaluation.report.layer_plots import has_layer_plots, plot_layers
from prunelight.evaluation.report.page.run_page import run_page
from prunelight.evaluation.report.plan_facts import (
    HEALING_ERRORS,
    Json,
    PlanFacts,
    healing_lines,
    layer_columns,
    percent,
)
from prunelight.evaluation.report.record import RunRecord
from prunelight.evaluation.report.writing import (
    bullets,
    code_span,
    markdown_table,
    write_whole,
)
from prunelight.planning.steps import Heal, SliceHidden, Sparsify


def summary_table(record: RunRecord) -> Table:
    """Return the table for a console: one column a stage, costs in the caption."""
    costs = [
        "{}: {} ({} F), peak {} ({} checkpoints)".format(*row)
        for row in cost_rows(record, least=0.01)
    ]
    title, caption = escape(f"{methods_of(record)}: {record.model}"), escape("\n".join(costs))
    table = Table(title=title, caption=caption, caption_justify="left")
    for index, name in enumerate(["", *(stage.name for stage in record.stages)]):
        table.add_column(escape(name), justify="right" if index else "left")
    for row in stage_rows(record):
        table.add_row(*map(escape, row))
    return table


def write_report(directory: Path, record: RunRecord) -> list[Path]:
    """Write report.json, layers.png (layers-2.png, ...), report.html and report.md.

    Each file appears by a rename. report.json comes first, so the record is safe before anything is
    drawn. report.md comes last, so every picture that it names is there.

    Args:
        directory: is created if needed; paths in `record.verification` are relative to it.
        record: of the run.

    Returns:
        The paths of the files.
    """
    write_pictures(directory, record)
    return write_texts(directory, record)


def write_pictures(directory: Path, record: RunRecord) -> None:
    """Write report.json, then the pictures that report.md names."""
    directory.mkdir(parents=True, exist_ok=True)
    _write_record(directory, record)
    _draw_pictures(directory, record)


def write_texts(directory: Path, record: RunRecord) -> list[Path]:
    """Write report.json, report.html and report.md without the pictures; return all paths."""
    _write_record(directory, record)
    return [directory / "report.json", *_write_pages(directory, record)]


def draw_report(directory: Path, record: RunRecord) -> list[Path]:
    """Write what is drawn from report.json: the pictures, report.html, report.md."""
    _draw_pictures(directory, record)
    return _write_pages(directory, record)


def _draw_pictures(directory: Path, record: RunRecord) -> None:
    for name, draw in _plan_sections(record)[1].items():
        write_whole(directory / name, draw())


def _write_pages(directory: Path, record: RunRecord) -> list[Path]:
    sections, pictures = _plan_sections(record)
    write_whole(directory / "report.html", run_page(record))
    write_whole(directory / "report.md", _markdown(record, sections))
    return [directory / name for name in (*pictures, "report.html", "report.md")]


def _write_record(directory: Path, record: RunRecord) -> None:
    text = json.dumps(record.to_dict(), indent=2, allow_nan=False)
    write_whole(directory / "report.json", text + "\n")


def _plan_sections(record: RunRecord) -> tuple[list[str], dict[str, Callable[[], Any]]]:
    """Return the sections on the plans, and the pictures in them: name -> what draws it."""
    sections: list[str] = []
    pictures: dict[str, Callable[[], Any]] = {}
    for carried in plans_carried_out(record):
        plan, together = carried.plan, carried.together
        sections += _plan_section(plan, carried.outcomes) + _layer_table(plan, together)
        number = len(pictures) + 1
        if has_layer_plots(plan):
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


def _plan_section(plan: PlanFacts, outcomes: list[Json]) -> list[str]:
    """Return the section of one plan: what was done and why."""
    parts = [f"## {plan.method}: {plan.nominal()}"]
    for step, outcome in zip(plan.steps, outcomes, strict=True):
        if isinstance(step, Sparsify):
            parts += _sparsify_section(plan, step, outcome)
        elif isinstance(step, SliceHidden):
            parts += _slice_section(plan, step, outcome)
        elif isinstance(step, Heal):
            lines = "\n".join(f"- {line}" for line in healing_lines(step, outcome))
            parts.append(f"Step `heal`, {step.mode}:\n{lines}\n\n{HEALING_ERRORS}")
        else:
            parts.append(f"Step `{step.kind}`:\n{bullets(step.facts)}")
    # Settings within settings stand with their step.
    arguments = {k: v for k, v in plan.arguments.items() if not isinstance(v, dict)}
    calibration = {f"calibration {k}": v for k, v in plan.calibration.items()}
    parts.append(f"Decided with:\n{bullets({**arguments, **calibration})}")
    if findings := {k: finding(k, v) for k, v in plan.found.items() if k != "cka"}:
        parts.append(f"Found:\n{bullets(findings)}")
    return parts


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
    columns = layer_columns(plan, outcome)
    table = markdown_table(list(columns), list(zip(*columns.values(), strict=True)))
    title = f"<details><summary>All {plan.num_layers} decoder layers</summary>"
    return [title, table, "</details>"]


def _markdown(record: RunRecord, plan_sections: list[str]) -> str:
    parts = [f"# Pruning report: {record.model}", _result(record)]
    if record.warnings:
        parts.append("\n".join(["> [!WARNING]", *(f"> - {text}" for text in record.warnings)]))
    stages = [stage.name for stage in record.stages]
    parts.append(markdown_table(["", *stages], stage_rows(record)))
    if any(stage.factors for stage in record.stages):
        parts.append(
            "Speeds: each model was timed in turn with the dense one. The factor is the median "
            "over the rounds, with the second lowest and second highest (of fewer than 6 rounds, "
            "the lowest and highest). Where these lie on both sides of 1, no difference shows "
            "beyond noise. Figures are the dense model's times the factor. A model of the shape of "
            "an earlier one is as fast, and has its figures."
        )
    parts += _examined_sections(record)
    parts += [*(f"## {title}\n\n{text}" for title, text in record.sections.items()), *plan_sections]
    if record.costs:
        head = ["phase", "time", "in F", "peak memory", "in checkpoints", "in decoder layers"]
        unit = record.forward_seconds
        parts += [
            "## Cost",
            markdown_table(head, cost_rows(record)),
            "F is one forward of the calibration set through the dense model"
            f"{f' ({unit:.3g} s here)' if math.isfinite(unit) else ''}. Peak memory is that of the "
            "whole process on a CPU, what torch allocated on CUDA. The time of a phase does not "
            "count for the one around it; reused rows do not count for this start.",
        ]
    where = {"device": record.device, "dtype": record.dtype, "fingerprint": record.fingerprint}
    made = {"date": record.date, "command": record.command, "seed": record.seed, **record.machine}
    made |= {f"{role} data": source for role, source in record.data.items()}
    for title, values, otherwise in (
        ("Recovery", record.recovery, "None: the weights were not trained after pruning."),
        ("Evaluation data", record.evaluation, "Not recorded."),
        ("Verification", record.verification, "No model was saved."),
        ("Origin", {k: v for k, v in made.items() if v not in ("", None)}, "Not recorded."),
        ("Versions", {**where, **record.versions}, ""),
    ):
        parts += [f"## {title}", bullets(values) or otherwise]
    if record.verification:
        name = json.dumps(list(record.verification)[-1])
        own_class = any(plan.has_own_class for plan in plans_of(record))
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


def _examined_sections(record: RunRecord) -> list[str]:
    """Return what was examined of the stages besides, one section each."""
    parts: list[str] = []
    for title, grid in (
        ("Held-out texts", text_grid(record)),
        ("Tasks", task_grid(record.stages)),
        ("Collapse probes", probe_grid(record.stages)),
        ("Divergence from the dense model", divergence_grid(record.stages)),
        ("Cost of serving", serving_grid(record.stages)),
    ):
        if grid is not None:
            parts += [f"## {title}", markdown_table(grid.head, grid.rows)]
    if prompts := samples_beside(record.stages):
        parts.append("## Samples")
        for prompt, texts in prompts:
            parts.append(f"After {code_span(prompt)}:")
            parts.append("\n".join(f"- {name}: {code_span(text)}" for name, text in texts))
    return parts


_HEADLINE = ("layers", "parameters", "zeros in decoder linears", "perplexity", "decode tokens/s")


def _result(record: RunRecord) -> str:
    """Return the run in one sentence, and the true share removed beside the nominal ratios."""
    dense, last = record.stages[0], record.stages[-1]
    headline = {*_HEADLINE, f"perplexity {record.evaluation.get('first_text')}"}
    rows = [row for row in stage_rows(record) if row[0] in headline]
    arrows = ", ".join(f"{row[0]} {row[1]} -> {row[-1]}" for row in rows)
    true = percent(1 - last.parameters / dense.parameters)
    if sparsified(record):
        true += f"; zeros among all parameters: {percent(last.sparsity)}"
    ratios = " + ".join(plan.nominal() for plan in plans_of(record)) or "nothing pruned"
    return (
        f"{methods_of(record)}, {dense.name} -> {last.name}: {arrows}.\n\n"
        f"- Nominal ratio: {ratios}\n- True share of all parameters removed: {true}"
    )
