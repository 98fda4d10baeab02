"""Facts about a device: its name, its free memory, and the operations that torch has for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch


@contextmanager
def allowing_nondeterministic_ties() -> Iterator[None]:
    """Allow kthvalue, median and cumsum, which torch's deterministic mode refuses on CUDA.

    Only the index that they return for equal elements may differ, and our callers use no index.
    """
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("default")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)


def float64_device(device: torch.device) -> torch.device:
    """Return a device that has float64: the given one, or the CPU instead of MPS."""
    return torch.device("cpu") if device.type == "mps" else device


def synchronize(device: torch.device) -> None:
    """Wait until a device has done its work; the CPU needs no waiting."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def slowness(dtype: torch.dtype, device: torch.device) -> float:
    """Return how many times as long as in float32 a product takes in a dtype; 1 but on a CPU.

    A CPU without instructions for a dtype converts it all the time. The product is timed, some
    hundredths of a second long: what torch and oneDNN do with the CPU is what counts.
    """
    if device.type != "cpu" or dtype == torch.float32:
        return 1.0
    seconds: dict[torch.dtype, list[float]] = {dtype: [], torch.float32: []}
    for _ in range(7):
        for kind, times in seconds.items():  # in turn: the clock drifts with the machine's load
            rows, weight = (torch.ones(n, 512, dtype=kind) for n in (128, 512))
            start = time.perf_counter()
            torch.nn.functional.linear(rows, weight)
            times.append(time.perf_counter() - start)
    return min(seconds[dtype][1:]) / min(seconds[torch.float32][1:])


def device_name(device: torch.device) -> str:
    """Return a device's name for reports: the name of the graphics card, else the device type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def free_memory(device: torch.device, root: Path = Path("/")) -> int:
    """Return the bytes that can still be allocated on a device; a container's limit counts.

    Args:
        device: the memory of a CUDA device, or the machine's for every other.
        root: directory in which proc/ and sys/ are.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return min([psutil.virtual_memory().available, *free_in_groups(root)])


def free_in_groups(root: Path = Path("/")) -> list[int]:
    """Return the bytes that each control group of this process with a limit can still allocate.

    Containers and batch systems limit memory by control groups (cgroup, versions 1 and 2), of which
    the machine's own figures say nothing. A group is limited by those above it too.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # no Linux
        return []
    free = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version = _GROUPS_1 if controllers else _GROUPS_2
        top = root / version.directory
        # Inside a container the path may be the machine's, which is not to be seen there.
        inner = Path(path.lstrip("/"))
        for group in (inner, *inner.parents):
            if (bytes_left := _free_in(top / group, version)) is not None:
                free.append(bytes_left)
    return free


@dataclass(frozen=True)
class _GroupFiles:
    """Where a version of control groups says what a group may take, and takes."""

    directory: str
    limit: str
    usage: str
    cache: str  # in memory.stat: file pages that the kernel drops when memory is short


_GROUPS_1 = _GroupFiles(
    "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
)
_GROUPS_2 = _GroupFiles("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")


def _free_in(group: Path, files: _GroupFiles) -> int | None:
    """Return the bytes that a group can still allocate; None without a limit."""
    try:
        limit = int((group / files.limit).read_text())
        usage = int((group / files.usage).read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return None
    try:
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        statistics = {}
    return max(0, limit - usage + int(statistics.get(files.cache, 0)))
