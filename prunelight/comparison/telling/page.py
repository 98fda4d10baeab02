"""The page of a comparison: one file to decide from, in the frame of a run's report."""

from __future__ import annotations

import json
import math
from functools import lru_cache
from typing import Any

from markupsafe import Markup

from prunelight.comparison.papers.beside import beside_published, note_on_published
from prunelight.comparison.statistics import Paired
from prunelight.comparison.telling.additivity import HEAD, TITLE, table_of
from prunelight.comparison.telling.additivity import HOW_TO_READ as _HARMS
from prunelight.comparison.telling.claim import HEAD as HEAD_OF_CLAIM
from prunelight.comparison.telling.claim import LEAD as LEAD_OF_CLAIM
from prunelight.comparison.telling.claim import TITLE as TITLE_OF_CLAIM
from prunelight.comparison.telling.claim import judged
from prunelight.comparison.telling.claim import table_of as table_of_claim
from prunelight.comparison.telling.summary import Row, Summary, mean_log_perplexity
from prunelight.comparison.telling.sweeps import LEAD_OF_SWEEPS, curve_of_label, sweep_charts
from prunelight.comparison.telling.table import head, interval, lines, place
from prunelight.comparison.telling.writing import HOW_TO_READ, LATENCY_NOTE
from prunelight.evaluation.report.page.charts import bar_chart, heat_map, scatter
from prunelight.evaluation.report.page.decisions import score_figures
from prunelight.evaluation.report.page.frame import (
    Section,
    details,
    facts,
    figure,
    figures,
    heading,
    paragraph,
    render_page,
    table,
)
from prunelight.evaluation.report.plan_facts import PlanFacts

_LEAD_OF_DECISIONS = (
    "Layers are those of the dense model. Where methods agree, the choice is safe. Where they do "
    "not, look at their scores."
)


def page(summary: Summary, told: list[str]) -> str:
    """Return report.html of a comparison.

    Args:
        summary: of the comparison.
        told: its verdict.
    """
    model = summary.facts["model"]
    sections = [
        Section("All methods", _tables(summary), lead=HOW_TO_READ[2]),
        Section(
            "Size against quality",
            _fronts(summary),
            lead=(
                "Lower and further right is better. The grey line joins the best method of each "
                "amount, where no larger amount is as good. Thin lines join a method's amounts."
            ),
        ),
        Section(
            "Differences from the best",
            _differences(summary),
            lead=(
                "All methods of a part are compared on the same windows and the same questions. "
                "Where the interval of the difference holds 0, the method ties with the best."
            ),
        ),
        Section(TITLE, _additivity(summary), lead=_HARMS if summary.additivity else ""),
        Section("What the swept argument does", sweep_charts(summary), lead=LEAD_OF_SWEEPS),
        Section(TITLE_OF_CLAIM, _claim(summary), lead=LEAD_OF_CLAIM),
        Section("Tasks", _tasks(summary)),
        Section("Which layers go", _decisions(summary), lead=_LEAD_OF_DECISIONS),
        Section("What the paper published", _published(summary), lead=note_on_published(summary)),
        Section("How it was measured", _measured(summary)),
    ]
    return render_page(
        f"Which method keeps {model['name']} best?",
        told,
        sections,
        kicker="prunelight compare",
    )


def _tables(summary: Summary) -> list[Markup]:
    parts: list[Markup] = []
    columns = head(summary)
    (_, dense), *others = lines(summary)
    for title, rows in others:
        marked = [i + 1 for i, row in enumerate(rows) if "best" in row[1:3]]
        together = [*dense, *rows]
        told = [i for i, cells in enumerate(zip(*together, strict=True)) if {*cells} - {"", "0.0%"}]
        of_part = [[row[i] for i in told] for row in together]
        parts += [heading(title), table([columns[i] for i in told], of_part, marked=marked)]
    notes = [*HOW_TO_READ[:2], *([LATENCY_NOTE] if summary.settings.equal == "latency" else [])]
    parts += [paragraph(text, "note") for text in notes]
    return parts


def _fronts(summary: Summary) -> list[Markup]:
    """One chart for methods that remove parameters, one for those that put zeros."""
    parts = []
    names = {
        "parameters": "share of all parameters removed (%)",
        "ratio": "share of all parameters removed (%)",
        "zeros": "share of the decoder layers' weights that are zero or gone (%)",
        "own": "share of all parameters removed (%)",
    }
    own_amounts = summary.settings.amounts is None
    curves = curve_of_label(summary) if own_amounts else {}
    for group, label in names.items():
        for recovered in (False, True):
            rows = [
                row
                for row in summary.rows[1:]
                if row.measured and (row.group, row.recovered) == (group, recovered)
            ]
            if len(rows) < 2:
                continue
            points: dict[str, list[tuple[float, float]]] = {}
            for row in sorted(rows, key=_point) if own_amounts else rows:
                points.setdefault(curves.get(row.label, row.label), []).append(_point(row))
            levels = {}
            if summary.dense.measured:
                levels["dense"] = math.exp(mean_log_perplexity(summary.dense))
            best = ", ".join(row.label for row in rows if row.on_front)
            chart = scatter(
                points,
                alt=f"Perplexity against {label}; best of its amount: {best}",
                x_label=label,
                y_label="perplexity, mean over the texts",
                front=[_point(row) for row in rows if row.on_front],
                levels=levels,
                least_width=5.0,
                as_curve=own_amounts or len({row.asked for row in rows}) > 2,
                wide=True,
            )
            caption = f"{'Recovered' if recovered else 'Pruned'} models; best of its amount: {best}"
            parts.append(figure(chart, caption, wide=True))
    return parts


def _point(row: Row) -> tuple[float, float]:
    return 100 * row.amount, math.exp(mean_log_perplexity(row))


def _differences(summary: Summary) -> list[Markup]:
    parts: list[Markup] = []
    columns = ["method", "perplexity, times the best", "", "mean accuracy, less the best", ""]
    titles = [title for title, _ in lines(summary)[1:]]
    for title, rows in zip(titles, summary.contests().values(), strict=True):
        ranked = sorted(
            (row for row in rows if row.on_text is not None),
            key=lambda row: row.on_text.value if row.on_text else 0.0,
        )
        cells = [
            [
                row.label,
                _ratio(row.on_text),
                place(row.on_text),
                _less(row.on_tasks),
                place(row.on_tasks),
            ]
            for row in ranked
        ]
        if len(cells) > 1:
            parts += [heading(title), table(columns, cells)]
    return parts


def _additivity(summary: Summary) -> list[Markup]:
    return [table(HEAD, table_of(summary.additivity))] if summary.additivity else []


def _claim(summary: Summary) -> list[Markup]:
    rows = judged(summary)
    return [table(HEAD_OF_CLAIM, table_of_claim(rows))] if rows else []


def _ratio(paired: Paired | None) -> str:
    if paired is None:
        return ""
    differences = (paired.difference, paired.difference_low, paired.difference_high)
    return interval([math.exp(x) for x in differences], 3)


def _less(paired: Paired | None) -> str:
    if paired is None:
        return ""
    differences = (paired.difference, paired.difference_low, paired.difference_high)
    return interval([100 * x for x in differences], 1) + " points"


def _tasks(summary: Summary) -> list[Markup]:
    parts: list[Markup] = []
    titles = [title for title, _ in lines(summary)[1:]]
    for title, rows in zip(titles, summary.contests().values(), strict=True):
        measured = [row for row in (summary.dense, *rows) if row.measured and row.tasks]
        names = [*summary.dense.tasks]
        if len(measured) < 2 or not names:
            continue
        chart = bar_chart(
            {name: [row.tasks[name][0] for row in measured] for name in names},
            [row.label for row in measured],
            alt=f"Accuracy of each method on {', '.join(names)}: {title}",
            y_label="accuracy",
            errors={name: [row.tasks[name][1] for row in measured] for name in names},
            log=False,
            wide=True,
        )
        parts.append(figure(chart, f"{title}; bars of one standard error", wide=True))
    return parts


def _decisions(summary: Summary) -> list[Markup]:
    """What methods that remove layers remove; and the scores of each method."""
    pruned = [row for row in summary.rows if row.plan and not row.recovered]
    plans = [PlanFacts(row.plan) for row in pruned]
    gone = {
        row.name: plan.removed_layers
        for row, plan in zip(pruned, plans, strict=True)
        if plan.removed_layers
    }
    parts: list[Markup] = []
    if gone:
        layers = range(plans[0].num_layers)
        told = "; ".join(f"{name}: {', '.join(map(str, of))}" for name, of in gone.items())
        chart = heat_map(
            [[0.0 if layer in of else 1.0 for layer in layers] for of in gone.values()],
            alt=f"Removed decoder layers. {told}",
            x_label="decoder layer",
            bar_label="stays (1) or goes (0)",
            row_names=[*gone],
            limits=(0.0, 1.0),
            wide=True,
            height=0.9 + 0.22 * len(gone),
        )
        parts.append(figure(chart, "Dark layers go.", wide=True))
    most = {row.label: row for row in sorted(pruned, key=lambda row: row.asked or 0.0)}
    for row in most.values():
        charts = _drawn_scores(json.dumps(row.plan))
        if charts:
            parts.append(details(f"Scores of {row.name}", figures(charts)))
    return parts


@lru_cache(maxsize=256)
def _drawn_scores(plan: str) -> list[Markup]:
    """Return the charts of a plan's scores; a contest that goes on draws each once."""
    return score_figures(json.loads(plan))


def _published(summary: Summary) -> list[Markup]:
    parts: list[Markup] = []
    for one in beside_published(summary):
        parts += [paragraph(one.title, "note"), table(one.columns, one.rows)]
    return parts


def _measured(summary: Summary) -> list[Markup]:
    settings, data = summary.settings, summary.settings.data
    model = summary.facts["model"]
    seconds = summary.forward_seconds
    values: dict[str, Any] = {
        "model": f"{model['name']}, {model['parameters'] / 1e6:.1f}M parameters, {model['dtype']}",
        "fingerprint of the model": model["fingerprint"],
        "texts": summary.texts,
        "of each text": data.held_out,
        "calibration": summary.calibration,
        "tasks": ", ".join(settings.tasks) or "none",
        "questions of each task": "all"
        if settings.limit is None
        else f"the first {settings.limit}",
        "seeds": ", ".join(map(str, settings.seeds)),
        "recovery": "none" if settings.recovery is None else "see comparison.json",
        "device": summary.device,
        "F": "" if seconds is None else f"{seconds:.2f} s, one forward of the calibration windows",
        "date": summary.date,
        "command": summary.command or "from Python",
        **{f"version of {name}": x for name, x in summary.facts["versions"].items() if x},
    }
    arguments = [
        [
            row.label,
            row.contest[0],
            "" if row.asked is None else f"{row.asked:.3g}",
            "; then ".join([str(row.arguments), *(str(one["arguments"]) for one in row.then)]),
        ]
        for row in summary.rows[1:]
    ]
    columns = ["method", "amount is a share of", "asked", "arguments"]
    return [
        facts(values),
        details("The arguments of each method", table(columns, arguments, numbers=False)),
    ]
