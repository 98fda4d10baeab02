"""The contest from start to end: check, make the grid, run what is missing, tell.

The table is written after every cell. So a contest that is stopped has a table of what is done.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunelight.comparison.amounts.goals import goals_of
from prunelight.comparison.amounts.search import search
from prunelight.comparison.grid import (
    Cell,
    Grid,
    check_same_contest,
    dense_cell,
    grid_facts,
    make_grid,
    read_grid,
    start_key,
    write_grid,
    write_json,
)
from prunelight.comparison.methods import entrants_of
from prunelight.comparison.running.bench import Bench, bench_of
from prunelight.comparison.running.cells import read_result
from prunelight.comparison.running.fits import check_recovery
from prunelight.comparison.running.launching import check_launcher, run_cells
from prunelight.comparison.running.quantized import check_quantizations
from prunelight.comparison.settings import ComparisonSettings
from prunelight.comparison.telling.page import page
from prunelight.comparison.telling.summary import Summary, summarize
from prunelight.comparison.telling.verdict import verdict
from prunelight.comparison.telling.writing import check_outputs, json_of, markdown
from prunelight.evaluation.report.writing import write_whole
from prunelight.runtime.arguments import did_you_mean
from prunelight.runtime.files.atomic_files import check_writable, explaining_write_errors
from prunelight.runtime.files.directory_lock import DirectoryLock

log = logging.getLogger(__name__)


def compare(settings: ComparisonSettings, command: str = "") -> Summary:
    """Run a comparison, or what is left of it, and write its table and page.

    Args:
        settings: of the comparison.
        command: by which it was started, for the page.

    Raises:
        ValueError, TypeError, ImportError, OSError: naming the setting, the rule and the remedy.
        RuntimeError: if another process runs the same comparison.
    """
    check_launcher(settings)
    check_quantizations(settings.quantizations)
    entrants = entrants_of(settings.methods, own_amounts=settings.amounts is None)
    for entrant in entrants:
        entrant.check()
    _check_claim(settings, [entrant.label for entrant in entrants])
    check_recovery(settings)
    out = Path(settings.out).expanduser()
    check_writable(out)
    check_outputs(out)
    check_same_contest(settings, out)
    lock = DirectoryLock(out, "out")
    try:
        key = start_key(settings)
        grid = read_grid(out, key)
        if grid is None:
            grid = _new_grid(settings, entrants)
            write_grid(out, key, settings, grid)

        pages = _Pages()

        def tell(found: dict[str, dict[str, Any]]) -> None:
            pages.draw(_tell(settings, grid, found, command), out)

        results = run_missing(settings, grid.cells, tell)
        summary = _tell(settings, grid, results, command)
        _draw(summary, out)
        return summary
    finally:
        lock.release()


def _check_claim(settings: ComparisonSettings, labels: Sequence[str]) -> None:
    """Check that the methods of the claim take part; raise ValueError if one does not."""
    claim = settings.claim
    for name in ("method", "against") if claim is not None else ():
        label = getattr(claim, name)
        if label not in labels:
            raise ValueError(
                f"claim.{name}={label!r} is no label of methods{did_you_mean(label, labels)}; they "
                f"are {', '.join(labels)}"
            )


def _new_grid(settings: ComparisonSettings, entrants: Sequence[Any]) -> Grid:
    launcher = settings.launcher
    if launcher.kind == "sequential":  # the cells run here, with the same model
        bench = bench_of(json.dumps(settings.to_dict()), next(iter(launcher.devices), None))
    else:
        bench = Bench(settings, "cpu")
    goals = goals_of(settings)
    if not goals:
        return make_grid(settings, entrants, bench)
    facts = grid_facts(settings, bench)

    def run(cells: Sequence[Cell]) -> list[dict[str, Any]]:
        results = run_missing(settings, cells)
        return [results[cell.fingerprint] for cell in cells]

    chosen = search(settings, facts, goals, entrants, bench, run)
    return Grid(facts, [dense_cell(settings, facts), *chosen])


def run_missing(
    settings: ComparisonSettings, cells: Sequence[Cell], tell: Any = None
) -> dict[str, dict[str, Any]]:
    """Run the cells that have no result yet; return fingerprint -> result of all."""
    out = Path(settings.out).expanduser()
    found = {cell.fingerprint: read_result(out, cell) for cell in cells}
    results = {name: result for name, result in found.items() if result is not None}
    missing = [
        *{cell.fingerprint: cell for cell in cells if cell.fingerprint not in results}.values()
    ]
    if results and missing:
        log.info("%d of %d cells are there already", len(results), len(found))
    start = time.perf_counter()
    for number, result in enumerate(run_cells(settings, missing) if missing else (), 1):
        cell = Cell(**result["cell"])
        results[cell.fingerprint] = result
        spent = time.perf_counter() - start
        left = spent / number * (len(missing) - number)
        told = f"failed: {result['failed']}" if result["failed"] else _in_short(result)
        log.info(
            "cell %d of %d: %s: %s (%s so far, about %s left)",
            *(number, len(missing), cell.title, told, _minutes(spent), _minutes(left)),
        )
        if tell is not None and number < len(missing):
            tell(results)
    return results


def _in_short(result: dict[str, Any]) -> str:
    texts = ", ".join(f"{x['text']} {x['perplexity']['value']:.2f}" for x in result["texts"])
    return f"{result['share_removed']:.1%} fewer parameters, perplexity {texts}"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _tell(
    settings: ComparisonSettings, grid: Grid, results: dict[str, dict[str, Any]], command: str
) -> Summary:
    """Write the table of all results so far, and return what it was written from."""
    pairs = [(cell, results.get(cell.fingerprint)) for cell in grid.cells]
    summary = summarize(settings, grid.facts, pairs, command)
    out, told = Path(settings.out).expanduser(), verdict(summary)
    write_json(out / "comparison.json", {**json_of(summary), "verdict": told})
    with explaining_write_errors(out):
        write_whole(out / "comparison.md", markdown(summary, told))
    return summary


class _Pages:
    """Draws the page while cells run, as often as that takes a twentieth of the time at most."""

    def __init__(self) -> None:
        self._next = 0.0

    def draw(self, summary: Summary, out: Path) -> None:
        """Draw the page if it is time."""
        start = time.perf_counter()
        if start >= self._next:
            _draw(summary, out)
            end = time.perf_counter()
            self._next = end + 19 * (end - start)


def _draw(summary: Summary, out: Path) -> None:
    with explaining_write_errors(out):
        write_whole(out / "report.html", page(summary, verdict(summary)))
