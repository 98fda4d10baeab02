"""Kills short runs at random moments, starts the same command again, and compares with a whole run.

    python tests/end_to_end/kill_and_resume.py --kills 20 --seed 0

The kinds of run are those of `stopped_runs.CASES`, one after another. Each round of five kills has
one while Python starts, while the model is pruned, while it trains, while a checkpoint is written
and while final/ is written; each is a SIGKILL or a SIGTERM. A run of two processes loses both or
only the first. After each kill every file with a real name must load, and a copy of the directory
is left to end. So is the directory itself after the last kill. Each must have the losses of every
batch, the final weights, the checkpoints and the report of an uninterrupted run, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
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
from runs import measure_speed_briefly
from safetensors.torch import load_file
from stopped_runs import CASES, write_config

from prunelight import lightning_cli  # noqa: F401 (imported before the fork, not after each)
from prunelight.cli import main
from prunelight.runtime.files.atomic_files import ENDING

STAGES = ("start", "pruning", "training", "checkpoint", "final")
TIMEOUT = 900  # seconds, of one start
STEPS = 14  # optimizer steps of a run


@dataclass
class Count:
    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CASES, 0))
    unequal: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CASES, 0))
    runs: int = 0
    results: int = 0  # runs that were left to end after a kill
    corrupt: int = 0
    told: list[str] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """What was done and found, in one line."""
        return (
            f"{sum(self.kills.values())} kills of {self.runs} runs, "
            f"{sum(self.unequal.values())} of {self.results} results with differences, "
            f"{self.corrupt} corrupt files"
        )

    def tell(self, sentence: str) -> None:
        """Say what happened, at once."""
        self.told.append(sentence)
        print(sentence, flush=True)


class Start:
    """One start of a command, in a process for each rank that has imported the libraries already.

    Args:
        arguments: of the command.
        root: directory of the run.
        ranks: number of processes.
    """

    def __init__(self, arguments: list[str], root: Path, ranks: int) -> None:
        root.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = get_context("fork")
        self.processes: list[Process] = [
            context.Process(target=command, args=(arguments, root, rank, ranks, port))
            for rank in range(ranks)
        ]
        for process in self.processes:
            process.start()

    @property
    def alive(self) -> bool:
        """Whether a process runs."""
        return any(process.is_alive() for process in self.processes)

    def send(self, number: int, ranks: int) -> None:
        """Send a signal to the first ranks, and wait until all are gone.

        A rank that waits for one that is gone is killed; a launcher does so.
        """
        for process in self.processes[:ranks]:
            if process.is_alive():
                os.kill(process.pid or 0, number)
        for process in self.processes[:ranks]:
            process.join(TIMEOUT)
        for process in self.processes:
            process.join(20 if number == signal.SIGKILL else TIMEOUT)
            process.kill()
            process.join()


def command(arguments: list[str], root: Path, rank: int, ranks: int, port: int) -> None:
    """Be the command line, with its output in a file."""
    output = os.open(root / ".output.txt", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if ranks > 1:  # as torchrun sets them
        places = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "MASTER_PORT": port}
        sizes = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        launcher = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "kills"}
        os.environ.update({k: str(v) for k, v in {**places, **sizes, **launcher}.items()})
    main(["fit", *arguments, "--trainer.default_root_dir", str(root)])


def finish(arguments: list[str], root: Path, ranks: int) -> None:
    """Let a run end by itself."""
    start = Start(arguments, root, ranks)
    for process in start.processes:
        process.join(TIMEOUT)
        if process.exitcode != 0:
            for other in start.processes:
                other.kill()
            raise SystemExit(f"{root} failed:\n{(root / '.output.txt').read_text()[-3000:]}")


def moment(stage: str, root: Path, rng: random.Random) -> tuple[Callable[[], bool], float]:
    """Return what to wait for after a start, and how many seconds longer."""
    losses, begun = root / "losses.txt", time.monotonic()
    seen = losses.stat().st_size if losses.exists() else 0
    more, pause = rng.randrange(1, 400), rng.random()
    logs = len(list(root.glob("logs/*")))
    return {
        "start": (lambda: time.monotonic() > begun + pause, 0.0),
        "pruning": (lambda: len(list(root.glob("logs/*"))) > logs, 0.8 * pause),
        "training": (
            lambda: losses.exists() and losses.stat().st_size >= seen + more,
            0.02 * pause,
        ),
        "checkpoint": (lambda: any(root.glob(f"checkpoints/.*{ENDING}")), 0.002 * pause),
        "final": (lambda: any(root.glob(f".final.*{ENDING}")), 0.5 * pause),
    }[stage]


def kill_at(
    stage: str, arguments: list[str], root: Path, ranks: int, rng: random.Random
) -> str | None:
    """Start the command and kill it; return how, None if it ended before."""
    start = Start(arguments, root, ranks)
    reached, pause = moment(stage, root, rng)
    number = rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
    hit = rng.randint(1, ranks)
    while not reached():
        if not all(process.is_alive() for process in start.processes):
            start.send(signal.SIGKILL, ranks)
            return None
        time.sleep(0.001)
    time.sleep(pause)
    if not start.alive:
        return None
    start.send(number, hit)
    return f"{signal.Signals(number).name} to {hit} of {ranks}"


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
    ] or any(mine[key] != other[key] for key in ("recovery", "warnings")):
        odd.append("report")
    if checkpoints_of(root) != checkpoints_of(whole):
        odd.append(f"checkpoints {checkpoints_of(root)}, not {checkpoints_of(whole)}")
    return odd


def checkpoints_of(root: Path) -> dict[str, int]:
    """Map the name of every checkpoint to its optimizer step."""
    return {
        str(file.relative_to(root)): torch.load(file, weights_only=True)["global_step"]
        for file in sorted(root.rglob("*.ckpt"))
    }


def run(
    work: Path,
    kills: int,
    seed: int,
    stages: tuple[str, ...] = STAGES,
    seconds: float = float("inf"),
) -> Count:
    """Kill and resume until there were so many kills, or the time is over; return the count."""
    rng, count, begun = random.Random(seed), Count(), time.monotonic()
    measure_speed_briefly()
    torch.set_num_threads(1)
    while sum(count.kills.values()) < kills and time.monotonic() - begun < seconds:
        case = list(CASES)[count.runs % len(CASES)]
        ranks = CASES[case].get("trainer", {}).get("devices", 1)
        whole, root = work / case / "whole", work / case / f"killed-{count.runs}"
        arguments = write_config(work / case, case, STEPS)
        if not whole.exists():
            finish(arguments, whole, ranks)
        for stage in stages[: kills - sum(count.kills.values())]:
            how = kill_at(stage, arguments, root, ranks, rng)
            if how is None:
                count.tell(f"{case}: ended before it was killed at {stage}")
                continue
            count.kills[case] += 1
            broken = corrupt_files(root)
            count.corrupt += len(broken)
            batches = len(losses_of(root)) if (root / "losses.txt").exists() else 0
            count.tell(f"{case}: {how} at {stage}, batch {batches}; corrupt {broken}")
            copy = work / case / f"resumed-{sum(count.kills.values())}"
            shutil.copytree(root, copy)
            compare(case, arguments, copy, whole, count)
        compare(case, arguments, root, whole, count)
        count.runs += 1
    return count


def compare(case: str, arguments: list[str], root: Path, whole: Path, count: Count) -> None:
    """Let a killed run end, and count it if it differs from the whole one."""
    finish(arguments, root, CASES[case].get("trainer", {}).get("devices", 1))
    odd = differences(root, whole)
    broken = corrupt_files(root)
    left = [str(path) for path in root.rglob(f".*{ENDING}")]
    count.corrupt += len(broken)
    count.unequal[case] += bool(odd or left)
    count.results += 1
    count.tell(f"{case}: ended, differences {odd}, temporaries left {left}, corrupt {broken}")
    if not odd:
        shutil.rmtree(root)


def script() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        count = run(Path(work), given.kills, given.seed)
    print(f"{count.summary} (seed {given.seed})")
    sys.exit(any(count.unequal.values()) or bool(count.corrupt))


if __name__ == "__main__":
    script()
