"""What probes find of a model, and what counts as a collapse: plain data, no torch.

The thresholds stand in one table, `PROBES`. A probe counts only where the dense model passes half
of it: what it cannot do itself, pruning cannot take.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

# Perplexity says that all is well up to this multiple of the dense model's.
WELL = 1.5
# The dense model passes half of a probe that counts.
COUNTS_FROM = 0.5
# Below so many questions a score says nothing.
FEWEST_QUESTIONS = 12
COLLAPSED = "collapsed"  # a verdict


@dataclass(frozen=True)
class Probe:
    """One row of the table of probes.

    Attributes:
        asks: what it asks, in words for a report.
        chance: share of right answers of a model that guesses.
        kept: share of the dense model's score below which a model has collapsed.
    """

    asks: str
    chance: float
    kept: float


PROBES = {
    "sums_1_digit": Probe("adds two numbers of one digit", 0.0, 0.5),
    "sums_2_digits": Probe("adds two numbers of two digits", 0.0, 0.5),
    "sums_3_digits": Probe("adds two numbers of three digits", 0.0, 0.5),
    "counting": Probe("continues a run of numbers", 0.0, 0.5),
    "brackets": Probe("closes the bracket that was opened last", 1 / 3, 0.5),
    "quotes": Probe("closes a quote as it was opened", 1 / 2, 0.5),
    "copying": Probe("repeats a list of random words", 0.0, 0.6),
    "new_trigrams": Probe("generates text that does not repeat itself", 0.0, 0.6),
    "length": Probe("generates text that does not end at once", 0.0, 0.5),
}


@dataclass(frozen=True)
class ProbeResult:
    """What one probe found of a model.

    Attributes:
        right: right answers; for generated text what is new, or was generated at all.
        total: answers that were asked for.
        chance: share of right answers of a model that guesses.
        note: why the probe could not be asked; "" where it was.
    """

    right: int
    total: int
    chance: float = 0.0
    note: str = ""

    @property
    def score(self) -> float | None:
        """Share of right answers above chance, in [0, 1]; None where it could not be asked."""
        if self.note or not self.total:
            return None
        return max(0.0, (self.right / self.total - self.chance) / (1 - self.chance))


def verdict(name: str, dense: ProbeResult, other: ProbeResult) -> str:
    """Return "kept", "collapsed", "not counted" or "not asked" of a model beside the dense one.

    "not counted": the dense model does not pass half of the probe itself.
    """
    before, after = dense.score, other.score
    if before is None or after is None:
        return "not asked"
    if before < COUNTS_FROM:
        return "not counted"
    fell = after < PROBES[name].kept * before and _surely_less(dense, other)
    return COLLAPSED if fell else "kept"


def _surely_less(dense: ProbeResult, other: ProbeResult) -> bool:
    """Whether the share of right answers fell by more than three standard errors."""
    shares = [(one.right / one.total, one.total) for one in (dense, other)]
    error = math.sqrt(sum(share * (1 - share) / total for share, total in shares))
    return shares[0][0] - shares[1][0] > 3 * error


def compare_probes(
    dense: Mapping[str, ProbeResult],
    other: Mapping[str, ProbeResult],
    *,
    perplexity_ratio: float = 1.0,
) -> list[str]:
    """Return one warning for each probe that shows a collapse which perplexity hides.

    Args:
        dense: results of the dense model.
        other: of a model that was made of it.
        perplexity_ratio: perplexity of the other model as a multiple of the dense one's. Beyond
            1.5 perplexity tells of the damage itself, and there is no warning.
    """
    if not perplexity_ratio <= WELL:
        return []
    fallen = [
        name
        for name in PROBES
        if name in dense and name in other and verdict(name, dense[name], other[name]) == COLLAPSED
    ]
    return [
        f"perplexity is {perplexity_ratio:.3g} times the dense model's, but the probe {name} "
        f"({PROBES[name].asks}) fell from {dense[name].score:.2f} to {other[name].score:.2f}: "
        "perplexity hides a collapse here; prune less, recover longer, and look at tasks and "
        "samples"
        for name in fallen
    ]
