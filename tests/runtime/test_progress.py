"""Bars on a terminal, lines in a file, and a clock that runs while one part takes long."""

import fcntl
import logging
import os
import pty
import struct
import subprocess
import sys
import termios
import threading
import time

import pytest

from prunelight.runtime import progress
from prunelight.runtime.progress import Bar, clock, show_progress

TERMINAL = """
import time
from prunelight.runtime.progress import Bar, show_progress
with Bar("whole"):
    for _ in show_progress(range(2), "parts", unit="batches"):
        time.sleep(1.3)
"""


@pytest.fixture
def often(monkeypatch, caplog):
    """Lines come every second, so that a test need not take half a minute."""
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.9)
    monkeypatch.setattr(progress, "TOLD_SECONDS", 2.0)
    caplog.set_level(logging.INFO, "prunelight.runtime.progress")
    return caplog


def test_a_file_gets_lines_while_a_single_part_runs_and_one_at_the_end(often):
    with Bar("outer"), Bar("work", 4, unit="layers") as bar:
        bar.update(1, "loss 3")
        time.sleep(2.5)
    lines = [record.message for record in often.records]
    assert lines[0] == "work: 1 of 4 layers, 0:01, about 0:03 left, loss 3"
    assert lines[-2:] == ["work: done in 0:02", "outer: done in 0:02"] or "0:03" in lines[-1]
    assert not any(line.startswith("outer: 0") for line in lines)  # the inner one tells more


def test_quick_work_says_nothing_and_leaves_no_thread(often):
    assert [*show_progress(range(3), "quick")] == [0, 1, 2]
    with pytest.raises(RuntimeError), Bar("failing"):
        raise RuntimeError
    assert not often.records
    assert not Bar._open
    names = [thread.name for thread in threading.enumerate()]
    time.sleep(1.1)  # until the thread has seen that it is stopped
    assert names.count("prunelight progress") <= 1


def test_other_processes_than_the_first_show_nothing(often):
    for _ in show_progress([1], "quiet", quiet=True):
        time.sleep(1.2)
    assert not often.records


def test_a_resumed_bar_takes_its_rate_from_what_this_start_did():
    bar = Bar("train", 60, started=50, quiet=True)
    bar.began -= 10
    assert bar.describe() == "train: 50 of 60 steps, 0:10"
    bar.update(5)
    assert bar.describe() == "train: 55 of 60 steps, 0:10, about 0:10 left"


def test_a_terminal_shows_bars_whose_clock_runs_and_is_clean_afterwards():
    main, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", TERMINAL], stderr=child)
    os.close(child)
    shown = b""
    while True:
        try:
            part = os.read(main, 4096)
        except OSError:  # the end, on Linux
            break
        if not part:
            break
        shown += part
    assert process.wait() == 0
    text = shown.decode()
    assert "parts:" in text
    assert "1/2" in text
    assert "whole: 00:01" in text  # while the first part ran


@pytest.mark.parametrize(
    ("seconds", "text"), [(7, "0:07"), (59.6, "1:00"), (750, "12:30"), (3723, "1:02:03")]
)
def test_a_clock_shows_minutes_and_hours(seconds, text):
    assert clock(seconds) == text
