"""Recovery that learns from the dense model: in memory, or from what it said once."""

import copy
import json
import re
import shutil
from collections import namedtuple
from dataclasses import asdict

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule
from runs import TEXT, make_data, make_module, make_trainer, write_model
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import tiny_model, token_windows

import prunelight
from prunelight.callbacks import ShortGPT, SliceGPT
from prunelight.cli import main
from prunelight.losses import counted_targets, top_k
from prunelight.planning.plan import Plan
from prunelight.planning.steps import MergeLayers, RemoveLayers
from prunelight.recovery.distillation.language_head import LanguageHead
from prunelight.recovery.distillation.objective import (
    Distillation,
    Objective,
    hidden_state_loss,
    kept_layers,
)
from prunelight.recovery.distillation.teacher_cache import BLOCK, TeacherCache
from prunelight.run.teacher import TeacherSource, _release
from prunelight.training.text_datamodule import TextDataModule

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def teacher(name):
    return prunelight.load(name)[0]


@pytest.fixture(scope="module")
def data(name, tmp_path_factory):
    """Two files of examples: windows of text, and instructions of other lengths with a prompt."""
    directory = tmp_path_factory.mktemp("data")
    rows = [
        {"instruction": f"Say {word} {i}", "output": f"{word} " * (1 + i % 5)}
        for i, word in enumerate(["river", "mill", "sea", "old", "runs"] * 6)
    ]
    file = directory / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    text = directory / "long.txt"
    text.write_text(TEXT * 3, encoding="utf-8")
    made = make_data(name, directory, train=[str(text), str(file)])
    assert BLOCK < len(made.examples("train")) < 2 * BLOCK
    return made


def cache_of(data, root, directory=None, **changes):
    settings = {"teacher": {"fingerprint": "a"}, "k": 4, "temperature": 1.5, "vocabulary": 600}
    return TeacherCache(
        directory,
        root,
        lambda places: data.batch("train", places),
        len(data.examples("train")),
        **{**settings, **changes},
    )


def write(cache, teacher):
    cache.open()
    cache.write(teacher, cache.missing(), progress=False)
    return {file.name: file.read_bytes() for file in cache.directory.glob("block-*")}


@pytest.fixture(scope="module")
def cached(data, teacher, tmp_path_factory):
    """A whole cache, and the bytes of its files."""
    cache = cache_of(data, tmp_path_factory.mktemp("cache"))
    return cache, write(cache, teacher)


@pytest.fixture
def copied(cached, data, tmp_path):
    """A copy of it that may be damaged."""
    shutil.copytree(cached[0].directory, tmp_path / "copy")
    return cache_of(data, tmp_path, tmp_path / "copy")


# --- the cache --------------------------------------------------------------------------------


@pytest.mark.parametrize("places", [[70, 3, 41], [0], [83, 82, 81, 80]])
def test_the_cache_says_of_any_batch_what_the_teacher_says(cached, data, teacher, places):
    batch = data.batch("train", places)
    tokens, _ = counted_targets(batch["labels"])
    with torch.no_grad():
        logits = teacher(batch["input_ids"], batch["attention_mask"]).logits.flatten(0, 1)[tokens]
    ids, log_probabilities = top_k(logits, 4, 1.5)
    found = cached[0].targets(batch)
    torch.testing.assert_close(found[0].long(), ids)
    # float16 has 11 bits; log-probabilities are below 8 in size.
    torch.testing.assert_close(found[1].float(), log_probabilities, rtol=0, atol=2**-8 + 1e-4)


def test_only_tokens_that_count_are_stored(cached, data):
    total = sum(len(counted_targets(labels[None])[0]) for _, labels in data.examples("train"))
    files = sorted(cached[0].directory.glob("block-*"))
    sizes = []
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            assert tensors.metadata() == {"fingerprint": cached[0].fingerprint}
            sizes.append(len(tensors.get_tensor("ids")))
            assert tensors.get_tensor("ids").dtype == torch.uint16
    assert sum(sizes) == total < sum(len(ids) for ids, _ in data.examples("train"))


def test_a_cache_that_was_stopped_goes_on_and_is_the_same_byte_for_byte(
    cached, data, teacher, tmp_path
):
    cache, seen = cache_of(data, tmp_path), []

    def stop(*_):
        seen.append(1)
        if len(list(cache.directory.glob("block-*"))) == 1:
            raise KeyboardInterrupt

    handle = teacher.register_forward_hook(stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            write(cache, teacher)
    finally:
        handle.remove()
    (first,) = cache.directory.glob("block-*")
    written = first.stat().st_mtime_ns
    leftover = cache.directory / ".block-000001.safetensors.77.tmp"
    leftover.write_bytes(b"half")
    assert cache.missing() == [1]
    assert write(cache, teacher) == cached[1]
    assert first.stat().st_mtime_ns == written
    assert not leftover.exists()


def test_several_processes_write_the_same_cache_together(cached, data, teacher, tmp_path):
    cache = cache_of(data, tmp_path)
    cache.open()
    for rank in (1, 0):
        mine = [block for block in cache.missing() if block % 2 == rank]
        assert mine == [rank]
        cache_of(data, tmp_path).write(teacher, mine, progress=False)
    assert {f.name: f.read_bytes() for f in cache.directory.glob("block-*")} == cached[1]


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({"teacher": {"fingerprint": "b"}}, "teacher"),
        ({"k": 5}, "k"),
        ({"temperature": 1.0}, "temperature"),
    ],
)
def test_a_cache_of_something_else_is_refused_and_both_are_named(
    cached, data, tmp_path, changes, differs
):
    cache = cache_of(data, tmp_path, cached[0].directory, **changes)
    with pytest.raises(ValueError, match=f"{cached[0].fingerprint}, this run needs ") as error:
        cache.open()
    assert f"{cache.fingerprint}: it differs in {differs} (" in str(error.value)


def test_a_cache_of_another_text_is_refused(cached, name, tmp_path):
    other = make_data(name, tmp_path)
    with pytest.raises(ValueError, match="it differs in data .*tokens of the training set"):
        cache_of(other, tmp_path, cached[0].directory).open()


def test_a_row_that_is_no_training_example_is_refused(cached, data):
    batch = data.batch("train", [0])
    batch["input_ids"] = batch["input_ids"].flip(1)
    with pytest.raises(ValueError, match="not among the .* training examples .*loss=kd"):
        cached[0].targets(batch)


def test_a_newer_format_is_refused(copied):
    file = copied.directory / "teacher.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 2}))
    with pytest.raises(ValueError, match="teacher.json has format=2, this version reads 1"):
        copied.open()


def test_a_damaged_description_is_named(copied):
    file = copied.directory / "teacher.json"
    file.write_text(file.read_text()[:40])
    with pytest.raises(ValueError, match="teacher.json is damaged .*delete"):
        copied.open()


def test_a_damaged_file_is_named(copied):
    file = copied.directory / "block-000001.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="block-000001.safetensors is damaged .*delete it"):
        copied.open()
    shutil.copy(copied.directory / "block-000000.safetensors", file)
    with pytest.raises(ValueError, match="block-000001.safetensors holds ids of shape .*delete it"):
        copied.open()


def test_files_of_another_cache_are_not_taken_for_ours(copied):
    (copied.directory / "teacher.json").unlink()
    copied.fingerprint = "another"
    with pytest.raises(ValueError, match="block-000000.safetensors holds .* for another; delete"):
        copied.open()


def test_a_disk_that_is_too_small_is_told_before_the_teacher_is_asked(data, tmp_path, monkeypatch):
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1))
    with pytest.raises(ValueError, match=r"needs .* MB .*0.0 MB are free; lower distillation.k=4"):
        cache_of(data, tmp_path).open()


# --- the loss ---------------------------------------------------------------------------------


def test_kd_of_a_batch_is_the_same_in_chunks(data, teacher):
    """With another scale than the student's: each has its own."""
    dense = tiny_model("granite", seed=1, logits_scaling=2.0)
    batch = {"input_ids": token_windows(3, 20) % 128}
    batch["labels"] = batch["input_ids"].masked_fill(torch.arange(20) < 5, -100)
    found = []
    for chunked in (True, False):
        student = tiny_model("cohere").requires_grad_(True)
        settings = Distillation(temperature=2.0, lm_weight=0.3, hidden_weight=0.1)
        objective = Objective("kd", settings, chunked=chunked)
        objective.use_teacher(dense, range(6))
        objective.start(student)
        loss = objective(student, batch)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in student.parameters())])
    assert dense.lm_head.weight.grad is None
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(teacher):
    batch = {"input_ids": token_windows(), "labels": token_windows()}
    objective = Objective("kd", Distillation(lm_weight=0.0, hidden_weight=1.0))
    student = copy.deepcopy(teacher).requires_grad_(True)
    objective.use_teacher(teacher, range(6))
    objective.start(student)
    loss = objective(student, batch)
    loss.backward()
    assert loss.abs() < 1e-5
    assert max(p.grad.abs().max() for p in student.parameters()) < 1e-5


def test_hidden_states_count_relative_to_the_teachers_and_without_padding():
    wanted = torch.randn(2, 3, 4) * 100
    found = wanted * torch.tensor([1.0, 1.1, 9.0])[:, None]
    mask = torch.tensor([[1, 1, 0], [1, 1, 0]])
    # (0 + 0.1^2) / 2 in one layer, 0 in the other
    loss = hidden_state_loss([found, wanted], [wanted, wanted], mask)
    assert loss.item() == pytest.approx(0.0025, rel=1e-4)


def test_each_layer_stands_for_the_one_whose_place_it_took():
    def plan(step):
        return Plan("test", {}, {}, (step,))

    assert kept_layers([], 3) == [0, 1, 2]
    plans = [plan(RemoveLayers((1,))), plan(MergeLayers(((2, 3),)))]
    # left after the first: 0 2 3 4 5; layers 2 and 3 of these are 3 and 4, the higher one is left
    assert kept_layers(plans, 6) == [0, 2, 4, 5]


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
    _release(module)
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
