"""Measure how much of a run's time its cost table tells, from the start of Python to its report.

    python tests/reliability/cost_table.py [--quickstart 1]

Each kind of run is started as a command, with its output in a pipe. The rows of report.json are
summed and held against the time until report.md had its last byte. Whether no line came for more
than 30 seconds is counted too. `--quickstart 1` adds quickstart.yaml with 5 steps, which takes
minutes: its model is SmolLM2-135M-Instruct from a Q4_1 GGUF, de-quantized on load.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from rows import ROOT, Row, run

sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from runs import VARIED_TEXT, write_model

LEAST, MOST = 0.97, 1.01  # of the time of a run
LONGEST = 30.0  # seconds without a line

METHODS = {
    "depth and LoRA": ["ShortGPT", "--trainer.callbacks.num_layers", "2"],
    "one by one": ["SLEB", "--trainer.callbacks.num_layers", "2"],
    "zeros and full training": ["DLP", "--trainer.callbacks.sparsity", "0.5"],
    "distillation": ["ShortGPT", "--trainer.callbacks.num_layers", "2", "--model.loss", "kd_topk"],
    "nothing trained": ["SliceGPT", "--trainer.callbacks.slice_ratio", "0.25"],
}
MODEL = {
    "zeros and full training": ["--model.recovery", "full"],
    "nothing trained": ["--model.recovery", "none"],
}


def tiny_runs(folder: Path) -> dict[str, list[str]]:
    """The arguments of each kind of run of a tiny model."""
    name, text = write_model(folder / "model"), folder / "text.txt"
    text.write_text(VARIED_TEXT * 4, encoding="utf-8")
    data = [option for kind in KINDS for option in (f"--data.{kind}", str(text))]
    sizes = {"seq_len": 32, "batch_size": 2, "num_calibration": 8, "num_validation": 8}
    data += [option for key, size in sizes.items() for option in (f"--data.{key}", str(size))]
    steps = ["--trainer.max_steps", "60", "--trainer.devices", "1"]
    common = ["--model.name", name, *data, *steps]
    return {
        kind: [*common, *MODEL.get(kind, []), "--trainer.callbacks", *method]
        for kind, method in METHODS.items()
    }


KINDS = ("train", "validation", "calibration")


def start(arguments: list[str], root: Path) -> tuple[float, float, float]:
    """Run a command; return the seconds to its report, those of the rows, the longest silence."""
    command = [sys.executable, "-m", "prunelight.cli", "fit", *arguments]
    began = time.time()
    process = subprocess.Popen(
        [*command, "--trainer.default_root_dir", str(root)],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    moments = [began]
    assert process.stdout is not None
    reader = threading.Thread(
        target=lambda: moments.extend(time.time() for _ in iter(process.stdout.readline, b""))
    )
    reader.start()
    process.wait()
    reader.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    told = json.loads((root / "report.json").read_text(encoding="utf-8"))["costs"]
    rows = sum(cost["seconds"] - cost["earlier_seconds"] for cost in told if not cost["reused"])
    whole = (root / "report.md").stat().st_mtime - began
    silences = [b - a for a, b in zip(moments, [*moments[1:], time.time()], strict=True)]
    return whole, rows, max(silences)


def measure(options: argparse.Namespace) -> list[Row]:
    """Measure each kind of run once."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        kinds = tiny_runs(Path(folder))
        if options.quickstart:
            small = ["--trainer.max_steps", "5", "--data.num_calibration", "4"]
            kinds["quickstart.yaml, 5 steps"] = ["--config", "quickstart.yaml", *small]
        for number, (kind, arguments) in enumerate(kinds.items()):
            whole, told, silence = start(arguments, Path(folder) / f"run-{number}")
            note = f"{told:.1f} of {whole:.1f} s: {100 * told / whole:.1f} %"
            rows.append(
                Row(
                    f"costs sum to 97 %: {kind}",
                    1,
                    int(LEAST * whole <= told <= MOST * whole),
                    note,
                )
            )
            note = f"longest silence in a file {silence:.0f} s"
            rows.append(Row(f"a line every 30 s: {kind}", 1, int(silence <= LONGEST), note))
    return rows


if __name__ == "__main__":
    run("cost_table", measure, quickstart=0)
