"""Whether a contest confirms its claim: a method is never much worse than another one.

Contests rank means over the seeds. A claim is judged at each amount with each seed, since a mean
can hide the seed that fails.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from prunelight.comparison.telling.summary import OfSeed, Row, Summary

TITLE = "Does the claim hold?"
HEAD = ["amount", "seed", "perplexity, times the other's", "time (F)", ""]
LEAD = "At each amount with each seed: the mean of ln perplexity over the texts decides."


@dataclass(frozen=True)
class Judged:
    """A claim at one amount with one seed.

    Attributes:
        asked: amount.
        recovered: the models were trained after the pruning.
        seed: of the calibration windows.
        ratio: perplexity of the method, times that of the other one.
        forwards: time of the method, in F; None where it is not known.
        holds: both are within the claim.
    """

    asked: float
    recovered: bool
    seed: int
    ratio: float
    forwards: float | None
    holds: bool


def judged(summary: Summary) -> list[Judged]:
    """Return the claim at each amount with each seed that is measured; none without a claim."""
    claim = summary.settings.claim
    if claim is None:
        return []
    pairs = []
    for (_, asked, recovered), rows in summary.contests().items():
        rows_of_pair = [_row_of(rows, label) for label in (claim.method, claim.against)]
        if asked is None or rows_of_pair[0] is None or rows_of_pair[1] is None:
            continue
        for one, other in zip(rows_of_pair[0].seeds, rows_of_pair[1].seeds, strict=True):
            ratio = math.exp(_mean_log(one) - _mean_log(other))
            forwards = one.prune_forwards
            fast = claim.forwards is None or forwards is None or forwards <= claim.forwards
            holds = ratio <= 1 + claim.loss and fast
            pairs.append(Judged(asked, recovered, one.seed, ratio, forwards, holds))
    return pairs


def claim_holds(summary: Summary) -> bool:
    """Return whether the claim holds at all amounts with all seeds; True without a claim."""
    claim = summary.settings.claim
    if claim is None:
        return True
    rows = [row for row in summary.rows if row.label in (claim.method, claim.against)]
    pairs = judged(summary)
    return bool(pairs) and all(row.measured for row in rows) and all(one.holds for one in pairs)


def sentence(summary: Summary) -> str:
    """Return whether the claim holds, in a sentence; "" without one."""
    claim, pairs = summary.settings.claim, judged(summary)
    if claim is None:
        return ""
    bound = f"{claim.method} has at most {1 + claim.loss:.4g} times the perplexity of "
    bound += claim.against
    if claim.forwards is not None:
        bound += f", within {claim.forwards:g} F"
    if not pairs:
        return f"The claim that {bound} is not judged: it has no pair of results."
    most = max(pairs, key=lambda one: one.ratio)
    slowest = max((one.forwards for one in pairs if one.forwards is not None), default=None)
    measured = f"at most {most.ratio:.3f} times"
    measured += "" if slowest is None else f" and {slowest:.1f} F"
    number = "1 pair" if len(pairs) == 1 else f"{len(pairs)} pairs"
    measured += f" over {number} of amount and seed"
    if all(one.holds for one in pairs):
        whole = claim_holds(summary)
        return f"The claim holds{'' if whole else ' so far'}: {bound}: {measured}."
    failed = [f"{one.asked:.3g} with seed {one.seed}" for one in pairs if not one.holds]
    return f"The claim does not hold: {bound}, fails at {', '.join(failed)}: {measured}."


def table_of(pairs: Sequence[Judged]) -> list[list[str]]:
    """Return the cells of a table, below `HEAD`."""
    return [
        [
            f"{one.asked:.3g}{', recovered' if one.recovered else ''}",
            str(one.seed),
            f"{one.ratio:.4f}",
            "" if one.forwards is None else f"{one.forwards:.1f}",
            "holds" if one.holds else "does not hold",
        ]
        for one in pairs
    ]


def _row_of(rows: Sequence[Row], label: str) -> Row | None:
    return next((row for row in rows if row.label == label and row.measured), None)


def _mean_log(one: OfSeed) -> float:
    return fmean(math.log(value) for value in one.perplexity.values())
