"""Checkpoints written by a thread: what is in them, in which order, and what a kill leaves."""

import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import yaml
from killed_at_rename import kill_at_rename
from lightning.pytorch import Callback
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from runs import TEXT, make_data, make_module, make_trainer, write_model
from safetensors.torch import load_file
from test_exact_resume import files_of_at_most

from prunelight.callbacks import RecoveryCheckpoint, ShortGPT
from prunelight.cli import main
from prunelight.training.resuming.checkpoint_io import BackgroundCheckpointIO, write_checkpoint
from prunelight.training.resuming.kept_checkpoints import DelayedRemovals

SWEEP = [pytest.mark.slow, pytest.mark.sweep]
CONTENT = {"state_dict": {}, "pytorch-lightning_version": "2.6.0"}


@pytest.fixture
def files():
    files = BackgroundCheckpointIO()
    files.removals = DelayedRemovals()
    yield files
    files.teardown()


def test_a_file_holds_what_was_there_when_it_was_given(files, tmp_path):
    weights = torch.zeros(100_000)
    files.save_checkpoint({**CONTENT, "x": weights, "deep": [{"y": weights}]}, tmp_path / "a.ckpt")
    weights += 1
    loaded = files.load_checkpoint(tmp_path / "a.ckpt")  # waits for the write
    assert torch.equal(loaded["x"], torch.zeros(100_000))
    assert torch.equal(loaded["deep"][0]["y"], torch.zeros(100_000))


def test_a_file_goes_only_after_the_resume_point_is_on_disk(files, tmp_path):
    old, point, gate = tmp_path / "old.ckpt", tmp_path / "last.ckpt", threading.Event()
    files.save_checkpoint(CONTENT, old)
    files.finish()
    files._do(gate.wait)  # a slow disk
    files.remove_checkpoint(old)
    files._do(write_checkpoint, CONTENT, point)
    files.carry_out_removals()
    assert files.removals.waiting == []
    assert old.exists()
    assert not point.exists()
    gate.set()
    files.finish()
    assert point.exists()
    assert not old.exists()


def test_a_file_that_is_written_again_is_not_removed(files, tmp_path):
    for _ in range(2):
        files.save_checkpoint(CONTENT, tmp_path / "best.ckpt")
        files.remove_checkpoint(tmp_path / "best.ckpt")
        files.save_checkpoint(CONTENT, tmp_path / "best.ckpt")
        files.carry_out_removals()
    files.finish()
    assert (tmp_path / "best.ckpt").exists()


def test_a_write_that_fails_is_told_once_by_the_next_call_and_leaves_the_file_before(
    files, tmp_path
):
    path = tmp_path / "last.ckpt"
    files.save_checkpoint({**CONTENT, "x": torch.ones(3)}, path)
    files.finish()
    told = "cannot write .*last.ckpt: File too large; checkpoint .*last.ckpt is intact"
    with files_of_at_most(10_000):
        files.save_checkpoint({"x": torch.rand(100_000)}, path)
        with pytest.raises(OSError, match=told):
            files.save_checkpoint({"x": torch.ones(4)}, path)
        files.finish()
    assert torch.equal(files.load_checkpoint(path)["x"], torch.ones(3))
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_run_whose_disk_is_full_ends_with_that_error(tmp_path):
    class Full(Callback):
        def on_train_start(self, trainer, pl_module):
            stack.enter_context(files_of_at_most(10_000))

    name = write_model(tmp_path / "model")
    callbacks = [Full(), ShortGPT(num_layers=2), RecoveryCheckpoint(1)]
    trainer = make_trainer(tmp_path / "run", *callbacks, plugins=[AsyncCheckpointIO()])
    told = "cannot write .*ckpt: File too large"
    with ExitStack() as stack, pytest.raises(OSError, match=told):
        trainer.fit(make_module(name), make_data(name, tmp_path))


def test_a_link_whose_file_is_gone_is_removed(files, tmp_path):
    link = tmp_path / "last-metric.ckpt"
    link.symlink_to(tmp_path / "gone.ckpt")
    files.remove_checkpoint(link)
    files.carry_out_removals()
    files.finish()
    assert not link.is_symlink()


@pytest.mark.parametrize("delayed", [True, False])
def test_a_file_stays_where_what_replaces_it_could_not_be_written(files, tmp_path, delayed):
    files.removals = DelayedRemovals() if delayed else None
    old, new = tmp_path / "old.ckpt", tmp_path / "new.ckpt"
    files.save_checkpoint(CONTENT, old)
    files.finish()
    with files_of_at_most(10_000):
        files.save_checkpoint({"x": torch.rand(100_000)}, new)
        files.remove_checkpoint(old)
        files.carry_out_removals()
        with pytest.raises(OSError, match="cannot write .*new.ckpt"):
            files.finish()
    assert old.exists()
    assert not new.exists()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("background")
    name = write_model(root / "model", num_hidden_layers=4)
    (root / "text.txt").write_text(TEXT, encoding="utf-8")
    keeper = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"monitor": "val/perplexity", "filename": "{step}"},
    }
    config = {
        "model": {"name": name, "probes": False, "learning_rate": 0.01, "warmup_steps": 0},
        "data": {
            **dict.fromkeys(("train", "validation", "calibration"), str(root / "text.txt")),
            **{"seq_len": 32, "num_calibration": 4, "num_validation": 3, "batch_size": 2},
        },
        "trainer": {
            **{"accelerator": "cpu", "devices": 1, "max_steps": 6, "val_check_interval": 2},
            "plugins": ["lightning.pytorch.plugins.io.AsyncCheckpointIO"],
            "callbacks": [
                {"class_path": "ShortGPT", "init_args": {"num_layers": 1}},
                {"class_path": "RecoveryCheckpoint", "init_args": {"every_n_train_steps": 1}},
                keeper,
            ],
        },
    }
    (root / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    main(command(root, "whole"))
    return root


def command(root, run):
    root_of_run = ["--trainer.default_root_dir", str(root / run)]
    return ["fit", "--config", str(root / "config.yaml"), *root_of_run]


def kept(root):
    return sorted(path.name for path in Path(root).rglob("*.ckpt"))


@pytest.mark.parametrize("number", [1, *(pytest.param(later, marks=SWEEP) for later in (3, 6, 8))])
def test_a_run_that_is_killed_while_a_checkpoint_is_written_ends_as_a_whole_one(place, number):
    run = f"killed-{number}"
    kill_at_rename(number, r".*\.ckpt", command(place, run))
    main(command(place, run))
    weights, whole = (
        load_file(place / each / "final" / "model.safetensors") for each in (run, "whole")
    )
    assert weights.keys() == whole.keys()
    assert all(torch.equal(weights[name], whole[name]) for name in whole)
    assert kept(place / run) == kept(place / "whole")


@pytest.mark.slow
@pytest.mark.sweep  # test_strategies.py writes by a thread in two processes too
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_leave_what_they_leave_without_a_thread(place, strategy):
    given = ["--trainer.devices", "2", "--trainer.strategy", strategy]
    runs = {f"{strategy}-thread": [], f"{strategy}-plain": ["--trainer.plugins", "null"]}
    for run, plugins in runs.items():
        subprocess.run(
            [sys.executable, "-m", "prunelight.cli", *command(place, run), *given, *plugins],
            check=True,
            capture_output=True,
        )
    one, other = (load_file(place / run / "final" / "model.safetensors") for run in runs)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    one, other = (kept(place / run) for run in runs)
    assert one == other
