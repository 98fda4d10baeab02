"""Where the time of a run goes: every second belongs to one phase, named for the report.

Phases nest. The time of an inner phase does not count for the one around it, so the rows add up to
the time of the run. With each phase goes the peak of memory in it.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from prunelight.runtime.devices import synchronize
from prunelight.runtime.progress import Bar

OTHER = "all else"  # between the phases


@dataclass
class Measurement:
    """Seconds and peak memory of one phase."""

    seconds: float = 0.0
    peak_bytes: int = 0


@dataclass(frozen=True, eq=False)
class _Entry:
    """One entry into a phase; equal to itself only."""

    name: str


class Phases:
    """The phases of one run, in the order in which each first began.

    Attributes:
        rows: name -> seconds and peak memory of a phase.
        device: whose peak memory is measured.
        quiet: show no bars, as on all processes but the first.
    """

    def __init__(self) -> None:
        self.rows: dict[str, Measurement] = {}
        self.device = torch.device("cpu")
        self.quiet = False
        self._stack: list[_Entry] = []
        self._since: float | None = None  # None while nothing is measured

    @property
    def running(self) -> bool:
        """Whether time is measured."""
        return self._since is not None

    def begin(self, name: str = OTHER) -> None:
        """Measure from now on, anew if it was stopped; time outside of the phases is `name`'s."""
        if self._since is None:
            reset_peak(self.device)
            self.rows.clear()
            self._since = time.perf_counter()
            self._stack = [_Entry(name)]
        else:
            self.lap()
            self._stack[0] = _Entry(name)

    def stop(self) -> None:
        """Measure no more, until `begin`: what follows is not part of the run."""
        self.lap()
        self._since, self._stack = None, []

    def add(self, name: str, seconds: float) -> None:
        """Add time that was measured elsewhere, such as that of imports."""
        row = self.rows.setdefault(name, Measurement())
        row.seconds += seconds
        row.peak_bytes = max(row.peak_bytes, peak_memory(self.device))

    @contextmanager
    def phase(self, name: str, *, shown: bool = True) -> Iterator[None]:
        """Measure what happens inside, and show that it runs.

        Args:
            name: of the row that it counts for.
            shown: show a bar for it; not where a bar of its own tells more.
        """
        if self._since is None:
            self.begin()
        self.lap()
        entry = _Entry(name)
        self._stack.append(entry)
        self.rows.setdefault(name, Measurement())
        try:
            with Bar(name, quiet=self.quiet or not shown):
                yield
        finally:
            if entry in self._stack:  # not after a `stop` inside
                self.lap()
                del self._stack[self._stack.index(entry) :]

    def lap(self) -> None:
        """Count the time since the last lap for the phase that runs, so that the rows are whole."""
        if self._since is None:
            return
        synchronize(self.device)
        now = time.perf_counter()
        row = self.rows.setdefault(self._stack[-1].name, Measurement())
        row.seconds += now - self._since
        row.peak_bytes = max(row.peak_bytes, peak_memory(self.device))
        self._since = now
        reset_peak(self.device)


def process_age() -> float:
    """Return the seconds since this process started.

    On Linux by the clock that counts from the boot: the date of the boot is known to a second only.
    """
    if sys.platform == "linux":
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5)
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    return time.time() - psutil.Process().create_time()


def reset_peak(device: torch.device) -> None:
    """Begin to look for the peak of memory anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)
        except OSError:
            return  # a sandbox may forbid the reset: the peak is then the whole process's


def peak_memory(device: torch.device) -> int:
    """Return the peak bytes since the last reset: allocated memory on CUDA, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


@contextmanager
def memory_growth(device: torch.device) -> Iterator[Callable[[], int]]:
    """Yield a function that returns by how many bytes the peak inside passed what was held before.

    The peak is looked for anew, so `Phases.lap` before it keeps the peak of a phase.
    """
    release_freed_memory(device)
    reset_peak(device)
    before = peak_memory(device)
    yield lambda: max(0, peak_memory(device) - before)


def release_freed_memory(device: torch.device) -> None:
    """Give freed memory back, as far as that can be asked for, so that its use shows again."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
        if trim is not None:
            trim(0)
