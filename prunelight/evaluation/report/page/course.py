"""How the run went and what it costs: training curves, serving against the ideal, phases."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from prunelight.evaluation.report.examined import part, ratios_of, serving_grid
from prunelight.evaluation.report.figures import cost_rows
from prunelight.evaluation.report.page import charts
from prunelight.evaluation.report.page.frame import (
    Section,
    bullets,
    details,
    facts,
    figure,
    figures,
    paragraph,
    table,
)
from prunelight.evaluation.report.record import RunRecord


def training_section(record: RunRecord) -> Section:
    """Return the curves of the training and its settings; without parts if nothing was trained."""
    drawn: list[Markup] = []
    for name, label, words in (
        ("train_loss", "train loss", "Loss on the training text."),
        ("validation_perplexity", "validation perplexity", "Perplexity on held-out text."),
        ("learning_rate", "learning rate", "Learning rate of each step."),
    ):
        points = record.curves.get(name) or []
        if len(points) < (1 if name == "validation_perplexity" else 2):
            continue
        levels: dict[str, float] = {}
        if name == "validation_perplexity":
            stages = {stage.name: stage.perplexity for stage in record.stages}
            wanted = [stage for stage in ("dense", "pruned") if stage in stages]
            levels = {x: stages[x] for x in wanted if math.isfinite(stages[x])}
        values = [value for _, value in points]
        chart = charts.line_chart(
            {label: ([step for step, _ in points], values)},
            alt=f"{label} by optimizer step: {values[0]:.4g} at first, {values[-1]:.4g} at last",
            x_label="optimizer step",
            y_label=label,
            levels=levels,
            marks=len(points) <= 30,
            log=_is_wide([*values, *levels.values()]) if levels else None,
        )
        drawn.append(figure(chart, words))
    trained = record.recovery.get("mode") not in (None, "none")
    settings = {k.replace("_", " "): v for k, v in record.recovery.items() if v is not None}
    parts: list[Markup | str] = [figures(drawn)] if drawn else []
    if trained:
        parts.append(details("Settings of the recovery", facts(settings)))
    return Section("Training", parts)


def _is_wide(values: Sequence[float]) -> bool:
    """Whether a curve would be flat beside its levels on a linear scale."""
    finite = [value for value in values if math.isfinite(value)]
    return bool(finite) and min(finite) > 0 and max(finite) > 4 * min(finite)


def serving_section(record: RunRecord) -> Section:
    """Return what serving costs on this machine, beside what the shape promises."""
    stages = record.stages
    grid = serving_grid(stages)
    parts: list[Markup | str] = []
    found = [(stage.name, ratios_of(stage)) for stage in stages if ratios_of(stage)]
    for name, ratios in found[-1:]:
        chart = charts.bar_chart(
            {
                "measured": [ratio.median for ratio in ratios],
                "ideal": [ratio.ideal for ratio in ratios],
            },
            [ratio.what for ratio in ratios],
            alt=f"Speed of the {name} model against the dense one: "
            + "; ".join(f"{x.what}: {x.median:.3g} measured, {x.ideal:.3g} ideal" for x in ratios),
            y_label="times as fast as dense",
            errors={"measured": [(ratio.high - ratio.low) / 2 for ratio in ratios]},
            line=(1.0, "dense"),
            log=False,
        )
        words = (
            f"Speed of the {name} model against the dense one. Ideal: by multiply-adds for "
            "prefill, by bytes that memory delivers for decode. Whiskers: half the spread of the "
            "rounds."
        )
        parts.append(figure(chart, words))
    if grid is not None:
        parts.append(table(grid.head, grid.rows))
    last = part(stages[-1], "serving")
    notes = [str(text) for text in [*(last.get("verdicts") or []), *(last.get("notes") or [])]]
    if notes:
        parts.append(bullets(list(dict.fromkeys(notes))))
    return Section("Cost of serving", parts, "Measured in turn with the dense model.")


def loads_section(record: RunRecord) -> Section:
    """Return which programs read the result."""
    if not record.loads_in:
        return Section("Loads in", [])
    rows = []
    for engine, answer in record.loads_in.items():
        sign = "✓ yes" if answer == "yes" else "? " if answer.startswith("unknown") else "✗ no"
        rows.append([engine, sign, "" if answer == "yes" else answer])
    head = ["program", "reads it?", "why"]
    return Section("Loads in", [table(head, rows, numbers=False)])


def phase_section(record: RunRecord) -> Section:
    """Return where the time and the memory of the run went."""
    if not record.costs:
        return Section("Time and memory of the run", [])
    head = ["phase", "time", "in F", "peak memory", "in checkpoints", "in decoder layers"]
    unit = record.forward_seconds
    here = f" ({unit:.3g} s here)" if math.isfinite(unit) else ""
    note = (
        f"F is one forward of the calibration set through the dense model{here}. Peak memory is "
        "that of the whole process on a CPU, what torch allocated on CUDA."
    )
    large, every = cost_rows(record, least=0.01), cost_rows(record)
    parts: list[Markup | str] = [table(head, large)]
    if len(every) > len(large):
        parts.append(details("All phases", table(head, every)))
    parts.append(paragraph(note, "note"))
    return Section("Time and memory of the run", parts)
