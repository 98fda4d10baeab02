"""The amount of each method that meets a goal: a bisection over its choices, by measuring.

It goes over the choices of a method, from the least to the most removed, and takes it that what is
measured falls (or rises) all the way. All methods take a step of their searches together, so that
their cells can run side by side.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from prunelight.comparison.amounts.goals import Goal, Measured
from prunelight.comparison.amounts.matching import Outlines, Rung, check_rung, ladder, own_amount
from prunelight.comparison.grid import Cell, cells_of, one_line
from prunelight.comparison.methods import Entrant, Series
from prunelight.comparison.running.bench import Bench
from prunelight.comparison.settings import ComparisonSettings

log = logging.getLogger(__name__)

Run = Callable[[Sequence[Cell]], list[dict[str, Any]]]


@dataclass
class _Search:
    """The bisection of one method: choices up to `room` leave room for more, from `end` on none."""

    entrant: Entrant | Series
    goal: Goal
    rungs: list[Rung]
    room: int = -1
    end: int = 0
    fault: str = ""
    tried: dict[int, Measured] = field(default_factory=dict)

    @property
    def next(self) -> int | None:
        """The choice to measure next; None when the search is done."""
        if self.fault or self.end - self.room <= 1:
            return None
        return (self.room + self.end) // 2


def search(
    settings: ComparisonSettings,
    facts: dict[str, Any],
    goals: Sequence[Goal],
    entrants: Sequence[Entrant | Series],
    bench: Bench,
    run: Run,
) -> list[Cell]:
    """Return the cells of the amount of each method that meets each goal.

    Args:
        settings: of the comparison.
        facts: of the grid.
        goals: what is aimed at.
        entrants: the methods.
        bench: with the dense model.
        run: runs cells and returns their results.

    Returns:
        The cells of each method; one with a fault where no choice meets the goal.
    """
    searches = [_begin(entrant, goal, bench) for entrant in entrants for goal in goals]
    while waiting := [(one, one.next) for one in searches if one.next is not None]:
        asked = [
            _cells(settings, facts, one, one.rungs[position], while_searching=True)
            for one, position in waiting
        ]
        flat = [cell for cells in asked for cell in cells]
        results = dict(zip((cell.fingerprint for cell in flat), run(flat), strict=True))
        for (one, position), cells in zip(waiting, asked, strict=True):
            _take(one, position, [results[cell.fingerprint] for cell in cells])
    return [cell for one in searches for cell in _chosen(settings, facts, one)]


def _begin(entrant: Entrant | Series, goal: Goal, bench: Bench) -> _Search:
    try:
        rungs = ladder(entrant, bench.dense)
        outlines = Outlines(bench.dense)
        rungs = [rung for rung in rungs if _possible(entrant, rung, outlines)]
        if not rungs:
            check_rung(entrant, ladder(entrant, bench.dense)[0], outlines)
    except (ValueError, TypeError) as error:
        return _Search(entrant, goal, [], fault=one_line(error))
    fault = goal.fault_of(entrant.puts_zeros)
    return _Search(entrant, goal, rungs, end=len(rungs), fault=fault)


def _possible(entrant: Entrant | Series, rung: Rung, outlines: Outlines) -> bool:
    try:
        check_rung(entrant, rung, outlines)
    except (ValueError, TypeError):
        return False
    return True


def _cells(
    settings: ComparisonSettings,
    facts: dict[str, Any],
    one: _Search,
    rung: Rung,
    *,
    while_searching: bool = False,
) -> list[Cell]:
    """Return the cells of a choice; while searching, those that are pruned alone, without tasks."""
    share = rung.share if while_searching or one.goal.asked is None else one.goal.asked
    cells = cells_of(
        settings,
        facts,
        one.entrant,
        rung,
        asked=share,
        group="zeros" if one.entrant.puts_zeros else "parameters",
        fault=one.fault,
        with_tasks=bool(settings.tasks) and not while_searching,
    )
    return [cell for cell in cells if not cell.recovered] if while_searching else cells


def _take(one: _Search, position: int, results: list[dict[str, Any]]) -> None:
    """Move the bisection by what was measured."""
    failed = next((result["failed"] for result in results if result["failed"]), None)
    has_room = False
    if failed is None:
        measured = one.tried[position] = one.goal.measure(results)
        has_room = one.goal.has_room(measured)
        log.info(
            "%s, %.1f %%: %s %.4g [%.4g, %.4g]: %s",
            *(one.entrant.label, 100 * one.rungs[position].share, one.goal.unit),
            *(measured.value, measured.low, measured.high),
            "try more" if has_room else "try less",
        )
    elif not one.tried:
        log.info("%s: %s", one.entrant.label, failed)
    if has_room:
        one.room = position
    else:
        one.end = position
    if failed is not None and one.end == 0 and not one.tried:
        one.fault = failed


def _chosen(settings: ComparisonSettings, facts: dict[str, Any], one: _Search) -> list[Cell]:
    """Return the cells of the choice that the search ends with, or of its fault."""
    rung = own_amount(one.entrant)
    if not one.fault:
        try:
            rung = one.rungs[one.goal.choose(one.tried, one.rungs)]
        except ValueError as error:
            one.fault = one_line(error)
    return _cells(settings, facts, one, rung)
