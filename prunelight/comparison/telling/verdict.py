"""The verdict of a comparison, in sentences for someone who sees it for the first time."""

from __future__ import annotations

import math
from collections.abc import Sequence

from prunelight.comparison.telling.additivity import sentence
from prunelight.comparison.telling.claim import sentence as sentence_on_claim
from prunelight.comparison.telling.summary import Row, Summary, mean_log_perplexity

_POOR = 2.0  # times the dense perplexity, above which a model is of no use as it is


def verdict(summary: Summary) -> list[str]:
    """Return what to conclude, the most important sentence first."""
    searched = summary.settings.quality_target is not None
    sentences = [claim] if (claim := sentence_on_claim(summary)) else []
    for (group, asked, recovered), rows in summary.contests().items():
        measured = [row for row in rows if row.measured]
        if not measured:
            continue
        if summary.settings.amounts is None:
            sentences.append(_at_own_amounts(group, measured, recovered))
        elif searched:
            sentences.append(_reached(summary, group, measured, recovered))
        else:
            assert asked is not None
            sentences += _of_contest(summary, group, asked, recovered, measured)
    if any(row.group == "zeros" and row.measured for row in summary.rows[1:]):
        sentences.append(
            "Zeros are a group of their own: the weights are stored as before, so that a model "
            "with zeros is as large and as fast as the dense one unless a special kernel reads it."
        )
    if adding := sentence(summary.additivity):
        sentences.append(adding)
    sentences += _failures(summary)
    if summary.num_missing:
        sentences.insert(
            0,
            f"This comparison is not finished: {summary.num_missing} of {len(summary.rows)} rows "
            "are missing. Start the same command again.",
        )
    return sentences


def _of_contest(
    summary: Summary, group: str, asked: float, recovered: bool, rows: Sequence[Row]
) -> list[str]:
    same_time = summary.settings.equal == "latency"
    what = f"{asked:.0%} zeros" if group == "zeros" else f"{asked:.0%} fewer parameters"
    if group == "ratio":
        what = f"a ratio of {asked:.0%}"
    what = f"{asked:.0%} less time of a generation" if same_time else what
    after = " after recovery" if recovered else ""
    best = next(row for row in rows if row.on_text and row.on_text.best)
    figures = " and ".join(f"{x[0]:.1f} on {text}" for text, x in best.perplexity.items())
    sentences = [f"At {what}{after}, {best.label} keeps text best: perplexity {figures}"]
    if summary.dense.measured:
        dense = " and ".join(f"{x[0]:.1f}" for x in summary.dense.perplexity.values())
        sentences[0] += f" (dense: {dense})"
    if len(rows) > 1:
        ties = _ties([row.label for row in rows if row.on_text and row.on_text.ties])
        sentences[0] += f"; {ties}"
    sentences[0] += "."
    for text in best.perplexity:
        first_on_it = min(rows, key=lambda row: row.perplexity[text][0])
        value = first_on_it.perplexity[text][0]
        if value < best.perplexity[text][0]:
            sentences.append(
                f"On {text} alone {first_on_it.label} is best ({value:.1f}); the mean over the "
                "texts decides."
            )
    sentences += [
        f"{row.label} and {row.same_as} have the same figures on every window: both made the same "
        "model."
        for row in rows
        if row.same_as
    ]
    first = next((row for row in rows if row.on_tasks and row.on_tasks.best), None)
    if first is not None and len(rows) > 1:
        dense_mean = summary.dense.mean_accuracy
        beside = f" (dense: {dense_mean:.1%})" if dense_mean is not None else ""
        ties = _ties([row.label for row in rows if row.on_tasks and row.on_tasks.ties])
        where = "also best on" if first is best else "best on"
        sentences.append(
            f"{first.label} is {where} the tasks, with a mean accuracy of "
            f"{first.mean_accuracy:.1%}{beside}; {ties}."
        )
    factors = sorted(row.latency[0] for row in rows if row.latency)
    shares = sorted(row.share_removed for row in rows)
    if factors:
        sentences.append(
            f"Generations take {factors[0]:.2f} to {factors[-1]:.2f} times as long as with the "
            f"dense model; for it {shares[0]:.1%} to {shares[-1]:.1%} of the parameters go."
        )
    elif group != "zeros" and shares[-1] - shares[0] > 0.005:
        sentences.append(
            f"Layers and widths come in whole numbers: the true shares removed go from "
            f"{shares[0]:.1%} to {shares[-1]:.1%}."
        )
    if summary.dense.measured and not recovered:
        ratio = math.exp(mean_log_perplexity(best) - mean_log_perplexity(summary.dense))
        if ratio > _POOR:
            sentences.append(
                f"Even the best one has {ratio:.1f} times the dense perplexity: plan for a "
                "recovery, or remove less."
            )
    return sentences


def _at_own_amounts(group: str, rows: Sequence[Row], recovered: bool) -> str:
    """Say how far the rows go, and which of them no other one beats in size and in quality."""
    what = "zeros or gone in the decoder" if group == "zeros" else "of the parameters gone"
    least, most = (take(rows, key=lambda row: row.amount) for take in (min, max))
    ends = " to ".join(
        f"{row.label} ({row.amount:.1%} {what}, perplexity "
        f"{math.exp(mean_log_perplexity(row)):.1f})"
        for row in ((least, most) if least is not most else (least,))
    )
    after = ", then recovered" if recovered else ""
    told = f"Each row is at its own amount{after}: {ends}."
    front = [row.label for row in sorted(rows, key=lambda row: row.amount) if row.on_front]
    if len(rows) > 1:
        told += f" No other row removes as much and is as good as {' or '.join(front)}."
    return told


def _reached(summary: Summary, group: str, rows: Sequence[Row], recovered: bool) -> str:
    target = summary.settings.quality_target
    assert target is not None
    name, limit = target
    rule = (
        f"KL to the dense model at most {limit:g}"
        if name == "max_kld"
        else (f"at least {limit:.1%} of the most likely tokens kept")
    )

    def share(row: Row) -> float:
        return row.zeros if group == "zeros" else row.share_removed

    best = max(rows, key=share)
    what = "zeros in the decoder" if group == "zeros" else "of the parameters"
    others = ", ".join(
        f"{row.label} {share(row):.1%}"
        for row in sorted(rows, key=share, reverse=True)
        if row is not best
    )
    after = " (then recovered)" if recovered else ""
    told = f"With {rule}, {best.label} goes furthest: {share(best):.1%} {what}{after}"
    return f"{told}; then {others}." if others else f"{told}."


def _ties(labels: Sequence[str]) -> str:
    if not labels:
        return "no other method ties with it"
    names = " and ".join(filter(None, [", ".join(labels[:-1]), labels[-1]]))
    return f"{names} {'ties' if len(labels) == 1 else 'tie'} with it"


def _failures(summary: Summary) -> list[str]:
    searched = summary.settings.quality_target is not None
    without = "has no result" if searched else "did not take part"
    failed: dict[str, list[str]] = {}
    for row in summary.rows[1:]:
        if row.failed:
            failed.setdefault(row.failed, []).append(row.label)
    return [
        f"{', '.join(dict.fromkeys(labels))} {without}: {reason.rstrip('.')}."
        for reason, labels in failed.items()
    ]
