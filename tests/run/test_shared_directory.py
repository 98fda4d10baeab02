"""A run alone has its directory: other runs wait, files of others stay, links stay links."""

import multiprocessing
import os
import time

import pytest
import torch
import yaml
from runs import make_data, make_module, make_trainer, write_model

from prunelight.callbacks import RecoveryCheckpoint, ShortGPT
from prunelight.cli import main
from prunelight.evaluation.report.writing import PICTURES, check_report_files, write_whole
from prunelight.run.preflight import check_output
from prunelight.runtime.files.directory_lock import DirectoryLock
from prunelight.training.trainer import Trainer

REPORT_FILES = [
    *("report.md", "report.json", "report.html", "analysis.md", "analysis.json"),
    *("layers.png", "layers-2.png", "cka.png", "cka-3.png", "analysis-cka.png"),
]


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("name", REPORT_FILES)
@pytest.mark.parametrize("content", [b"mine", b"", b"\x89PNG\r\n\x1a\n\xff", b"{}"])
def test_a_file_of_others_with_a_name_of_the_report_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileExistsError, match=f"{name} exists and was not written by prunelight"):
        check_output(tmp_path)
    assert (tmp_path / name).read_bytes() == content


def test_every_name_that_a_run_writes_is_known_to_the_check(name, tmp_path):
    trainer = make_trainer(tmp_path, ShortGPT(num_layers=1), max_epochs=1)
    trainer.fit(make_module(name), make_data(name, tmp_path))
    written = {file.name for file in tmp_path.iterdir() if file.is_file()}
    written -= {"text.txt", ".prunelight.lock"}
    assert written <= {"report.md", "report.json", "report.html", *PICTURES}
    check_report_files(tmp_path)
    (tmp_path / "report.md").unlink()  # a kill came before it was written
    check_report_files(tmp_path)


def test_an_analysis_leaves_the_report_that_lies_beside_it(name, tmp_path):
    trainer = make_trainer(tmp_path, ShortGPT(num_layers=1), max_epochs=1)
    module, data = make_module(name), make_data(name, tmp_path)
    trainer.fit(module, data)
    report = {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    Trainer(accelerator="cpu", devices=1, logger=False, default_root_dir=tmp_path).analyze(
        make_module(name), data
    )
    assert (tmp_path / "analysis.md").is_file()
    kept = {file: file.read_bytes() for file in report if file.name != ".prunelight.lock"}
    assert kept.items() <= report.items()


def test_a_picture_of_an_older_version_is_known_by_its_report(tmp_path):
    (tmp_path / "layers.png").write_bytes(b"\x89PNG without facts")
    (tmp_path / "report.md").write_text("# Pruning report: m\n\n![scores](layers.png)\n")
    check_report_files(tmp_path)
    write_whole(tmp_path / "report.md", "# Pruning report: m\n")
    with pytest.raises(FileExistsError, match="layers.png"):
        check_report_files(tmp_path)


def hold(directory, ready):
    lock = DirectoryLock(directory)
    ready.set()
    time.sleep(60)
    lock.release()


@pytest.mark.parametrize("verb", ["fit", "prune", "analyze"])
def test_a_second_run_is_refused_before_any_work(name, tmp_path, verb):
    ready = multiprocessing.get_context("fork").Event()
    other = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path, ready))
    other.start()
    assert ready.wait(30)
    module, data = make_module(name), make_data(name, tmp_path)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        default_root_dir=tmp_path,
        callbacks=[ShortGPT(num_layers=1)],
    )
    with pytest.raises(RuntimeError, match=f"in use by process {other.pid} on .*wait"):
        getattr(trainer, verb)(module, datamodule=data)
    other.kill()
    other.join()
    assert module.model is None
    assert not list(tmp_path.glob("pruned-*"))


def test_a_run_that_failed_or_ended_lets_others_in(name, tmp_path):
    class Odd(ShortGPT):
        def plan(self, model, windows):
            raise ValueError("odd")

    for callback, error in ((Odd(num_layers=1), "odd"), (ShortGPT(num_layers=1), None)):
        trainer = make_trainer(tmp_path, callback, max_epochs=1)
        module, data = make_module(name), make_data(name, tmp_path)
        if error:
            with pytest.raises(ValueError, match=error):
                trainer.fit(module, data)
        else:
            trainer.fit(module, data)
        ready = multiprocessing.get_context("fork").Event()
        other = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path, ready))
        other.start()
        assert ready.wait(30)
        other.kill()
        other.join()


def test_links_stay_links_and_what_is_of_others_stays_over_three_starts(name, tmp_path):
    disk = tmp_path / "disk"
    for place in ("run", "result"):
        (disk / place).mkdir(parents=True)
    root = tmp_path / "run"
    root.symlink_to(disk / "run")
    (root / "final").symlink_to(disk / "result")
    foreign = [".final.tmp", ".final.old", ".x.tmp", ".report.md.7.tmp", ".adapter.tmp"]
    for other in foreign:
        (root / other).write_text("theirs")
    for steps in (2, 3, 4):  # the second finds a finished run
        trainer = Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            max_steps=steps,
            default_root_dir=root,
            callbacks=[ShortGPT(num_layers=1), RecoveryCheckpoint(1)],
        )
        trainer.fit(make_module(name), datamodule=make_data(name, tmp_path))
        assert root.is_symlink()
        assert (root / "final").is_symlink()
        assert (disk / "result" / "config.json").is_file()
        assert all((root / other).read_text() == "theirs" for other in foreign)
    assert os.listdir(disk) == ["run", "result"] or os.listdir(disk) == ["result", "run"]


@pytest.mark.parametrize("content", [b"mine", "of another program"])
def test_a_foreign_last_checkpoint_is_not_overwritten(name, tmp_path, content):
    file = tmp_path / "checkpoints" / "last.ckpt"
    file.parent.mkdir()
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save({"state_dict": {}}, file)
    before = file.read_bytes()
    trainer = Trainer(
        accelerator="cpu", logger=False, default_root_dir=tmp_path, callbacks=[RecoveryCheckpoint()]
    )
    with pytest.raises(FileExistsError, match="last.ckpt is damaged, or no checkpoint of prune"):
        trainer.fit(make_module(name), datamodule=make_data(name, tmp_path), ckpt_path=None)
    assert file.read_bytes() == before


def test_the_settings_of_a_run_replace_no_config_of_the_user(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("mill and sea " * 400)
    config = {
        "model": {"name": name},
        "data": dict.fromkeys(("train", "validation", "calibration"), "text.txt"),
        "trainer": {"accelerator": "cpu", "logger": False, "max_steps": 1, "default_root_dir": "."},
    }
    mine = yaml.safe_dump(config)
    (tmp_path / "config.yaml").write_text(mine)
    with pytest.raises(SystemExit, match="config.yaml exists, and the run would write"):
        main(["fit", "--config", "config.yaml"])
    assert (tmp_path / "config.yaml").read_text() == mine
