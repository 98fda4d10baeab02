"""How good the stages of a run are, beyond perplexity: tasks, divergence, samples."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from prunelight.evaluation.report.examined import (
    asks,
    collapsed,
    divergence_grid,
    divergences,
    probe_grid,
    probe_names,
    probes_of,
    samples_beside,
    task_grid,
    task_names,
    tasks_of,
)
from prunelight.evaluation.report.page import charts
from prunelight.evaluation.report.page.frame import (
    Section,
    beside,
    figure,
    figures,
    heading,
    table,
)
from prunelight.evaluation.report.record import Stage

_MOST_PROMPTS = 12  # that are shown with what each stage says


def task_section(stages: Sequence[Stage]) -> Section:
    """Return the tasks with error bars and flips; without parts if no task was asked."""
    grid = task_grid(stages)
    if grid is None:
        return Section("Tasks", [])
    names, told = task_names(stages), [stage for stage in stages if tasks_of(stage)]
    values = {s.name: [tasks_of(s).get(n, {}).get("value") for n in names] for s in told}
    errors = {s.name: [tasks_of(s).get(n, {}).get("stderr") for n in names] for s in told}
    chart = charts.bar_chart(
        values,
        names,
        alt="Accuracy on each task: "
        + "; ".join(f"{row[0]}: {', '.join(row[1 : len(told) + 1])}" for row in grid.rows),
        y_label="accuracy",
        errors=errors,
        log=False,
        wide=len(names) * len(told) > 12,
    )
    words = "Bars: lm-eval's figure. Whiskers: one standard error."
    lead = (
        "Flips count questions whose answer changed between the dense and the last model: right to "
        "wrong / wrong to right. Many flips with equal accuracy mean another model, not the same."
    )
    drawn = figure(chart, words, wide=len(names) * len(told) > 12)
    return Section("Tasks", [drawn, table(grid.head, grid.rows)], lead)


def probe_section(stages: Sequence[Stage]) -> Section:
    """Return the collapse probes; without parts if none was asked."""
    grid = probe_grid(stages)
    if grid is None:
        return Section("Collapse probes", [])
    names, told = probe_names(stages), [stage for stage in stages if probes_of(stage)]
    scores = {s.name: [probes_of(s).get(n, {}).get("score") for n in names] for s in told}
    chart = charts.bar_chart(
        scores,
        [name.replace("_", " ") for name in names],
        alt="Share of right answers above chance: "
        + "; ".join(f"{row[0]}: {', '.join(row[1:])}" for row in grid.rows),
        y_label="right above chance",
        log=False,
        top=1.0,
        wide=True,
    )
    fallen = {asks(name) for name in collapsed(told[-1])}
    marked = [number for number, row in enumerate(grid.rows) if row[0] in fallen]
    lead = (
        "Cheap questions that show a collapse which perplexity hides. A probe counts where the "
        "dense model passes half of it; it has collapsed where the model loses half of that."
    )
    drawn = figure(chart, "Share of right answers above those of guessing.", wide=True)
    return Section("Collapse probes", [table(grid.head, grid.rows, marked=marked), drawn], lead)


def divergence_section(stages: Sequence[Stage]) -> Section:
    """Return how far predictions moved from the dense model's; without parts if not measured."""
    grid, told = divergence_grid(stages), divergences(stages)
    if grid is None:
        return Section("Divergence", [])
    drawn: list[Markup] = []
    lines = {name: _by_position(told[name].get("kl_by_position")) for name in told}
    if lines := {name: line for name, line in lines.items() if len(line[0]) > 1}:
        chart = charts.line_chart(
            lines,
            alt="Mean KL to the dense model by position in the window",
            x_label="position of the token",
            y_label="KL (nats)",
        )
        words = "A rise to the right: the model loses its hold on long texts."
        drawn.append(figure(chart, f"KL to the dense model by position. {words}"))
    long = {
        name: x["long_text"] for name, x in told.items() if isinstance(x.get("long_text"), dict)
    }
    lines = {name: _by_position(x.get("kl_by_position")) for name, x in long.items()}
    if lines := {name: line for name, line in lines.items() if len(line[0]) > 1}:
        chart = charts.line_chart(
            lines,
            alt="Mean KL to the dense model by position in one long text",
            x_label="position of the token",
            y_label="KL (nats)",
        )
        words = "The same in one long text, up to the context that the dense model reads."
        drawn.append(figure(chart, words))
    changes = {
        name: _percentiles(told[name].get("right_token_change_percentiles")) for name in told
    }
    if changes := {name: line for name, line in changes.items() if line[0]}:
        chart = charts.line_chart(
            changes,
            alt="Change of the right token's probability by percentile of the tokens",
            x_label="percentile of the tokens",
            y_label="change of probability",
            levels={"no change": 0.0},
            log=False,
        )
        words = "How much likelier the right token got, from the worst tokens to the best."
        drawn.append(figure(chart, words))
    parts = [table(grid.head, grid.rows), *([figures(drawn)] if drawn else [])]
    lead = (
        "How far the next-token distributions are from the dense model's on the same text. In "
        "brackets: 95 % intervals."
    )
    return Section("Divergence", parts, lead)


def _by_position(pairs: object) -> tuple[list[float], list[float]]:
    rows = [row for row in pairs if len(row) == 2] if isinstance(pairs, list) else []
    return [float(row[0]) for row in rows], [float(row[1]) for row in rows]


def _percentiles(values: object) -> tuple[list[float], list[float]]:
    known = values if isinstance(values, dict) else {}
    rows = sorted((float(k), float(v)) for k, v in known.items() if math.isfinite(float(v)))
    return [x for x, _ in rows], [y for _, y in rows]


def sample_section(stages: Sequence[Stage]) -> Section:
    """Return what the stages write, side by side; without parts if nothing was generated."""
    parts: list[Markup | str] = []
    prompts = samples_beside(stages)
    for prompt, texts in prompts[:_MOST_PROMPTS]:
        parts += [heading(f"“{prompt}”"), beside(texts)]
    if len(prompts) > _MOST_PROMPTS:
        parts.append(f"{len(prompts) - _MOST_PROMPTS} more prompts stand in report.json.")
    return Section("Samples", parts, "What each model goes on with after the same prompt.")
