"""Kills short runs at random moments, starts the same command again, and compares with a whole run.

    python tests/end_to_end/kill_and_resume.py --kills 20 --seed 0

Each round of five kills has one while Python starts, while the model is pruned, while it trains,
while a checkpoint is written and while final/ is written. Then the run is left to end, and must
have the losses of every batch and the final weights of an uninterrupted run, bit for bit. After
each kill every file with a real name must load.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.context import ForkProcess as Process
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import torch
from PIL import Image
from safetensors.torch import load_file
from stopped_runs import CASES, write_config

from prunelight.cli import main

STAGES = ("start", "pruning", "training", "checkpoint", "final")
TIMEOUT = 900  # seconds, of one start


@dataclass
class Count:
    kills: int = 0
    differences: int = 0
    corrupt: int = 0
    resumes: int = 0
    told: list[str] = field(default_factory=list)


def start(arguments: list[str], root: Path) -> Process:
    """Start the command in a process that has imported the libraries already, and nothing else."""
    root.mkdir(parents=True, exist_ok=True)
    process = get_context("fork").Process(target=command, args=(arguments, root))
    process.start()
    return process


def command(arguments: list[str], root: Path) -> None:
    """Be the command line, with its output in a file."""
    output = os.open(root / ".output.txt", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    main(["fit", *arguments, "--trainer.default_root_dir", str(root)])


def finish(arguments: list[str], root: Path) -> None:
    process = start(arguments, root)
    process.join(TIMEOUT)
    if process.exitcode != 0:
        process.kill()
        raise SystemExit(f"{root} failed:\n{(root / '.output.txt').read_text()[-3000:]}")


def moment(stage: str, root: Path, rng: random.Random) -> tuple[Callable[[], bool], float]:
    """Return what to wait for after a start, and how many seconds longer."""
    losses, begun = root / "losses.txt", time.monotonic()
    seen = losses.stat().st_size if losses.exists() else 0
    more, pause = rng.randrange(1, 700), rng.random()
    logs = len(list(root.glob("logs/*")))
    return {
        "start": (lambda: time.monotonic() > begun + pause, 0.0),
        "pruning": (lambda: len(list(root.glob("logs/*"))) > logs, 0.8 * pause),
        "training": (
            lambda: losses.exists() and losses.stat().st_size >= seen + more,
            0.02 * pause,
        ),
        "checkpoint": (lambda: any(root.glob("checkpoints/.*.tmp")), 0.002 * pause),
        "final": (lambda: (root / ".final.tmp").exists(), 0.5 * pause),
    }[stage]


def kill_at(stage: str, arguments: list[str], root: Path, rng: random.Random) -> bool:
    """Start the command and kill it; False if it ended before."""
    process = start(arguments, root)
    reached, pause = moment(stage, root, rng)
    while not reached():
        if not process.is_alive():
            return False
        time.sleep(0.0005)
    time.sleep(pause)
    process.kill()  # SIGKILL
    process.join()
    return process.exitcode == -signal.SIGKILL


def corrupt_files(root: Path) -> list[Path]:
    """Return the files with a real name that do not load; logs/ is appended to and read by none."""
    found = []
    loaders: dict[str, Callable[[Path], Any]] = {
        ".ckpt": lambda file: torch.load(file, weights_only=True),
        ".safetensors": load_file,
        ".json": lambda file: json.loads(file.read_text()),
        ".png": lambda file: Image.open(file).load(),
        ".md": lambda file: file.read_text().index("\n"),
    }
    for file in root.rglob("*"):
        parts = file.relative_to(root).parts
        if parts[0] == "logs" or any(part.startswith(".") for part in parts):
            continue
        try:
            loaders.get(file.suffix, lambda _: None)(file)
        except Exception:
            found.append(file)
    return found


def losses_of(root: Path) -> dict[str, set[str]]:
    """Map epoch, batch and optimizer step to every loss that was seen there."""
    found: dict[str, set[str]] = {}
    for line in (root / "losses.txt").read_text().splitlines():
        key, _, loss = line.rpartition(" ")
        found.setdefault(key, set()).add(loss)
    return found


def differences(root: Path, whole: Path) -> list[str]:
    """Return in what a run differs from the uninterrupted one."""
    odd = []
    if losses_of(root) != losses_of(whole):
        odd.append("losses")
    mine, other = (load_file(run / "final" / "model.safetensors") for run in (root, whole))
    if mine.keys() != other.keys() or not all(torch.equal(mine[k], other[k]) for k in mine):
        odd.append("weights")
    mine, other = (json.loads((run / "report.json").read_text()) for run in (root, whole))
    if [stage["perplexity"] for stage in mine["stages"]] != [
        stage["perplexity"] for stage in other["stages"]
    ] or mine["recovery"] != other["recovery"]:
        odd.append("report")
    return odd


def run(work: Path, kills: int, seed: int, stages: tuple[str, ...] = STAGES) -> Count:
    """Kill and resume until there were so many kills; return what was found."""
    rng, count, rounds = random.Random(seed), Count(), 0
    while count.kills < kills:
        case = list(CASES)[rounds % len(CASES)]
        whole, root = work / case / "whole", work / case / f"killed-{rounds}"
        arguments = write_config(work / case, case)
        if not whole.exists():
            finish(arguments, whole)
        for stage in stages[: kills - count.kills]:
            if not kill_at(stage, arguments, root, rng):
                raise SystemExit(f"{root} ended before it could be killed at {stage}")
            count.kills += 1
            broken = corrupt_files(root)
            count.corrupt += len(broken)
            batches = len(losses_of(root)) if (root / "losses.txt").exists() else 0
            count.told.append(f"{case}: killed at {stage}, batch {batches}; corrupt {broken}")
            print(count.told[-1], flush=True)
            count.resumes += 1  # the next start, or the last one below
        finish(arguments, root)
        odd = differences(root, whole)
        count.differences += len(odd)
        count.corrupt += len(corrupt_files(root))
        left = [str(p) for p in root.rglob(".*.tmp")]
        count.told.append(f"{case}: ended, differences {odd}, temporaries left {left}")
        print(count.told[-1], flush=True)
        rounds += 1
    return count


def script() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        count = run(Path(work), given.kills, given.seed)
    print(
        f"{count.kills} kills, {count.resumes} resumes, {count.differences} differences, "
        f"{count.corrupt} corrupt files (seed {given.seed})"
    )
    sys.exit(bool(count.differences or count.corrupt))


if __name__ == "__main__":
    script()
