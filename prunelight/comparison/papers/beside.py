"""Published figures beside those of a contest, row by row as in the paper."""

from __future__ import annotations

from dataclasses import dataclass

from prunelight.comparison.papers.published import PublishedTable, notes_of, published_tables
from prunelight.comparison.telling.summary import Row, Summary


@dataclass(frozen=True)
class Beside:
    """A table of a paper, with a column of this contest.

    Attributes:
        title: what was measured, where it was published, and by which protocol.
        columns: of the table; the second is of this contest.
        rows: of text; the first cell is the label of a method.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]


def beside_published(summary: Summary) -> list[Beside]:
    """Return the tables of the paper that the contest repeats; none, if it repeats none."""
    name = summary.settings.published
    return [] if name is None else [_beside(summary, table) for table in published_tables(name)]


def note_on_published(summary: Summary) -> str:
    """Return what is to be said of the published figures; "" without a paper."""
    name = summary.settings.published
    return "" if name is None else notes_of(name)


def _beside(summary: Summary, table: PublishedTable) -> Beside:
    model = summary.facts["model"]["name"]
    same = table.column_of(summary.settings.model.name)
    columns = [f"{name} (this model)" if name == same else name for name in table.models]
    rows = [
        [label, _here(summary, table, label), *map(_text, figures)]
        for label, figures in table.rows.items()
    ]
    title = (
        f"{table.title}. {table.source}. Protocol: {table.protocol}. "
        f"Here: {summary.settings.data.held_out}"
    )
    return Beside(title, ["method", f"here: {model}", *columns], rows)


def _here(summary: Summary, table: PublishedTable, label: str) -> str:
    """Return the figure of this contest for a row of the paper; "" without one."""
    for row in summary.rows:
        same_amount = row is summary.dense or (
            table.amount is not None
            and row.asked is not None
            and abs(row.asked - table.amount) < 1e-6
        )
        if row.label == label and same_amount and row.measured and not row.recovered:
            return _figure(row, table)
    return ""


def _figure(row: Row, table: PublishedTable) -> str:
    if table.measure == "perplexity":
        return _text(row.perplexity[table.text][0]) if table.text in row.perplexity else ""
    return "" if row.mean_accuracy is None else _text(100 * row.mean_accuracy)


def _text(figure: float | str | None) -> str:
    if figure is None:
        return ""
    return figure if isinstance(figure, str) else f"{figure:.2f}"
