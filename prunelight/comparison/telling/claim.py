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
    found = []
    for (_, asked, recovered), rows in summary.contests().items():
        pair = [_row_of(rows, label) for label in (claim.method, claim.against)]
        if asked is None or pair[0] is None or pair[1] is None:
            continue
        for one, other in zip(pair[0].seeds, pair[1].seeds, strict=True):
            ratio = math.exp(_mean_log(one) - _mean_log(other))
            forwards = one.prune_forwards
            fast = claim.forwards is None or forwards is None or forwards <= claim.forwards
            holds = ratio <= 1 + claim.loss and fast
            found.append(Judged(asked, recovered, one.seed, ratio, forwards, holds))
    return found


def claim_holds(summary: Summary) -> bool:
    """Return whether the claim holds at all amounts with all seeds; True without a claim."""
    claim = summary.settings.claim
    if claim is None:
        return True
    rows = [row for row in summary.rows if row.label in (claim.method, claim.against)]
    found = judged(summary)
    return bool(found) and all(row.measured for row in rows) and all(one.holds for one in found)


def sentence(summary: Summary) -> str:
    """Return whether the claim holds, in a sentence; "" without one."""
    claim, found = summary.settings.claim, judged(summary)
    if claim is None:
        return ""
    bound = f"{claim.method} has at most {1 + claim.loss:.4g} times the perplexity of "
    bound += claim.against
    if claim.forwards is not None:
        bound += f", within {claim.forwards:g} F"
    if not found:
        return f"The claim that {bound} is not judged: it has no pair of results."
    most = max(found, key=lambda one: one.ratio)
    slowest = max((one.forwards for one in found if one.forwards is not None), default=None)
    told = f"at most {most.ratio:.3f} times"
    told += "" if slowest is None else f" and {slowest:.1f} F"
    pairs = "1 pair" if len(found) == 1 else f"{len(found)} pairs"
    told += f" over {pairs} of amount and seed"
    if all(one.holds for one in found):
        whole = claim_holds(summary)
        return f"The claim holds{'' if whole else ' so far'}: {bound}: {told}."
    failed = [f"{one.asked:.3g} with seed {one.seed}" for one in found if not one.holds]
    return f"The claim does not hold: {bound}, fails at {', '.join(failed)}: {told}."


def table_of(found: Sequence[Judged]) -> list[list[str]]:
    """Return the cells of a table, below `HEAD`."""
    return [
        [
            f"{one.asked:.3g}{', recovered' if one.recovered else ''}",
            str(one.seed),
            f"{one.ratio:.4f}",
            "" if one.forwards is None else f"{one.forwards:.1f}",
            "holds" if one.holds else "does not hold",
        ]
        for one in found
    ]


def _row_of(rows: Sequence[Row], label: str) -> Row | None:
    return next((row for row in rows if row.label == label and row.measured), None)


def _mean_log(one: OfSeed) -> float:
    return fmean(math.log(value) for value in one.perplexity.values())
