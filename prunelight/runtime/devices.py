"""Facts about a device: its name, its free memory, and the operations that torch has for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

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


def free_memory(device: torch.device) -> int:
    """Return the bytes that can still be allocated on a device."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return psutil.virtual_memory().available
