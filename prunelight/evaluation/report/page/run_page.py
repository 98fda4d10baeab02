"""report.html: the page of one run, drawn from its record alone."""

from __future__ import annotations

import json
import math
from typing import Any

from markupsafe import Markup

from prunelight.evaluation.report.examined import (
    divergences,
    interval,
    mean_of_tasks,
    middle,
    speeds_of,
    tasks_of,
    text_grid,
)
from prunelight.evaluation.report.figures import count, decimal, plans_of, sparsified, stage_rows
from prunelight.evaluation.report.page.course import (
    loads_section,
    phase_section,
    serving_section,
    training_section,
)
from prunelight.evaluation.report.page.decisions import decision_sections
from prunelight.evaluation.report.page.frame import (
    Section,
    code,
    facts,
    heading,
    paragraph,
    render_page,
    table,
    tiles,
)
from prunelight.evaluation.report.page.quality import (
    divergence_section,
    probe_section,
    sample_section,
    task_section,
)
from prunelight.evaluation.report.page.verdict import verdict_of
from prunelight.evaluation.report.record import RunRecord, Stage


def run_page(record: RunRecord) -> str:
    """Return the page of a run as the text of one HTML file."""
    sections = [
        _stages_section(record),
        task_section(record.stages),
        probe_section(record.stages),
        divergence_section(record.stages),
        sample_section(record.stages),
        *decision_sections(record),
        training_section(record),
        serving_section(record),
        loads_section(record),
        *(Section(title, [_plain(text)]) for title, text in record.sections.items()),
        phase_section(record),
        _origin_section(record),
    ]
    methods = " + ".join(plan.method for plan in plans_of(record)) or "no pruning"
    return render_page(
        f"{record.model}: {methods}",
        verdict_of(record),
        sections,
        kicker=" · ".join(x for x in ("Pruning report", record.date) if x),
        warnings=record.warnings,
        footer="Drawn by prunelight from report.json. This page needs no network.",
    )


def _plain(text: str) -> Markup:
    """Return the Markdown of a study as it is: its tables stay readable."""
    return code(text)


def _stages_section(record: RunRecord) -> Section:
    """Return the figures of all stages, the few that matter most first."""
    stages = record.stages
    rows = stage_rows(record)
    rows += _tokens_rows(record)
    rows += _examined_rows(stages)
    parts: list[Markup | str] = [tiles(_tiles(record))] if len(stages) > 1 else []
    parts.append(table(["", *(stage.name for stage in stages)], rows))
    if (texts := text_grid(record)) is not None:
        parts.append(table(texts.head, texts.rows))
    if any(stage.factors for stage in stages):
        note = (
            "Speeds: each model was timed in turn with the dense one; the factor is the median "
            "over the rounds, with their low and high. Where these lie on both sides of 1, no "
            "difference shows beyond noise."
        )
        parts.append(paragraph(note, "note"))
    return Section("Before and after", parts, _evaluated_on(record))


def _evaluated_on(record: RunRecord) -> str:
    told = record.evaluation
    if "source" not in told:
        return ""
    windows = f"{told.get('num_samples', '?')} windows of {told.get('seq_len', '?')} tokens"
    return f"Perplexity and next-token accuracy on {windows} of {told['source']}, held out."


def _tokens_rows(record: RunRecord) -> list[list[str]]:
    """Return what each stage cost in tokens: looked at to decide, and trained on."""
    plans = plans_of(record)
    looked = [plan.calibration for plan in plans if plan.calibration.get("num_samples")]
    calibration = max((x["num_samples"] * x.get("seq_len", 0) for x in looked), default=0)
    trained = record.recovery.get("tokens_seen")
    rows = []
    for stage in record.stages:
        untouched = stage.name == "dense"
        seen = trained if stage.name == "recovered" and isinstance(trained, int) else 0
        rows.append(["0" if untouched else f"{calibration:,}", f"{seen:,}"])
    first, second = ([row[i] for row in rows] for i in (0, 1))
    return [["tokens looked at", *first], ["tokens trained on", *second]]


def _examined_rows(stages: list[Stage]) -> list[list[str]]:
    """Return one row for each thing that was examined besides, in a figure."""
    rows = []
    if any(tasks_of(stage) for stage in stages):
        means = [mean_of_tasks(stage) for stage in stages]
        cells = [f"{mean:.3f}" if math.isfinite(mean) else "" for mean in means]
        rows.append(["tasks, mean", *cells])
    if told := divergences(stages):
        known = [told.get(stage.name, {}) for stage in stages]
        rows.append(["KL to the dense model", *(interval(x.get("kl")) for x in known)])
        rows.append(["same most likely token", *(interval(x.get("same_top1")) for x in known)])
    return rows


def _tiles(record: RunRecord) -> list[tuple[str, str, str]]:
    dense, last = record.stages[0], record.stages[-1]
    told = [
        ("Parameters", count(last.parameters), _change(last.parameters, dense.parameters)),
        ("On disk", f"{last.size_bytes / 1e6:,.0f} MB", _change(last.size_bytes, dense.size_bytes)),
    ]
    if sparsified(record):
        told.append(("Zeros", f"{100 * last.linear_sparsity:.1f} %", "of the decoder weights"))
    told.append(("Perplexity", decimal(last.perplexity), f"dense {decimal(dense.perplexity)}"))
    if tasks_of(dense) and tasks_of(last):
        mean, before = mean_of_tasks(last), mean_of_tasks(dense)
        told.append(("Tasks, mean", f"{mean:.3f}", f"dense {before:.3f}"))
    top = middle(divergences([last]).get(last.name, {}).get("same_top1"))
    if math.isfinite(top):
        told.append(("Same next token", f"{100 * top:.1f} %", "as the dense model"))
    speeds = [
        speed for speed in speeds_of(last) if not speed[0][-1:].isdigit() or speed[0].endswith(" 1")
    ]
    for what, median, low, high in speeds:
        tie = low <= 1 <= high
        value = "as dense" if tie else f"{median:.2f} \u00d7"
        note = "no difference beyond noise" if tie else f"{low:.2f} to {high:.2f}"
        told.append((f"{what.partition(',')[0].capitalize()} speed", value, note))
    return told


def _change(value: float, base: float) -> str:
    share = round(100 * (value / base - 1), 1) + 0.0 if base else math.nan
    return "as dense" if share == 0 else f"{share:+.1f} %"


def _origin_section(record: RunRecord) -> Section:
    """Return where the figures come from, and how the result is loaded."""
    origin: dict[str, Any] = {
        "date": record.date,
        "command": record.command,
        "seed": "" if record.seed is None else record.seed,
        "device": record.device,
        "dtype": record.dtype,
        **{name: value for name, value in record.machine.items()},
        **{f"{role} data": source for role, source in record.data.items()},
        **{f"evaluation {k}".replace("_", " "): v for k, v in record.evaluation.items()},
        **{f"{name} version": version for name, version in record.versions.items()},
        "fingerprint of the base": record.fingerprint,
        "fingerprint of the dense model": next(
            (plan.model["fingerprint"] for plan in plans_of(record) if "fingerprint" in plan.model),
            "",
        ),
    }
    parts: list[Markup | str] = [facts({k: v for k, v in origin.items() if v not in ("", None)})]
    if record.verification:
        parts += [heading("How what was saved was verified"), facts(record.verification)]
        name = json.dumps([*record.verification][-1])
        own = any(plan.has_own_class for plan in plans_of(record))
        lines = [
            *(["import prunelight  # its class"] if own else []),
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"model = AutoModelForCausalLM.from_pretrained({name})",
            f"tokenizer = AutoTokenizer.from_pretrained({name})",
        ]
        parts += [heading("How to load the result"), code("\n".join(lines))]
    return Section("Where this comes from", parts)
