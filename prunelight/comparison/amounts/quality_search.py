"""Prune to a quality: the largest amount of each method that stays on the right side of a limit.

The rule: of max_kld the upper end of the 95 % interval of KL(dense || pruned), mean over the texts,
must be at most the limit; of min_top1 the lower end of the interval of same-top-1 must be at least
the limit. The search is a bisection over the choices of a method, from least to most removed. It
takes it that quality falls as more is removed, and tells where a measured choice says otherwise.
All methods take a step of their searches together, so that their cells can run side by side.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from prunelight.comparison.amounts.matching import Rung, ladder
from prunelight.comparison.grid import Cell, cells_of, one_line
from prunelight.comparison.methods import Entrant
from prunelight.comparison.running.bench import Bench
from prunelight.comparison.settings import ComparisonSettings
from prunelight.comparison.statistics import Paired, paired

log = logging.getLogger(__name__)

Run = Callable[[Sequence[Cell]], list[dict[str, Any]]]


@dataclass
class _Search:
    """The bisection of one method: choices up to `good` keep the limit, those from `bad` do not."""

    entrant: Entrant
    rungs: list[Rung]
    good: int = -1
    bad: int = 0
    fault: str = ""
    tried: dict[int, Paired] = field(default_factory=dict)

    @property
    def next(self) -> int | None:
        """The choice to measure next; None when the search is done."""
        if self.bad - self.good <= 1:
            return None
        return (self.good + self.bad) // 2


def search(
    settings: ComparisonSettings,
    facts: dict[str, Any],
    entrants: Sequence[Entrant],
    bench: Bench,
    run: Run,
) -> list[Cell]:
    """Return the cells of the largest amount of each method that keeps the limit.

    Args:
        settings: with max_kld or min_top1.
        facts: of the grid.
        entrants: the methods.
        bench: with the dense model.
        run: runs cells and returns their results.

    Returns:
        The cells of each method; one with a fault where no choice keeps the limit.
    """
    target = settings.quality_target
    assert target is not None
    searches = [_begin(entrant, bench) for entrant in entrants]
    while waiting := [s for s in searches if not s.fault and s.next is not None]:
        asked = [
            _cells(settings, facts, s.entrant, s.rungs[s.next or 0], with_tasks=False)
            for s in waiting
        ]
        flat = [cell for cells in asked for cell in cells]
        results = dict(zip((cell.fingerprint for cell in flat), run(flat), strict=True))
        for one, cells in zip(waiting, asked, strict=True):
            _take(one, [results[cell.fingerprint] for cell in cells], *target)
    chosen = []
    for one in searches:
        rung = one.rungs[one.good] if one.good >= 0 else Rung({}, 0.0)
        fault = one.fault
        if not fault and one.good < 0:
            least = one.rungs[0]
            fault = f"no amount keeps {target[0]}={target[1]:g}, not even {least.share:.1%}"
        chosen += _cells(settings, facts, one.entrant, rung, fault=fault)
    return chosen


def _begin(entrant: Entrant, bench: Bench) -> _Search:
    try:
        rungs = ladder(entrant, bench.dense)
        rungs = [rung for rung in rungs if _possible(entrant, rung, bench)]
        if not rungs:
            entrant.make(ladder(entrant, bench.dense)[0].arguments).check(bench.dense)
    except (ValueError, TypeError) as error:
        return _Search(entrant, [], fault=one_line(error))
    return _Search(entrant, rungs, bad=len(rungs))


def _possible(entrant: Entrant, rung: Rung, bench: Bench) -> bool:
    try:
        entrant.make(rung.arguments).check(bench.dense)
    except (ValueError, TypeError):
        return False
    return True


def _cells(
    settings: ComparisonSettings,
    facts: dict[str, Any],
    entrant: Entrant,
    rung: Rung,
    *,
    fault: str = "",
    with_tasks: bool = True,
) -> list[Cell]:
    group = "zeros" if entrant.puts_zeros else "parameters"
    cells = cells_of(
        settings,
        facts,
        entrant,
        rung,
        asked=rung.share,
        group=group,
        fault=fault,
        with_tasks=with_tasks and bool(settings.tasks),
    )
    return cells if with_tasks else [cell for cell in cells if not cell.recovered]


def _take(one: _Search, results: list[dict[str, Any]], name: str, limit: float) -> None:
    """Move the bisection by what was measured."""
    position = one.next
    assert position is not None
    failed = next((result["failed"] for result in results if result["failed"]), None)
    keeps = False
    if failed is None:
        measured = quality_of(results, name)
        one.tried[position] = measured
        keeps = measured.high <= limit if name == "max_kld" else measured.low >= limit
        log.info(
            "%s, %.1f %%: %s %.4g [%.4g, %.4g]: %s",
            *(one.entrant.label, 100 * one.rungs[position].share),
            "KL" if name == "max_kld" else "same top-1",
            *(measured.value, measured.low, measured.high, "kept" if keeps else "not kept"),
        )
    elif not one.tried:
        log.info("%s: %s", one.entrant.label, failed)
    if keeps:
        one.good = position
    else:
        one.bad = position
    if failed is not None and one.bad == 0 and not one.tried:
        one.fault = failed


def quality_of(results: Sequence[dict[str, Any]], name: str) -> Paired:
    """Return KL ("max_kld") or same-top-1 ("min_top1"): mean over texts, seeds averaged."""
    key = "window_kl" if name == "max_kld" else "window_same_top1"
    texts = len(results[0]["texts"])
    sums = [
        [
            sum(values) / len(results)
            for values in zip(*(r["divergence"][text][key] for r in results), strict=True)
        ]
        for text in range(texts)
    ]
    counts = [results[0]["texts"][text]["window_tokens"] for text in range(texts)]
    return paired([sums], counts, lower_is_better=name == "max_kld")[0]
