"""The table of a comparison: cells of text, for the console, Markdown and the page alike."""

from __future__ import annotations

from collections.abc import Sequence

from prunelight.comparison.statistics import Paired
from prunelight.comparison.telling.summary import Row, Summary


def head(summary: Summary) -> list[str]:
    """Return the names of the columns."""
    dense = summary.dense
    texts = [f"perplexity {name}" for name in summary.settings.data.texts]
    tasks = [*summary.settings.tasks] if not dense.tasks else [*dense.tasks]
    latency = ["latency"] if summary.settings.equal == "latency" else []
    places = ["on text", *(["on tasks"] if tasks else [])]
    columns = ["method", *places, "removed", "zeros", *latency, *texts, "KL", "same top-1"]
    for name in tasks:
        columns += [name, f"flips {name}"]
    return [*columns, "time (F)"]


def short_head(summary: Summary) -> list[str]:
    """Return the columns that fit a terminal."""
    return [name for name in head(summary) if not name.startswith("flips ")]


AMOUNT_OF = {  # group of rows -> what an amount is a share of
    "zeros": "zeros",
    "ratio": "of the layers, of the hidden width or of the neurons removed",
    "parameters": "of the parameters removed",
}


def lines(summary: Summary, *, intervals: bool = True) -> list[tuple[str, list[list[str]]]]:
    """Return (title of a part, its rows); the dense model is the first part.

    Args:
        summary: of the comparison.
        intervals: give those of perplexity and divergence, and the flips.
    """
    parts = [("", [_line(summary, summary.dense, intervals)])]
    for (group, asked, recovered), rows in summary.contests().items():
        if summary.settings.amounts is None:
            title = "each at its own amount" + (", zeros" if group == "zeros" else "")
        elif asked is None:
            title = "as far as the limit allows"
        elif summary.settings.equal == "latency":
            title = f"{asked:.3g} of the time of a generation saved"
        else:
            title = f"{asked:.3g} {AMOUNT_OF[group]}"
        title += ", recovered" if recovered else ""
        ordered = rows if summary.settings.amounts is None else sorted(rows, key=_order)
        parts.append((title, [_line(summary, row, intervals) for row in ordered]))
    return parts


def _order(row: Row) -> tuple[bool, float]:
    """Best on text first, failures last."""
    value = row.on_text.value if row.on_text else -row.share_removed
    return not row.measured, value


def _line(summary: Summary, row: Row, intervals: bool) -> list[str]:
    columns = head(summary) if intervals else short_head(summary)
    if not row.measured:
        told = "not run yet" if row.missing else row.failed
        return [row.label, told, *[""] * (len(columns) - 2)]
    show = interval if intervals else value
    cells = {
        "method": row.label,
        "removed": f"{row.share_removed:.1%}",
        "zeros": f"{row.zeros:.1%}",
        "latency": "" if row.latency is None else show(row.latency),
        **{f"perplexity {name}": show(found) for name, found in row.perplexity.items()},
        "KL": "" if row.kl is None else show(row.kl, 3),
        "same top-1": "" if row.same_top1 is None else show(row.same_top1, 3),
        "time (F)": "" if row.prune_forwards is None else f"{row.prune_forwards:.1f}",
        "on text": place(row.on_text),
        "on tasks": place(row.on_tasks),
    }
    for name, (accuracy, error) in row.tasks.items():
        cells[name] = f"{accuracy:.3f}" + ("" if error is None else f" ± {error:.3f}")
    if row is not summary.dense:
        for name, (wrong, right) in row.flips.items():
            cells[f"flips {name}"] = f"-{wrong:.0f} +{right:.0f}"
    return [cells.get(name, "") for name in columns]


def value(values: Sequence[float], digits: int = 2) -> str:
    """Return a value without its interval."""
    return f"{values[0]:.{digits}f}"


def interval(values: Sequence[float], digits: int = 2) -> str:
    """Return a value with its interval."""
    value, low, high = values
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def place(paired: Paired | None) -> str:
    """Return "best", "tie", or "" for a place in a contest."""
    if paired is None:
        return ""
    return "best" if paired.best else "tie" if paired.ties else ""
