"""Where cells run: one after another here, in several processes, or as jobs of a cluster.

joblib and submitit do the launching. Each process loads the dense model once. With several devices
each process takes one for itself: it holds a lock of the device's name, which ends with it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from prunelight.comparison.grid import Cell
from prunelight.comparison.running.cells import run_cell
from prunelight.comparison.settings import ComparisonSettings
from prunelight.runtime.files.directory_lock import DirectoryLock

_EXTRAS = {"joblib": "compare", "submitit": "cluster"}


def check_launcher(settings: ComparisonSettings) -> None:
    """Check that the package of the launcher is installed.

    Raises:
        ImportError: if it is missing; names the pip line.
    """
    kind = settings.launcher.kind
    if kind in _EXTRAS and find_spec(kind) is None:
        raise ImportError(
            f"launcher.kind={kind!r} needs the package {kind}, which is not installed; install it "
            f"with: pip install 'prunelight[{_EXTRAS[kind]}]', or set launcher.kind=sequential"
        )


def run_cells(settings: ComparisonSettings, cells: Sequence[Cell]) -> Iterator[dict[str, Any]]:
    """Run cells, and yield the result of each as it is finished.

    Args:
        settings: of the comparison.
        cells: to run.
    """
    text = json.dumps(settings.to_dict())
    launcher = settings.launcher
    if launcher.kind == "sequential" or (len(cells) == 1 and launcher.kind == "joblib"):
        device = launcher.devices[0] if launcher.devices else None
        for cell in cells:
            yield run_cell(text, cell, device)
    elif launcher.kind == "joblib":
        import joblib

        jobs = len(launcher.devices) or launcher.n_jobs
        run = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered", batch_size=1)
        yield from run(joblib.delayed(_run)(text, cell) for cell in cells)
    else:
        yield from _on_cluster(settings, text, cells)


def _on_cluster(
    settings: ComparisonSettings, text: str, cells: Sequence[Cell]
) -> Iterator[dict[str, Any]]:
    import submitit

    folder = Path(settings.out).expanduser() / "jobs"
    executor = submitit.AutoExecutor(folder=folder, cluster=settings.launcher.cluster)
    executor.update_parameters(**settings.launcher.parameters)
    jobs = executor.map_array(_run, [text] * len(cells), cells)
    for job in submitit.helpers.as_completed(jobs):
        yield job.result()


def _run(text: str, cell: Cell) -> dict[str, Any]:
    """Run a cell in a process of a launcher."""
    settings = json.loads(text)
    devices = tuple(settings["launcher"]["devices"])
    return run_cell(text, cell, _own_device(Path(settings["out"]).expanduser(), devices))


@cache
def _own_device(out: Path, devices: tuple[str, ...]) -> str | None:
    """Return a device that no other process of the comparison has; this one keeps it."""
    for device in devices:
        try:
            _locks().append(DirectoryLock(out / "devices" / device.replace(":", "-")))
        except RuntimeError:
            continue
        return device
    if devices:
        raise RuntimeError(f"process {os.getpid()} finds no free device among {devices}")
    return None


@cache
def _locks() -> list[DirectoryLock]:
    return []


Launch = Callable[[ComparisonSettings, Sequence[Cell]], Iterator[dict[str, Any]]]
