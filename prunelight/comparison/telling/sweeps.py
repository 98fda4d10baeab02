"""Curves over an argument that a contest sweeps: one chart a text, one curve an amount."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from markupsafe import Markup

from prunelight.comparison.methods import base_label, swept
from prunelight.comparison.telling.summary import Row, Summary
from prunelight.comparison.telling.table import AMOUNT_OF
from prunelight.evaluation.report.page.charts import scatter
from prunelight.evaluation.report.page.frame import figure

LEAD_OF_SWEEPS = "A curve is one amount, or one method; each point is a model."

Points = dict[str, list[tuple[float, float]]]


def sweep_charts(summary: Summary) -> list[Markup]:
    """Return a chart for each sweep of numbers and each text; none without a sweep.

    Where the swept argument says how much goes, a further chart shows the amounts.
    """
    parts = []
    for name, rows in _sweeps(summary):
        if summary.settings.amounts is None:
            amounts: Points = {}
            for value, row in rows:
                amounts.setdefault(_curve(row), []).append((value, 100 * row.amount))
            parts.append(_chart(amounts, name, "Share removed (%)", {}))
        for text in rows[0][1].perplexity:
            points: Points = {}
            for value, row in rows:
                points.setdefault(_curve(row), []).append((value, row.perplexity[text][0]))
            dense = summary.dense
            levels = {"dense": dense.perplexity[text][0]} if dense.measured else {}
            parts.append(_chart(points, name, f"Perplexity on {text}", levels))
    return parts


def curve_of_label(summary: Summary) -> dict[str, str]:
    """Return label of a row -> name of the curve that its sweep is, for rows of sweeps."""
    entries: list[Any] = [entry for entry in summary.settings.methods if "sweep" in entry]
    return {each["label"]: base_label(entry) for entry in entries for each in swept(entry)}


def _chart(points: Points, x_label: str, y_label: str, levels: dict[str, float]) -> Markup:
    told = f"{y_label} against {x_label}"
    chart = scatter(
        points,
        alt=told,
        x_label=x_label,
        y_label=y_label,
        levels=levels,
        as_curve=True,
        wide=True,
    )
    return figure(chart, told, wide=True)


def _curve(row: Row) -> str:
    amount = "own amount" if row.asked is None else f"{row.asked:.3g} {AMOUNT_OF[row.group]}"
    return f"{amount}, recovered" if row.recovered else amount


def _sweeps(summary: Summary) -> Iterator[tuple[str, list[tuple[float, Row]]]]:
    """Yield the name of each sweep of at least two numbers, and its measured rows by number.

    Of a series of methods, the number is the share of the first one.
    """
    for entry in summary.settings.methods:
        entry_of: Any = entry
        if "sweep" not in entry_of:
            continue
        ((name, values),) = entry_of["sweep"].items()
        if "callbacks" in entry_of:
            first = entry_of["callbacks"][0]
            first = first if isinstance(first, str) else first["class_path"]
            name = f"share of what goes by {first.rpartition('.')[2]}"
            values = [share[0] for share in values]
        labels = [each["label"] for each in swept(entry_of)]
        value_of = dict(zip(labels, values, strict=True))
        if not all(type(value) in (int, float) for value in values):
            continue
        rows = [row for row in summary.rows[1:] if row.measured and row.label in value_of]
        numbered = sorted(((value_of[row.label], row) for row in rows), key=lambda pair: pair[0])
        if len({value for value, _ in numbered}) > 1:
            yield name, numbered
