"""The cells of a comparison, each with the fingerprint by which its result is found again.

A cell is a method with its arguments, a seed, and whether it is recovered. Its fingerprint covers
all that its result depends on: model, arguments with the content of files that they name, windows,
texts, tasks and versions. `grid.json` keeps the cells of the last start. So a finished comparison
is shown again without its model.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from prunelight.calibration.self_written import sources_read
from prunelight.comparison.amounts.matching import (
    Outlines,
    Rung,
    check_rung,
    nearest,
    own_amount,
    own_ratio,
)
from prunelight.comparison.methods import Entrant, Series
from prunelight.comparison.running.bench import Bench
from prunelight.comparison.settings import ComparisonSettings
from prunelight.models.families.layers import decoder_layers
from prunelight.models.loading import file_states
from prunelight.planning.fingerprints import (
    describe_model,
    digests_of_files,
    fingerprint_of,
    library_versions,
)
from prunelight.runtime.files.atomic_files import write_text

log = logging.getLogger(__name__)

FORMAT = 1
DENSE = "dense"
# What another comparison in the same directory may differ in: its cells stand beside the others.
_MAY_CHANGE = (
    *("methods", "amounts", "zeros", "seeds", "max_kld", "min_top1", "keep_models", "launcher"),
    *("out", "tasks_dir", "published", "quantizations", "quantize_first", "claim"),
)


@dataclass(frozen=True)
class Cell:
    """One entry of the grid.

    Attributes:
        label: of the method; "dense" for the dense model.
        method: class path of the method; of the first one, in a series.
        arguments: all that the method is made with.
        asked: share that was asked for; None for the dense model, and where the arguments say it.
        group: what `asked` is a share of: "parameters", "zeros" or a method's own "ratio"; "own"
            where nothing is asked for.
        seed: of calibration windows and training.
        recovered: the pruned model is trained.
        with_tasks: the tasks are asked too.
        fault: why the method cannot be asked for so much, in one line.
        fingerprint: names the directory of the cell.
        then: method and arguments of each later method of a series.
    """

    label: str
    method: str = ""
    arguments: dict[str, Any] | None = None
    asked: float | None = None
    group: str = "parameters"
    seed: int = 0
    recovered: bool = False
    with_tasks: bool = True
    fault: str = ""
    fingerprint: str = ""
    then: list[dict[str, Any]] = field(default_factory=list)

    @property
    def methods(self) -> list[dict[str, Any]]:
        """Method and arguments of each method, in their order; none for the dense model."""
        first = {"method": self.method, "arguments": self.arguments or {}}
        return [first, *self.then] if self.method else []

    @property
    def title(self) -> str:
        """The cell in words."""
        if self.label == DENSE:
            return "the dense model"
        of = {"zeros": "zeros", "ratio": "of its own measure"}.get(self.group, "of the parameters")
        given = "; then ".join(
            ", ".join(f"{k}={_short(v)}" for k, v in one["arguments"].items())
            for one in self.methods
        )
        given = f"{given}; " if given else ""
        recovered = ", recovered" if self.recovered else ""
        amount = "at its own amount" if self.asked is None else f"{self.asked:.3g} {of}"
        return f"{self.label}, {amount}{recovered} ({given}seed {self.seed})"


@dataclass(frozen=True)
class Grid:
    """All cells of a start.

    Attributes:
        facts: what identifies model, windows and texts.
        cells: the dense one first.
    """

    facts: dict[str, Any]
    cells: list[Cell]


def _short(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


# --- the identity of a start ------------------------------------------------------------------


def start_key(settings: ComparisonSettings) -> str:
    """Return what identifies a start without reading the model: settings and states of files."""
    values = settings.to_dict()
    for name in ("out", "launcher", "keep_models", "tasks_dir", "published", "claim"):
        del values[name]
    for name in ("quantizations", "quantize_first"):
        if not values[name]:  # an older version, which did not know it, found the same
            del values[name]
    data = settings.data
    sources = [*sources_read(data.calibration), *data.texts.values()]
    model = file_states(settings.model.name)
    states: list[Any] = [model, [_file_state(s) for s in sources], _task_files(settings)]
    if named := digests_of_files([settings.methods, settings.recovery]):
        states.append(named)
    return fingerprint_of(values, states, _versions())


def _state(file: Path) -> tuple[int, int]:
    facts = file.stat()
    return facts.st_size, facts.st_mtime_ns


def _file_state(source: str) -> list[Any]:
    file = Path(source).expanduser()
    return [source, *(_state(file) if file.is_file() else ())]


def _task_files(settings: ComparisonSettings) -> list[Any]:
    """Return names, sizes and times of the data files of the tasks; nothing of those of the hub."""
    if settings.tasks_dir is None:
        return []
    root = Path(settings.tasks_dir).expanduser()
    files = [file for name in settings.tasks for file in sorted((root / name).rglob("*.json*"))]
    return [[str(file.relative_to(root)), *_state(file)] for file in files]


def _versions() -> dict[str, str]:
    versions = library_versions()
    try:
        versions["lm_eval"] = version("lm_eval")
    except PackageNotFoundError:
        versions["lm_eval"] = ""
    return versions


# --- the grid ---------------------------------------------------------------------------------


def make_grid(
    settings: ComparisonSettings, entrants: Iterable[Entrant | Series], bench: Bench
) -> Grid:
    """Return the grid of a comparison; loads the model and reads the texts.

    Raises:
        ValueError: if a text or the calibration does not suffice.
    """
    facts = grid_facts(settings, bench)
    cells, outlines = [dense_cell(settings, facts)], Outlines(bench.dense)
    for entrant in entrants:
        group = _group(settings, entrant)
        amounts = settings.zeros_shares if entrant.puts_zeros else settings.amounts
        for asked in [None] if amounts is None else amounts:
            rung, fault = own_amount(entrant), ""
            try:
                if asked is not None:
                    own = settings.equal == "ratio"
                    rung = (
                        own_ratio(entrant, asked) if own else nearest(entrant, bench.dense, asked)
                    )
                check_rung(entrant, rung, outlines)
            except (ValueError, TypeError) as error:
                fault = one_line(error)
            cells += cells_of(settings, facts, entrant, rung, asked=asked, group=group, fault=fault)
    return Grid(facts, cells)


def _group(settings: ComparisonSettings, entrant: Entrant | Series) -> str:
    """Return what the amounts of a row are shares of; see `Cell.group`."""
    if entrant.puts_zeros:
        return "zeros"
    if settings.amounts is None:
        return "own"
    return "ratio" if settings.equal == "ratio" else "parameters"


def one_line(error: BaseException) -> str:
    """Return the text of an error in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def grid_facts(settings: ComparisonSettings, bench: Bench) -> dict[str, Any]:
    """Return what all results depend on."""
    tasks = bench.task_set  # first: a wrong task ends here, before a model is loaded
    dense = bench.dense
    return {
        "model": {
            **describe_model(dense, len(decoder_layers(dense))),
            "parameters": bench.parameters,
            "dtype": str(dense.dtype).removeprefix("torch."),
        },
        **bench.facts(),
        "tasks": None if tasks is None else tasks.describe(),
        "versions": _versions(),
    }


def dense_cell(settings: ComparisonSettings, facts: dict[str, Any]) -> Cell:
    """Return the cell of the dense model."""
    return _named(settings, facts, Cell(DENSE))


def cells_of(
    settings: ComparisonSettings,
    facts: dict[str, Any],
    entrant: Entrant | Series,
    rung: Rung,
    *,
    asked: float | None,
    group: str,
    fault: str = "",
    with_tasks: bool = True,
) -> list[Cell]:
    """Return the cells of a method at an amount: of each seed, pruned and recovered."""
    cells = []
    each: list[dict[str, Any]] = [
        {
            "method": f"{part.made.__module__}.{part.made.__qualname__}",
            "arguments": {**part.arguments, **given},
        }
        for part, given in zip(entrant.parts, (rung.arguments, *rung.then), strict=True)
    ]
    versions = [
        _version(part, given)
        for part, given in zip(entrant.parts, (rung.arguments, *rung.then), strict=True)
    ]
    for recovered in (False, True) if settings.recovery else (False,):
        for seed in settings.seeds:
            cell = Cell(
                label=entrant.label,
                method=each[0]["method"],
                arguments=each[0]["arguments"],
                asked=asked,
                group=group,
                seed=seed,
                recovered=recovered,
                with_tasks=with_tasks,
                fault=fault,
                then=each[1:],
            )
            cells.append(_named(settings, facts, cell, versions))
    return cells


def _version(part: Entrant, given: dict[str, Any]) -> int:
    """Return the version of a method, which its arguments may decide; 0 if they are refused."""
    try:
        return part.make(given).version
    except (ValueError, TypeError):
        return 0


def _named(
    settings: ComparisonSettings, facts: dict[str, Any], cell: Cell, versions: Sequence[Any] = ()
) -> Cell:
    """Return the cell with its fingerprint: all that its result depends on, and its fault."""
    seed = str(cell.seed)
    model = {key: value for key, value in facts["model"].items() if key != "name"}
    depends: list[Any] = [FORMAT, model, facts["texts"], facts["versions"], settings.serving]
    if cell.with_tasks:
        depends.append(facts["tasks"])
    if settings.equal == "latency":
        depends.append(settings.equal)
    if settings.quantizations:
        depends.append([settings.quantizations, settings.quantize_first])
        depends.append(facts["calibration"][seed])
    if cell.label != DENSE:
        arguments = cell.arguments
        depends += [cell.method, versions[0], arguments, facts["calibration"][seed], cell.fault]
    if cell.then:
        depends.append([cell.then, versions[1:]])
    if cell.recovered:
        depends += [settings.recovery, cell.seed]
    if named := digests_of_files([cell.methods, settings.recovery if cell.recovered else None]):
        depends.append(named)
    return replace(cell, fingerprint=fingerprint_of(depends))


# --- its file ---------------------------------------------------------------------------------


def check_same_contest(settings: ComparisonSettings, out: Path) -> None:
    """Check that a directory holds no other comparison; one with more or fewer cells is the same.

    Raises:
        ValueError: naming the first setting that differs, and the remedy.
    """
    kept = _read(out)
    if kept is None:
        return
    then, now = kept["settings"], json.loads(json.dumps(settings.to_dict()))
    for name, value in now.items():
        # What an older version did not know, the grid has as its default.
        if name in _MAY_CHANGE or name not in then or then[name] == value:
            continue
        old = then[name]
        if isinstance(value, dict) and isinstance(old, dict):
            inner = [key for key in value if key in old and value[key] != old[key]]
            if not inner:
                continue
            name, value, old = f"{name}.{inner[0]}", value[inner[0]], old[inner[0]]
        raise ValueError(
            f"{out} holds another comparison, with {name}={old!r} instead of {value!r}; set "
            "another out, or delete that directory"
        )


def read_grid(out: Path, key: str) -> Grid | None:
    """Return the grid of an earlier start with the same key; None without one."""
    kept = _read(out)
    if kept is None or kept["key"] != key:
        return None
    return Grid(kept["facts"], [Cell(**cell) for cell in kept["cells"]])


def write_grid(out: Path, key: str, settings: ComparisonSettings, grid: Grid) -> None:
    """Write `grid.json`, whole or not at all."""
    write_json(
        out / "grid.json",
        {
            "format": FORMAT,
            "key": key,
            "settings": settings.to_dict(),
            "facts": grid.facts,
            "cells": [asdict(cell) for cell in grid.cells],
        },
    )


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def _read(out: Path) -> dict[str, Any] | None:
    """Return what `grid.json` holds.

    Raises:
        FileExistsError: if a file of the name is none of ours.
    """
    file = out / "grid.json"
    if not file.is_file():
        return None
    try:
        kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if kept["format"] == FORMAT and {"key", "settings", "facts", "cells"} <= {*kept}:
            return kept
    except (ValueError, KeyError, TypeError, OSError):
        pass
    raise FileExistsError(
        f"{file} is no grid of this version of prunelight; set another out, or move the file"
    )
