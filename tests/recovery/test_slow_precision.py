"""A dtype that this CPU computes slowly in is told before the model is read."""

import os
import subprocess
import sys

import pytest
import torch

from prunelight.recovery.precision import slow_precision
from prunelight.runtime.devices import slowness

# oneDNN then takes a CPU for one of 2013, which has no instructions for bfloat16.
OLD_CPU = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}


def run_fit(name, text, root, *arguments):
    data = [
        option
        for kind in ("train", "validation", "calibration")
        for option in (f"--data.{kind}", text)
    ]
    sizes = (
        "--data.seq_len 16 --data.num_calibration 2 --data.num_validation 2 --trainer.max_steps 1"
    )
    command = ["-m", "prunelight.cli", "fit", "--model.name", name, *data, *sizes.split()]
    trainer = ["--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(root)]
    return subprocess.run(
        [sys.executable, *command, *trainer, *arguments],
        env=OLD_CPU,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_checkpoint_in_bfloat16_is_told_on_an_old_cpu_before_it_is_loaded(tmp_path):
    from runs import TEXT, write_model

    from prunelight.models.loading import load

    name, text = write_model(tmp_path / "model"), tmp_path / "text.txt"
    model, _ = load(name, dtype="bfloat16")
    model.save_pretrained(name)
    text.write_text(TEXT)
    # A file of weights that cannot be read: the warning comes before the error.
    (tmp_path / "model" / "model.safetensors").write_bytes(b"no weights")
    ended = run_fit(name, str(text), tmp_path / "run")
    assert ended.returncode == 1
    lines = [line for line in ended.stderr.splitlines() if not line.startswith("importing ")]
    told, *_, error = filter(None, lines)
    assert told.startswith("bfloat16 takes about ")
    assert "set model.dtype=float32" in told
    assert "is damaged" in error


@pytest.mark.parametrize(
    ("dtype", "precision", "recovery", "option"),
    [
        (torch.bfloat16, "32-true", "none", "model.dtype=float32"),
        (torch.float16, "32-true", "lora", "model.dtype=float32"),
        (torch.float32, "bf16-mixed", "lora", "trainer.precision=32-true"),
        (torch.float32, "bf16-true", "full", "trainer.precision=32-true"),
        (torch.float32, "16-mixed", "full", "trainer.precision=32-true"),
        (torch.float32, "bf16-mixed", "none", None),  # trains nothing
        (torch.float32, "32-true", "lora", None),
    ],
)
def test_each_option_that_makes_a_run_slow_is_named(dtype, precision, recovery, option):
    times = {torch.float32: 1.0, torch.bfloat16: 10.0, torch.float16: 12.0}
    told = slow_precision(dtype, precision, recovery, times.get)
    assert (told is None) == (option is None)
    assert option is None or option in told


def test_float32_is_never_slow():
    assert slowness(torch.float32, torch.device("cpu")) == 1.0
