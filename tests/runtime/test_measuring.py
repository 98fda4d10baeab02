"""Time and memory of a phase, and what memory is free."""

import mmap
import sys
import time

import pytest
import torch

from prunelight.runtime.devices import free_memory
from prunelight.runtime.measuring import measuring

CPU = torch.device("cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a phase is known on Linux only")
def test_a_phase_reports_its_time_and_the_memory_allocated_in_it():
    size = 64 * 2**20
    with measuring(CPU) as idle:
        pass
    with measuring(CPU) as busy:
        block = mmap.mmap(-1, size)  # fresh pages: the allocator may have free ones already
        torch.frombuffer(block, dtype=torch.uint8).fill_(1)
        time.sleep(0.05)
    assert busy.seconds >= 0.05 > idle.seconds
    assert busy.peak_bytes - idle.peak_bytes >= size - 2**20  # idle: what the process held anyway


def test_a_phase_that_fails_is_measured_too():
    with pytest.raises(RuntimeError, match="inside"), measuring(CPU) as phase:
        raise RuntimeError("inside")
    assert phase.peak_bytes > 0


def test_free_memory_is_what_this_machine_has():
    assert 0 < free_memory(CPU) < 2**50
