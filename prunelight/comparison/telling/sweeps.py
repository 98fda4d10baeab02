"""Curves over an argument that a contest sweeps: one chart a text, one curve an amount."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from markupsafe import Markup

from prunelight.comparison.methods import swept
from prunelight.comparison.telling.summary import Row, Summary
from prunelight.comparison.telling.table import AMOUNT_OF
from prunelight.evaluation.report.page.charts import scatter
from prunelight.evaluation.report.page.frame import figure

LEAD_OF_SWEEPS = "Lower is better. A curve is one amount; each point is a model."


def sweep_charts(summary: Summary) -> list[Markup]:
    """Return a chart for each sweep of numbers and each text; none without a sweep."""
    parts = []
    for name, rows in _sweeps(summary):
        for text in rows[0].perplexity:
            points: dict[str, list[tuple[float, float]]] = {}
            for row in sorted(rows, key=lambda row: row.arguments[name]):
                after = ", recovered" if row.recovered else ""
                amount = "" if row.asked is None else f"{row.asked:.3g} {AMOUNT_OF[row.group]}"
                point = (row.arguments[name], row.perplexity[text][0])
                points.setdefault(f"{amount}{after}", []).append(point)
            dense = summary.dense
            chart = scatter(
                points,
                alt=f"Perplexity on {text} against {name}",
                x_label=name,
                y_label=f"perplexity, {text}",
                levels={"dense": dense.perplexity[text][0]} if dense.measured else {},
                as_curve=True,
                wide=True,
            )
            parts.append(figure(chart, f"Perplexity on {text} against {name}", wide=True))
    return parts


def _sweeps(summary: Summary) -> Iterator[tuple[str, list[Row]]]:
    """Yield the argument of each sweep of at least two numbers, and its measured rows."""
    for entry in summary.settings.methods:
        entry_of: Any = entry
        labels = [each["label"] for each in swept(entry_of)] if "sweep" in entry_of else []
        name = next(iter(entry_of["sweep"])) if labels else ""
        rows = [row for row in summary.rows[1:] if row.measured and row.label in labels]
        numbers = {row.arguments[name] for row in rows}
        if len(numbers) > 1 and all(type(number) in (int, float) for number in numbers):
            yield name, rows
