"""Kills over all kinds of run: how many of them a resumed run survived without a difference.

python tests/reliability/kills.py --kills 100 --seconds 3600
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from rows import ROOT, Row, run

sys.path[:0] = [str(ROOT / "tests" / "end_to_end")]

import kill_and_resume

KINDS = {
    "gradual": "gradual zeros under LoRA",
    "shortgpt": "depth pruning, LoRA, a worker that loads",
    "restore_best": "full training, best weights without dirpath, early stopping",
    "gradual_best": "gradual zeros under full training, the best two and the last",
    "kd_topk": "distillation from a cache of the teacher, best per epoch",
    "fsdp2": "FSDP2 in two processes, best weights",
}


def measure(options: argparse.Namespace) -> list[Row]:
    """Kill runs of each kind, and compare each in the end with one that nobody killed."""
    with tempfile.TemporaryDirectory() as work:
        count = kill_and_resume.run(
            Path(work), options.kills, options.seed, seconds=options.seconds
        )
    rows = [
        Row(f"kills: {KINDS[case]}", kills, kills - count.unequal[case])
        for case, kills in count.kills.items()
    ]
    total, equal = sum(count.kills.values()), count.results - sum(count.unequal.values())
    note = f"one after each kill, and one after the last of each of the {count.runs} runs"
    return [
        *rows,
        Row("all kills: every file loads afterwards", total, total - count.corrupt),
        Row("results equal to those of a whole run, bit for bit", count.results, equal, note),
    ]


if __name__ == "__main__":
    run("kills", measure, kills=100, seed=0, seconds=3600)
