"""Damage the files of runs that were stopped half way, start the same command again, and look.

python tests/reliability/damage.py --damages 60 --seed 0

Each damage is to a file that the start reads: of the pruned base, a checkpoint, the teacher cache,
or a JSON file of one of these. It is noticed if the start ends in one line that names the file or
its directory, or if it says so and makes the file again, and ends with the weights of the run
that nobody stopped. Silent is everything else.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

from rows import ROOT, Row, run

sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from damage_kinds import damage, edit, swap
from option_changes import Case, start
from runs import measure_speed_briefly

TARGETS = ("base", "checkpoint", "cache", "config")
TOLD = (
    "is damaged",
    "is not as it was saved",
    "has fingerprint",
    "holds ids",
    "pruning anew",
)


def files_of(root: Path, target: str) -> list[Path]:
    """The files of a target in the directory of a stopped run."""
    patterns = {
        "base": "pruned-*/*",
        "checkpoint": "checkpoints/last.ckpt",
        "cache": "teacher-*/*",
        "config": "pruned-*/*.json",
    }
    return sorted(file for file in root.glob(patterns[target]) if file.is_file())


def harm(root: Path, target: str, rng: random.Random) -> str:
    """Damage one file of a target; return what was done."""
    files = files_of(root, target)
    if target == "cache" and rng.random() < 0.2:
        blocks = [file for file in files if file.suffix == ".safetensors"]
        return swap(blocks[0], blocks[1])
    file = rng.choice(files)
    if target == "config":
        edit(file, rng)
        return f"edit of {file.name}"
    return damage(file, rng)


def verdict(case: Case, run_directory: Path, config: Path) -> str:
    """Start again; return "refused", "made again", or what is wrong."""
    code, said = start(config, run_directory)
    lines = [line for line in said.splitlines() if line.startswith("prunelight: error: ")]
    told = any(words in said for words in TOLD)
    if code == 0:
        same = case.compared(run_directory) == "equal"
        return "made again" if told and same else f"SILENT: {said[-500:]}"
    if "Traceback" in said or len(lines) != 1 or not told:
        return f"NOT ONE LINE: {said[-1000:]}"
    return "refused"


def measure(options: argparse.Namespace) -> list[Row]:
    """Damage each target in turn."""
    measure_speed_briefly()
    rng, rows = random.Random(options.seed), []
    with tempfile.TemporaryDirectory() as directory:
        case = Case("kd_topk", Path(directory))
        for target in TARGETS:
            counts: Counter[str] = Counter()
            for number in range(options.damages // len(TARGETS)):
                name = f"runs/{target}-{number}"
                shutil.copytree(case.root / "stopped", case.root / name)
                done = harm(case.root / name, target, rng)
                said = verdict(case, case.root / name, case.written(name, {}))
                counts[said if said in ("refused", "made again") else "wrong"] += 1
                if counts["wrong"] and said not in ("refused", "made again"):
                    print(f"{target}: {done}: {said}")
                shutil.rmtree(case.root / name)
            noticed = counts["refused"] + counts["made again"]
            note = f"{counts['refused']} refused, {counts['made again']} told of and made again"
            rows.append(Row(f"damage to: {target}", counts.total(), noticed, note))
    return rows


if __name__ == "__main__":
    run("damage", measure, damages=60, seed=0)
