"""Runs that learn from the dense model, and what they refuse."""

import json
import re
from dataclasses import asdict

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule
from runs import make_data, make_module, make_trainer, write_model
from safetensors.torch import load_file
from tiny import token_windows

import prunelight
from prunelight.callbacks import ShortGPT, SliceGPT
from prunelight.cli import main
from prunelight.planning.plan import Plan
from prunelight.planning.steps import RemoveLayers
from prunelight.recovery.distillation.language_head import LanguageHead
from prunelight.recovery.distillation.objective import (
    Distillation,
    Objective,
)
from prunelight.run.teacher import TeacherSource, _release
from prunelight.training.text_datamodule import TextDataModule

CPU = torch.device("cpu")


# --- fits -------------------------------------------------------------------------------------


RUNS = {
    "kd": {"temperature": 2.0, "lm_weight": 0.1, "hidden_weight": 0.5},
    "kd_topk": {"k": 256, "lm_weight": 0.0},
}


class Watched(TextDataModule):
    """Data that notes whether there is a student while its examples are read."""

    def batch(self, role, places):
        self.students.append(self.trainer.lightning_module.model)
        return super().batch(role, places)


def distance(teacher, student, windows):
    """The divergence of a student from its teacher."""
    objective = Objective("kd", Distillation(lm_weight=0.0))
    objective.use_teacher(teacher, [])
    objective.start(student)
    with torch.no_grad():
        return objective(student, {"input_ids": windows, "labels": windows}).item()


def fit(name, root, loss, ckpt_path=None):
    data = make_data(name, root)
    data.__class__, data.students = Watched, []
    settings = Distillation(**RUNS[loss])
    module = make_module(name, loss=loss, distillation=settings, learning_rate=2e-3)
    make_trainer(root, ShortGPT(num_layers=2)).fit(module, data, ckpt_path=ckpt_path)
    return module, data


@pytest.mark.parametrize("loss", RUNS)
def test_a_fit_learns_from_its_teacher_resumes_and_reports(loss, name, teacher, tmp_path, caplog):
    caplog.set_level("INFO")
    module, data = fit(name, tmp_path, loss)
    costs = [cost.name for cost in module.record.costs]
    assert ("ask the teacher" in costs) == (loss == "kd_topk")
    final = load_file(tmp_path / "final" / "model.safetensors")
    (base,) = tmp_path.glob("pruned-*")
    windows = data.validation_windows()
    before = distance(teacher, prunelight.load(base)[0], windows)
    assert distance(teacher, module.model, windows) < 0.9 * before
    assert module.objective.teacher is None, "its memory is free"
    assert "6 layers, memory" in caplog.text
    if loss == "kd_topk":
        asked = data.students[len(data.examples("train")) :]  # after each was read once
        assert asked
        assert not any(asked), "the student is not in memory beside the teacher"
    caplog.clear()
    checkpoint = tmp_path / "checkpoints" / "epoch=0.ckpt"
    saved = torch.load(checkpoint, weights_only=True)
    assert all("lora" in key for key in saved["state_dict"])
    fit(name, tmp_path, loss, ckpt_path=checkpoint)
    resumed = load_file(tmp_path / "final" / "model.safetensors")
    assert all(torch.equal(resumed[key], final[key]) for key in final)
    if loss == "kd_topk":
        assert "reusing the teacher cache" in caplog.text
        assert "6 layers, memory" not in caplog.text, "a whole cache needs no teacher"
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["recovery"]["loss"] == loss
    assert ("distillation.k" in report["recovery"]) == (loss == "kd_topk")


def test_all_of_it_is_reached_from_the_command_line(capsys):
    options = ["--model.loss=kd_topk", "--model.distillation.k=32", "--model.chunked_loss=false"]
    with pytest.raises(SystemExit):
        main(["fit", "--config=quickstart.yaml", *options, "--print_config"])
    told = yaml.safe_load(capsys.readouterr().out)["model"]
    assert (told["loss"], told["chunked_loss"]) == ("kd_topk", False)
    assert told["distillation"] == {**asdict(Distillation()), "k": 32}


def test_without_pruning_a_run_learns_from_a_teacher_that_is_named(name, tmp_path):
    dense, tokenizer = prunelight.load(name)
    plan = ShortGPT(num_layers=1).plan(dense, token_windows())
    pruned = prunelight.apply(dense, plan)
    prunelight.save(pruned, tokenizer, tmp_path / "pruned", plan=plan)
    settings = Distillation(name=name, k=3)
    module = make_module(str(tmp_path / "pruned"), loss="kd_topk", distillation=settings)
    # Rows are found by their tokens: who loads them does not matter.
    make_trainer(tmp_path, max_steps=1).fit(module, make_data(name, tmp_path, num_workers=1))
    assert module.model.config.num_hidden_layers == 5
    (file,) = tmp_path.glob("teacher-*/block-*")
    told = json.loads((file.parent / "teacher.json").read_text())["teacher"]
    assert told["dtype"] == module.record.dtype, "a run that prunes would make the same cache"
    _release(module.run)
    assert module.model is not None, "what was trained cannot be read again"


@pytest.mark.parametrize("held", ["nf4", "fp4", "int8"])
def test_a_quantized_teacher_says_nearly_the_same(held, tmp_path):
    pytest.importorskip("bitsandbytes", reason="pip install 'prunelight[quantization]'")
    name = write_model(tmp_path / "m", hidden_size=64, intermediate_size=128)
    dense, _ = prunelight.load(name)
    quantized = TeacherSource(name, "auto", held, False).load(CPU)
    assert type(quantized.model.layers[0].mlp.up_proj).__name__.startswith("Linear")
    assert type(quantized.lm_head) is torch.nn.Linear
    assert LanguageHead(quantized).is_separable()
    assert 0 < distance(quantized, dense, token_windows()) < 1e-2


# --- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0}, r"distillation.temperature=0 must be above 0"),
        ({"lm_weight": 1.5}, r"distillation.lm_weight=1.5 must lie in \[0, 1\]"),
        ({"k": 0}, r"distillation.k=0 must be at least 1"),
        ({"hidden_weight": -1}, r"distillation.hidden_weight=-1 must be at least 0"),
        ({"teacher": "nf8"}, r"distillation.teacher='nf8' must be one of memory, nf4"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Distillation(**settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": "mse"}, "loss='mse' must be one of lm, kd, kd_topk"),
        ({"loss": "kd", "recovery": "none"}, "loss=kd needs training, recovery=none has none"),
        (
            {"loss": "kd_topk", "distillation": Distillation(hidden_weight=0.1)},
            "hidden_weight=0.1 needs the teacher's hidden states, which the cache .*set loss=kd",
        ),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_module("x", **arguments)


@pytest.mark.parametrize(
    ("loss", "settings", "callback", "message"),
    [
        ("kd_topk", {"k": 5000}, ShortGPT(num_layers=1), "k=5000 must be at most .* vocabulary"),
        (
            "kd",
            {"hidden_weight": 0.1},
            SliceGPT(slice_ratio=0.25),
            "hidden_weight=0.1 compares hidden states, but slicing rotates",
        ),
        ("kd", {"name": "OTHER"}, ShortGPT(num_layers=1), "OTHER' has another vocabulary"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_it_is_pruned(
    loss, settings, callback, message, name, tmp_path
):
    if "name" in settings:
        settings = {"name": write_model(tmp_path / settings["name"], vocab_size=700)}
    module = make_module(name, loss=loss, distillation=Distillation(**settings))
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, callback).fit(module, make_data(name, tmp_path))
    assert not list(tmp_path.glob("pruned-*"))


def test_a_teacher_that_exists_only_in_memory_is_refused_before_it_is_pruned(name, tmp_path):
    module = make_module("in memory", loss="kd")
    module.model, module.tokenizer = prunelight.load(name)
    with pytest.raises(ValueError, match="this one exists only in memory; save it .* as name, or"):
        make_trainer(tmp_path, ShortGPT(num_layers=1)).fit(module, make_data(name, tmp_path))
    assert not list(tmp_path.glob("pruned-*"))


def test_a_teacher_whose_layers_cannot_be_matched_is_refused(name, tmp_path):
    dense, tokenizer = prunelight.load(name)
    pruned = prunelight.apply(dense, Plan("by hand", {}, {}, (RemoveLayers((1,)),)))
    prunelight.save(pruned, tokenizer, tmp_path / "pruned")  # no plan beside it
    settings = Distillation(name=name, hidden_weight=1.0)
    module = make_module(str(tmp_path / "pruned"), loss="kd", distillation=settings)
    with pytest.raises(ValueError, match="which layers the student's 5 stand for.* to 6"):
        make_trainer(tmp_path).fit(module, make_data(name, tmp_path))


class OtherData(LightningDataModule):
    """Data that has no examples to number."""

    def train_dataloader(self):
        return [{"input_ids": token_windows(), "labels": token_windows()}]


def test_a_cache_of_data_that_cannot_be_listed_is_refused(name, tmp_path, caplog):
    module = make_module(name, loss="kd_topk")
    with pytest.raises(ValueError, match="give the Trainer a TextDataModule, or set loss=kd"):
        make_trainer(tmp_path).fit(module, OtherData())
    assert f"distillation.name=None: the teacher is {name} as it is" in caplog.text


@pytest.mark.parametrize(
    ("loss", "settings", "needed"),
    [
        ("lm", {"temperature": 2.0}, "distillation.temperature has no effect: .*kd or kd_topk"),
        ("kd", {"k": 3}, "distillation.k has no effect: it needs loss=kd_topk"),
        ("kd", {"cache": "x"}, "distillation.cache has no effect: it needs loss=kd_topk"),
    ],
)
def test_settings_without_effect_warn(loss, settings, needed, caplog):
    make_module("x", loss=loss, distillation=Distillation(**settings))
    (record,) = caplog.records
    assert re.search(needed, record.getMessage())
