"""What a search aims at: a quality that must be kept, or a share of time that must be saved.

Keep a quality: of max_kld the upper end of the 95 % interval of KL(dense || pruned), mean over the
texts, must be at most the limit; of min_top1 the lower end of the interval of same-top-1 must be at
least the limit. The largest amount that keeps it is chosen.

Save time: the time of a generation, as a factor of that of the dense model, measured in turn with
it. The amount whose factor comes nearest is chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Protocol

from prunelight.comparison.amounts.matching import NEAR_ENOUGH, Rung
from prunelight.comparison.settings import ComparisonSettings
from prunelight.comparison.statistics import paired


@dataclass(frozen=True)
class Measured:
    """What a goal looks at, of one choice, with its interval."""

    value: float
    low: float
    high: float


class Goal(Protocol):
    """What a search aims at."""

    @property
    def unit(self) -> str:
        """What is measured, for the log."""

    @property
    def asked(self) -> float | None:
        """The amount that rows are compared at; None for what each choice removes."""

    def fault_of(self, puts_zeros: bool) -> str:
        """Return why a kind of method cannot reach the goal; "" if it can."""

    def measure(self, results: Sequence[dict[str, Any]]) -> Measured:
        """Return what the results of one choice, one for each seed, give."""

    def has_room(self, measured: Measured) -> bool:
        """Return whether more may be removed."""

    def choose(self, tried: Mapping[int, Measured], rungs: Sequence[Rung]) -> int:
        """Return the choice to take, of those that were measured.

        Raises:
            ValueError: if none reaches the goal.
        """


@dataclass(frozen=True)
class KeepQuality:
    """The most that keeps a quality: name is "max_kld" or "min_top1"."""

    name: str
    limit: float
    asked: None = None

    @property
    def unit(self) -> str:
        """What is measured."""
        return "KL" if self.name == "max_kld" else "same top-1"

    def fault_of(self, puts_zeros: bool) -> str:
        """Return "": every method changes the quality."""
        return ""

    def measure(self, results: Sequence[dict[str, Any]]) -> Measured:
        """Return KL or same-top-1: mean over texts, seeds averaged."""
        key = "window_kl" if self.name == "max_kld" else "window_same_top1"
        texts = len(results[0]["texts"])
        sums = [
            [
                fmean(values)
                for values in zip(*(r["divergence"][text][key] for r in results), strict=True)
            ]
            for text in range(texts)
        ]
        counts = [results[0]["texts"][text]["window_tokens"] for text in range(texts)]
        (found,) = paired([sums], counts, lower_is_better=self.name == "max_kld")
        return Measured(found.value, found.low, found.high)

    def has_room(self, measured: Measured) -> bool:
        """Return whether the limit is kept, with the whole interval."""
        if self.name == "max_kld":
            return measured.high <= self.limit
        return measured.low >= self.limit

    def choose(self, tried: Mapping[int, Measured], rungs: Sequence[Rung]) -> int:
        """Return the largest amount that keeps the limit."""
        kept = [position for position, measured in tried.items() if self.has_room(measured)]
        if not kept:
            raise ValueError(
                f"no amount keeps {self.name}={self.limit:g}, not even {rungs[0].share:.1%}"
            )
        return max(kept)


@dataclass(frozen=True)
class SaveTime:
    """The amount at which a generation takes 1 - asked times as long as with the dense model."""

    asked: float
    unit: str = "time of a generation, as a factor"

    def fault_of(self, puts_zeros: bool) -> str:
        """Return why zeros save no time."""
        if not puts_zeros:
            return ""
        return "zeros save no time in dense kernels; compare this method at equal: parameters"

    def measure(self, results: Sequence[dict[str, Any]]) -> Measured:
        """Return the factor against the dense model, seeds averaged."""
        return Measured(*(fmean(values) for values in zip(*map(factor_of, results), strict=True)))

    def has_room(self, measured: Measured) -> bool:
        """Return whether the model is slower than asked for."""
        return measured.value > 1 - self.asked

    def choose(self, tried: Mapping[int, Measured], rungs: Sequence[Rung]) -> int:
        """Return the choice whose factor is nearest."""
        position = min(tried, key=lambda place: abs(tried[place].value - 1 + self.asked))
        saved = 1 - tried[position].value
        if position == len(rungs) - 1 and saved < NEAR_ENOUGH * self.asked:
            raise ValueError(
                f"at most {saved:.1%} of the time can be saved, not {self.asked:.1%}; lower the "
                "amount"
            )
        return position


def factor_of(result: dict[str, Any]) -> tuple[float, float, float]:
    """Return median, low and high of a generation's time, as a factor of the dense model's."""
    factor = result["latency"]
    return factor["median"], factor["low"], factor["high"]


def goals_of(settings: ComparisonSettings) -> list[Goal]:
    """Return what the amounts are searched for; none where they are given."""
    if settings.quality_target is not None:
        return [KeepQuality(*settings.quality_target)]
    amounts = settings.amounts or []
    return [SaveTime(amount) for amount in amounts] if settings.equal == "latency" else []
