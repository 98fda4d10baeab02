"""Runs that are killed resume without a difference."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_killed_processes_resume_without_a_difference():
    script = Path(__file__).with_name("kill_and_resume.py")
    command = [sys.executable, str(script), "--kills", "2", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    told = "2 kills of 1 runs, 0 of 3 results with differences, 0 corrupt files"
    assert told in done.stdout, done.stderr
