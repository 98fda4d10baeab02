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
    columns = ["method", "removed", "zeros", *texts, "KL", "same top-1"]
    for name in tasks:
        columns += [name, "flips"]
    return [*columns, "time (F)", "text", *(["tasks"] if tasks else [])]


def lines(summary: Summary) -> list[tuple[str, list[list[str]]]]:
    """Return (title of a part, its rows); the dense model is the first part."""
    parts = [("", [_line(summary, summary.dense)])]
    for (group, asked, recovered), rows in summary.contests().items():
        if asked is None:
            title = "as far as the limit allows"
        else:
            title = f"{asked:.3g} {'zeros' if group == 'zeros' else 'of the parameters removed'}"
        title += ", recovered" if recovered else ""
        ordered = sorted(rows, key=_order)
        parts.append((title, [_line(summary, row) for row in ordered]))
    return parts


def _order(row: Row) -> tuple[bool, float]:
    """Best on text first, failures last."""
    value = row.on_text.value if row.on_text else -row.share_removed
    return not row.measured, value


def _line(summary: Summary, row: Row) -> list[str]:
    width = len(head(summary))
    if not row.measured:
        told = "not run yet" if row.missing else row.failed
        return [row.label, told, *[""] * (width - 2)]
    texts = [interval(row.perplexity[name]) for name in summary.settings.data.texts]
    kl = "" if row.kl is None else interval(row.kl, 3)
    same = "" if row.same_top1 is None else interval(row.same_top1, 3)
    cells = [row.label, f"{row.share_removed:.1%}", f"{row.zeros:.1%}", *texts, kl, same]
    for name in head(summary)[len(cells) : -3 : 2] if row.tasks else ():
        value, error = row.tasks[name]
        cells.append(f"{value:.3f}" + ("" if error is None else f" ± {error:.3f}"))
        flips = row.flips.get(name)
        told = row.label != "dense" and flips is not None
        cells.append(f"-{flips[0]:.0f} +{flips[1]:.0f}" if told and flips else "")
    if not row.tasks:
        cells += [""] * (width - len(cells) - 2)
    cells.append("" if row.prune_forwards is None else f"{row.prune_forwards:.1f}")
    cells.append(place(row.on_text))
    if summary.dense.tasks or summary.settings.tasks:
        cells.append(place(row.on_tasks))
    return cells[:width]


def interval(values: Sequence[float], digits: int = 2) -> str:
    """Return a value with its interval."""
    value, low, high = values
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def place(paired: Paired | None) -> str:
    """Return "best", "tie", or "" for a place in a contest."""
    if paired is None:
        return ""
    return "best" if paired.best else "tie" if paired.ties else ""
