"""Measuring one phase of a run: wall time and peak memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prunelight.runtime.devices import synchronize


@dataclass
class Measurement:
    """Seconds and peak memory of one phase; filled in when the phase ends."""

    seconds: float = 0.0
    peak_bytes: int = 0
    started: float | None = None  # time.perf_counter() at the start; None outside the phase

    def so_far(self, device: torch.device) -> dict[str, Any]:
        """Return seconds and peak bytes up to now, for a phase that a later run continues."""
        if self.started is None:
            return {"seconds": self.seconds, "peak_bytes": self.peak_bytes}
        seconds = self.seconds + time.perf_counter() - self.started
        return {"seconds": seconds, "peak_bytes": max(self.peak_bytes, peak_memory(device))}


@contextmanager
def measuring(
    device: torch.device, measurement: Measurement | None = None
) -> Iterator[Measurement]:
    """Measure a phase: wall seconds, and the peak of allocated CUDA memory or of process memory.

    A `measurement` from before an interruption is continued: seconds add up, the larger peak stays.
    """
    measurement = measurement or Measurement()
    reset_peak(device)
    synchronize(device)
    measurement.started = time.perf_counter()
    try:
        yield measurement
    finally:
        synchronize(device)
        totals = measurement.so_far(device)
        measurement.seconds, measurement.peak_bytes = totals["seconds"], totals["peak_bytes"]
        measurement.started = None


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
