"""Time and memory of the phases of a run, and what memory is free."""

import mmap
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import torch

from prunelight.runtime.devices import free_memory
from prunelight.runtime.measuring import OTHER, Phases, process_age

CPU = torch.device("cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a phase is known on Linux only")
def test_a_phase_reports_its_time_and_the_memory_allocated_in_it():
    size, phases = 64 * 2**20, Phases()
    with phases.phase("idle"):
        pass
    with phases.phase("busy"):
        block = mmap.mmap(-1, size)  # fresh pages: the allocator may have free ones already
        torch.frombuffer(block, dtype=torch.uint8).fill_(1)
        time.sleep(0.05)
    idle, busy = phases.rows["idle"], phases.rows["busy"]
    assert busy.seconds >= 0.05 > idle.seconds
    assert busy.peak_bytes - idle.peak_bytes >= size - 2**20  # idle: what the process held anyway


def test_a_phase_that_fails_is_measured_too():
    phases = Phases()
    with pytest.raises(RuntimeError, match="inside"), phases.phase("failing"):
        raise RuntimeError("inside")
    assert phases.rows["failing"].peak_bytes > 0


def test_the_rows_add_up_to_the_time_whatever_nests_and_fails():
    phases, start = Phases(), time.perf_counter()
    phases.begin("before")
    time.sleep(0.02)
    phases.begin()
    for _ in range(2):
        with phases.phase("outer"):
            time.sleep(0.02)
            with suppress(RuntimeError), phases.phase("inner"):
                time.sleep(0.04)
                raise RuntimeError
            time.sleep(0.02)
    phases.stop()
    whole = time.perf_counter() - start
    assert [*phases.rows] == ["before", OTHER, "outer", "inner"]
    assert sum(row.seconds for row in phases.rows.values()) == pytest.approx(whole, rel=0.02)
    for name in ("outer", "inner"):
        assert phases.rows[name].seconds >= 0.08


def test_a_phase_that_is_open_at_the_stop_does_no_harm_later():
    phases = Phases()
    phases.begin()
    left = phases.phase("interrupted")
    left.__enter__()
    phases.stop()
    time.sleep(0.05)  # not part of the run
    phases.begin("next")
    left.__exit__(None, None, None)
    phases.stop()
    assert [*phases.rows] == ["next"]
    assert phases.rows["next"].seconds < 0.04


def test_free_memory_is_what_this_machine_has():
    assert 0 < free_memory(CPU) < 2**50


def test_the_age_of_a_process_counts_from_its_start():
    code = "import prunelight.runtime.measuring as m, time; print(m.process_age(), time.time())"
    begun = time.time()
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    age, ended = map(float, told.split())
    assert 0.9 * (ended - begun) - 0.1 < age < ended - begun + 0.05
    before = process_age()
    time.sleep(0.2)
    assert 0.15 < process_age() - before < 1.0
