"""No file runs code: no checkpoint, model, teacher, dataset or config, from disk or a URL."""

import os
import re

import malicious
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from malicious import attempts, detonators, outcome
from runs import make_data, make_module, make_trainer

from prunelight.callbacks import ShortGPT
from prunelight.runtime.files.atomic_files import reading_fault
from prunelight.runtime.files.checkpoint_files import check_checkpoint_path, read_checkpoint
from prunelight.training.recovery_module import RecoveryModule


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    with malicious.scene(tmp_path_factory.mktemp("scene")) as at:
        yield at


def is_slow(attempt):
    """Leave what takes long to the sweep: runs from a URL, and models but as such."""
    runs = "Trainer" in attempt.name or "own module" in attempt.name or "asynch" in attempt.name
    other_use = "teacher," in attempt.name or "model of a run" in attempt.name
    return other_use or ("disk" in attempt.name and runs) or "named" in attempt.name


@pytest.mark.parametrize(("name", "detonate"), detonators())
def test_the_payloads_are_live(scene, name, detonate):
    if scene.marker.exists():
        scene.marker.rmdir()
    try:
        detonate(scene)
    except Exception:  # what follows the payload may fail
        assert scene.marker.exists(), name
    assert scene.marker.exists(), name
    scene.marker.rmdir()


@pytest.mark.parametrize(
    "attempt",
    [
        pytest.param(each, id=each.name, marks=[pytest.mark.sweep] if is_slow(each) else [])
        for each in attempts()
    ],
)
def test_no_malicious_file_runs(scene, attempt):
    assert outcome(attempt, scene) == ""


def test_nothing_may_switch_the_safe_reading_off(scene, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path = malicious.beside_weights(scene)
    trainer = make_trainer(scene.folder / "run")
    data = make_data(str(scene.model), scene.folder)
    with pytest.raises(ValueError, match="it holds posix.mkdir, which is code"):
        trainer.validate(make_module(str(scene.model)), data, path, weights_only=False)
    with pytest.raises(ValueError, match="it holds posix.mkdir, which is code"):
        RecoveryModule.load_from_checkpoint(path, name=str(scene.model), weights_only=False)
    assert not scene.marker.exists()


def test_a_good_checkpoint_loads_from_a_url(scene):
    root, name = scene.folder / "good", str(scene.model)
    data = make_data(name, scene.folder)
    make_trainer(root, ShortGPT(num_layers=2)).fit(make_module(name), data)
    path = root / "checkpoints" / "epoch=1.ckpt"
    places = (str(path), path.as_uri(), scene.url_of(path), path.open("rb"))
    told = [torch.cat([p.flatten() for p in _loaded(place, name).parameters()]) for place in places]
    assert all(torch.equal(told[0], other) for other in told[1:])
    measured = [
        make_trainer(root / "again").validate(make_module(name), data, place, verbose=False)[0]
        for place in places[:3]
    ]
    assert measured[0] == measured[1] == measured[2]


def _loaded(place, name):
    return RecoveryModule.load_from_checkpoint(
        place, name=name, lora=make_module(name).run.settings.lora
    )


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/no/where.ckpt", "ckpt_path='/no/where.ckpt' does not exist; give a checkpoint"),
        ("file:///no/where.ckpt", "does not exist"),
        ("/tmp", "ckpt_path='/tmp' is a directory; give a checkpoint file"),
        ("simplecache::http://localhost/a.ckpt", "must name one file; download the checkpoint"),
        ("reference://a.json", "must name one file"),
        ("gopher://a/b.ckpt", "has the unknown protocol gopher://; download the checkpoint"),
        ("http://127.0.0.1:9/a.ckpt", "checkpoint http://127.0.0.1:9/a.ckpt cannot be read"),
    ],
)
def test_a_path_that_leads_to_no_checkpoint_is_one_line(path, message):
    with pytest.raises((ValueError, OSError), match=re.escape(message)) as told:
        read_checkpoint(path)
    assert "\n" not in str(told.value)
    if "://127" not in path:
        with pytest.raises((ValueError, OSError), match=re.escape(message)):
            check_checkpoint_path(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "it is a list, and no mapping"),
        ({"a": torch.zeros(1)}, "it has no state_dict, as the checkpoint of a training has"),
        ({"state_dict": {}}, "it has no pytorch-lightning_version"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_one_line(content, message, tmp_path):
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=message):
        read_checkpoint(tmp_path / "a.ckpt")


def test_weights_alone_are_no_training_to_go_on_with(scene):
    root, name = scene.folder / "weights", str(scene.model)
    data = make_data(name, scene.folder)
    weights = ModelCheckpoint(
        root, filename="weights", save_weights_only=True, every_n_train_steps=2
    )
    make_trainer(root, ShortGPT(num_layers=2), weights).fit(make_module(name), data)
    again = make_trainer(root, ShortGPT(num_layers=2))
    with pytest.raises(
        ValueError, match="holds weights without the optimizer's state, .*ckpt_path=null"
    ):
        again.fit(make_module(name), data, ckpt_path=root / "weights.ckpt")


def test_weights_alone_are_the_best_weights_of_a_fit(scene):
    root, name = scene.folder / "best", str(scene.model)
    best = ModelCheckpoint(root, monitor="val/perplexity", save_weights_only=True)
    module = make_module(name)
    make_trainer(root, best).fit(module, make_data(name, scene.folder))
    assert module.restored_step is not None


def test_what_torch_advises_is_not_passed_on(tmp_path):
    for held in (os.getcwd, torch.nn.Linear(1, 1)):
        torch.save(held, tmp_path / "a.ckpt")
        with pytest.raises(Exception, match="weights_only") as torch_says:
            torch.load(tmp_path / "a.ckpt", weights_only=True)
        assert re.fullmatch(r"it holds [\w.]+, which is code", reading_fault(torch_says.value))


def test_a_url_that_nobody_answers_for_is_told_before_any_work():
    pytest.importorskip("aiohttp")
    with pytest.raises(OSError, match=r"checkpoint http://127.0.0.1:9/last.ckpt cannot be read"):
        check_checkpoint_path("http://127.0.0.1:9/last.ckpt")
