"""Several validation texts: figures of their own in logs and report, and what is watched."""

import json
import os
import subprocess
import sys

import pytest
import torch
import train_ranks
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from runs import TEXT, VARIED_TEXT, make_data, make_module, make_trainer, write_model
from test_own_module import OwnData

import prunelight
from prunelight.callbacks import ShortGPT
from prunelight.run.run_state import FINAL
from prunelight.training.text_datamodule import TextDataModule


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


def texts_in(directory):
    """Write two texts; return a mapping of their names to their files."""
    directory.mkdir(parents=True, exist_ok=True)
    named = {"mill": TEXT, "symbols.2": VARIED_TEXT}
    for label, text in named.items():
        (directory / f"{label}.txt").write_text(text, encoding="utf-8")
    return {label: str(directory / f"{label}.txt") for label in named}


def fit(name, root, *callbacks, resume=None, **arguments):
    torch.manual_seed(0)
    trainer = make_trainer(root, *callbacks)
    module, data = make_module(name), make_data(name, root, **arguments)
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    return trainer, module, data


@pytest.fixture(scope="module")
def run(name, tmp_path_factory):
    root = tmp_path_factory.mktemp("two")
    return *fit(name, root, ShortGPT(num_layers=2), validation=texts_in(root)), root


def test_each_text_has_its_own_figures_and_the_first_is_watched_as_if_alone(name, run, tmp_path):
    trainer, module, data, root = run
    final, _ = prunelight.load(root / FINAL)
    stages = json.loads((root / "report.json").read_text())["stages"]
    alone = prunelight.perplexity(final, data.validation_windows())
    other = prunelight.perplexity(final, data.further_validation_windows()["symbols.2"])
    assert [stage["name"] for stage in stages] == ["dense", "pruned", "recovered"]
    assert stages[-1]["perplexity"] == pytest.approx(alone, rel=1e-6)
    found = stages[-1]["examined"]["texts"]["symbols.2"]["perplexity"]
    assert found == pytest.approx(other, rel=1e-6)
    assert abs(found / alone - 1) > 0.01, "two texts of one perplexity would show nothing"
    (first, second) = trainer.validate(module, data, verbose=False)
    assert first["val/perplexity"] == pytest.approx(alone, rel=1e-4)
    assert second["val/perplexity/symbols.2"] == pytest.approx(other, rel=1e-4)
    one, _, _ = fit(name, tmp_path, ShortGPT(num_layers=2), validation=texts_in(tmp_path)["mill"])
    assert one.callback_metrics["val/perplexity"] == trainer.callback_metrics["val/perplexity"]


def test_report_and_summary_show_each_text_and_how_its_windows_were_made(run):
    _, module, _, root = run
    told = (root / "report.md").read_text()
    rows = [line for line in told.splitlines() if line.startswith("| perplexity ")]
    assert [row.split("|")[1].strip() for row in rows[:2]] == [
        "perplexity mill",
        "perplexity symbols.2",
    ]
    windows = "text as it stands; 3 windows of 32 tokens that do not overlap"
    assert sum(line.startswith("| ") and windows in line for line in told.splitlines()) == 2
    for shown in (module.summary(), (root / "report.html").read_text()):
        assert "perplexity mill" in shown
        assert "perplexity symbols.2" in shown


def test_a_text_behind_the_first_may_be_watched(name, tmp_path):
    watched = ModelCheckpoint(tmp_path / "best", monitor="val/perplexity/symbols.2")
    trainer, _, _ = fit(name, tmp_path, watched, validation=texts_in(tmp_path))
    assert watched.best_model_score == min(
        watched.best_model_score, trainer.callback_metrics["val/perplexity/symbols.2"]
    )
    assert trainer.checkpoint_callbacks[0].best_model_path


@pytest.mark.parametrize(
    ("callback", "error"),
    [
        (EarlyStopping("val/perplexity/symbol"), "did you mean val/perplexity/symbols.2"),
        (EarlyStopping("val/perplexity/symbols.2", mode="max"), "would keep the worst step"),
    ],
)
def test_a_wrong_metric_of_a_text_is_one_error(name, tmp_path, callback, error):
    with pytest.raises(ValueError, match=error):
        fit(name, tmp_path, callback, validation=texts_in(tmp_path))


def test_another_second_text_is_measured_again_and_a_resume_with_it_refused(name, run, tmp_path):
    *_, root = run
    texts = {**texts_in(tmp_path), "symbols.2": str(tmp_path / "mill.txt")}
    report = json.loads((root / "report.json").read_text())
    with pytest.raises(ValueError, match="validation"):
        fit(
            name,
            root,
            ShortGPT(num_layers=2),
            validation=texts,
            resume=root / "checkpoints" / "epoch=0.ckpt",
        )
    fit(name, root, ShortGPT(num_layers=2), validation=texts)
    again = json.loads((root / "report.json").read_text())
    for before, after in zip(report["stages"][:2], again["stages"][:2], strict=True):
        assert after["perplexity"] == before["perplexity"]
        assert after["examined"]["texts"]["symbols.2"]["perplexity"] == pytest.approx(
            after["perplexity"], rel=1e-6
        )


class OwnTexts(OwnData):
    """Own data of several validation dataloaders."""

    def __init__(self, form):
        super().__init__(16)
        self.form = form

    def val_dataloader(self):
        loaders = [self._loader(self.rows[8:12]), self._loader(self.rows[12:])]
        return loaders if self.form is list else dict(zip(("a", "b"), loaders, strict=True))


@pytest.mark.parametrize(("form", "second"), [(list, "1"), (dict, "b")])
def test_own_data_may_give_several_dataloaders(name, tmp_path, form, second):
    trainer, module = make_trainer(tmp_path, ShortGPT(num_layers=2)), make_module(name)
    data = OwnTexts(form)
    trainer.fit(module, data)
    final, _ = prunelight.load(tmp_path / FINAL)
    last = module.record.stages[-1]
    told = (
        prunelight.perplexity(final, data.rows[8:12]),
        prunelight.perplexity(final, data.rows[12:]),
    )
    assert last.perplexity == pytest.approx(told[0], rel=1e-6)
    assert last.examined["texts"][second]["perplexity"] == pytest.approx(told[1], rel=1e-6)
    assert f"val/perplexity/{second}" in trainer.callback_metrics


@pytest.mark.parametrize(
    ("validation", "error"),
    [
        ({}, "validation={} must not be empty"),
        ({"a b": "sample:validation"}, "the name 'a b' must be .* write a_b"),
        ({"a/b": "sample:validation"}, "the name 'a/b' must be .* write a_b"),
        ({"": "sample:validation"}, "the name '' must be .* write text"),
        ({"a": "sample:validation", "A": "sample:train"}, "names a text twice, as 'a' and as 'A'"),
        ({"a": "sample:validation", "b": ""}, r"validation\.b='' must not be empty"),
        ({"a": "sample:validation", "b": []}, r"validation\.b=\[\] must not be empty"),
    ],
)
def test_wrong_texts_are_refused_before_anything_is_read(name, validation, error):
    with pytest.raises(ValueError, match=error):
        TextDataModule(name, validation=validation)


def test_a_text_shorter_than_a_window_is_named(name, tmp_path):
    (tmp_path / "short.txt").write_text("No more.")
    texts = {**texts_in(tmp_path), "short": str(tmp_path / "short.txt")}
    with pytest.raises(ValueError, match=r"validation\.short='.*short\.txt' holds 0 examples"):
        fit(name, tmp_path, ShortGPT(num_layers=2), validation=texts)


def test_a_corpus_that_cannot_be_reached_names_its_file(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    monkeypatch.setenv("PRUNELIGHT_CORPORA", "")
    texts = {**texts_in(tmp_path), "c4": "c4"}
    with pytest.raises((ValueError, OSError), match=r"c4-validation\.00000-of-00008\.json\.gz"):
        fit(name, tmp_path, ShortGPT(num_layers=2), validation=texts)


@pytest.mark.slow
def test_two_processes_measure_what_one_measures(name, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run(
        [*launch, train_ranks.__file__, name, tmp_path / "two", "ddp:texts:0"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    root = tmp_path / "two" / "ddp-texts-0"
    told = json.loads((root / "digests.json").read_text())
    final, _ = prunelight.load(root / FINAL)
    data = make_data(name, tmp_path, validation=train_ranks.texts_of(root))
    one = prunelight.perplexity(final, data.further_validation_windows()["symbols"])
    stages = json.loads((root / "report.json").read_text())["stages"]
    found = stages[-1]["examined"]["texts"]["symbols"]["perplexity"]
    assert found == pytest.approx(one, rel=1e-5)
    assert told["further"] == pytest.approx(one, rel=1e-4)
    # One of the two tokenises, the other maps its files, which are gone in the end.
    assert told["tokenised"] == [["calibration", "train", "validation", "validation/symbols"], []]
    assert told["files"] == []
