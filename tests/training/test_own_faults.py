"""Every way in which a module or data of the user's own can lack something: one line for each."""

import re

import lightning.pytorch as pl
import pytest
import torch
from runs import make_module, make_trainer, write_model
from test_own_module import OwnData, OwnModule
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from prunelight.callbacks import ShortGPT
from prunelight.one_line_errors import our_error

IDS = "it must be a LongTensor"


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def with_model(make):
    """Return a change of OwnModule: its setup makes this model instead."""

    def setup(self, stage):
        self.model = make(self.name)

    return {"setup": setup}


def with_tokenizer(tokenizer):
    def setup(self, stage):
        OwnModule.setup(self, stage)
        self.tokenizer = tokenizer

    return {"setup": setup}


def keep_parameters(self, stage):
    OwnModule.setup(self, stage)
    self.early = torch.optim.SGD(self.model.parameters(), lr=0.1)


def another_model(self):
    self.model = AutoModelForCausalLM.from_pretrained(self.name)


MODULES = {
    "no model": ({"setup": lambda self, stage: delattr(self, "model")}, r"Mine.model is missing"),
    "None": (with_model(lambda name: None), r"Mine.model is missing"),
    "a name": (with_model(str), r"Mine.model is str; .* PreTrainedModel"),
    "torch": (with_model(lambda name: torch.nn.Linear(1, 1)), r"Mine.model is Linear; .* PreTrain"),
    "no head": (
        with_model(AutoModel.from_pretrained),
        r"LlamaModel, which predicts no next",
    ),
    "another head": (
        with_model(AutoModelForSequenceClassification.from_pretrained),
        r"LlamaForSequenceClassification, which predicts no next tokens; load it by AutoModelForC",
    ),
    "no tokenizer": (with_tokenizer(None), r"neither Mine nor its data has a `tokenizer`"),
    "a tokenizer's name": (with_tokenizer("x"), r"tokenizer of Mine or its data is str; it must"),
    "optimizer of the dense model": (
        {"setup": keep_parameters, "configure_optimizers": lambda self: self.early},
        r"optimizers of Mine hold no parameter of the pruned model; take .* self.parameters\(\)",
    ),
    "model made again": (
        {"configure_model": another_model},
        r"Mine.model is no longer the pruned model: .* make the model in setup or __init__",
    ),
}


def rows_as(make):
    """Return data whose batches are made from two rows of token ids."""

    class Data(OwnData):
        def _loader(self, rows):
            return [make(rows[start : start + 2]) for start in range(0, len(rows), 2)]

    return Data()


def fields(**makers):
    return rows_as(lambda ids: {"input_ids": ids, **{k: make(ids) for k, make in makers.items()}})


def returning(**answers):
    """Return data with methods that give these answers."""
    methods = {key: lambda self, answer=answer: answer for key, answer in answers.items()}
    return type("Data", (OwnData,), methods)()


class Once(pl.LightningDataModule):
    """Gives the same iterator twice."""

    def __init__(self):
        super().__init__()
        self.batches = iter(OwnData().train_dataloader())

    def train_dataloader(self):
        return self.batches

    def val_dataloader(self):
        return OwnData().val_dataloader()


DATA = {
    "nothing": (pl.LightningDataModule(), r"pruning needs data: .* with train_dataloader\(\)"),
    "train None": (returning(train_dataloader=None), r"train_dataloader\(\) gives no batch"),
    "train empty": (returning(train_dataloader=[]), r"train_dataloader\(\) gives no batch"),
    "val None": (returning(val_dataloader=None), r"val_dataloader\(\) gives no batch"),
    "val empty": (returning(val_dataloader=DataLoader([])), r"val_dataloader\(\) gives no batch"),
    "an iterator": (Once(), r"train_dataloader is a .*, which can be read only once"),
    "tuples": (rows_as(lambda ids: (ids, ids)), r"gives batches of tuple; .* input_ids"),
    "tensors": (rows_as(lambda ids: ids), r"gives batches of Tensor; .* input_ids"),
    "texts": (rows_as(lambda ids: ["a", "b"]), r"gives batches of list; .* input_ids"),
    "no ids": (rows_as(lambda ids: {"x": ids}), r"gives batches of \['x'\]; .* input_ids"),
    "texts as ids": (fields(input_ids=lambda ids: ["a", "b"]), f"input_ids is list; {IDS}"),
    "lists": (fields(input_ids=torch.Tensor.tolist), f"input_ids is list; {IDS}"),
    "numpy": (fields(input_ids=torch.Tensor.numpy), f"input_ids is ndarray; {IDS}"),
    "floats": (fields(input_ids=torch.Tensor.float), f"input_ids is of type torch.float32; {IDS}"),
    "bools": (fields(input_ids=torch.Tensor.bool), f"input_ids is of type torch.bool; {IDS}"),
    "int32": (fields(input_ids=torch.Tensor.int), f"input_ids is of type torch.int32; {IDS}"),
    "a row": (fields(input_ids=lambda ids: ids[0]), rf"input_ids is of shape \(16,\); {IDS}"),
    "3-D": (fields(input_ids=lambda ids: ids[None]), rf"is of shape \(1, 2, 16\); {IDS}"),
    "meta": (fields(input_ids=lambda ids: ids.to("meta")), f"is on the meta device; {IDS}"),
    "other vocabulary": (fields(input_ids=lambda ids: ids + 9999), r"token id \d+ must lie in"),
    "negative": (fields(input_ids=lambda ids: ids - 99), r"token id -\d+ must lie in"),
    "too long": (fields(input_ids=lambda ids: ids.repeat(1, 99)), r"seq_len=1584 must be at most"),
    "no tokens": (fields(input_ids=lambda ids: ids[:, :0]), r"windows of shape \(8, 0\)"),
    "one token": (fields(input_ids=lambda ids: ids[:, :1]), r"each needs two tokens or more"),
    "mask of lists": (fields(attention_mask=torch.Tensor.tolist), "attention_mask is list; it"),
    "a shorter mask": (fields(attention_mask=lambda ids: ids[:, :3]), r"mask is of shape \(2, 3\)"),
    "all masked": (fields(attention_mask=torch.zeros_like), "predict 0 tokens"),
    "labels of text": (fields(labels=lambda ids: "a"), "labels is str; it must be a LongTensor"),
    "classes": (fields(labels=lambda ids: ids[:, 0]), r"labels is of shape \(2,\); it must"),
    "shorter labels": (fields(labels=lambda ids: ids[:, :3]), r"labels is of shape \(2, 3\)"),
    "float labels": (fields(labels=torch.Tensor.float), "labels is of type torch.float32"),
    "labels outside": (fields(labels=lambda ids: ids + 9999), r"label \d+ must lie in \[0, "),
    "no labels count": (fields(labels=lambda ids: ids * 0 - 100), "predict 0 tokens"),
    "windows None": (returning(calibration_windows=None), r"calibration_windows\(\) gives None"),
    "windows of lists": (
        returning(calibration_windows=[[1]]),
        r"calibration_windows\(\) gives li",
    ),
    "windows of floats": (
        returning(calibration_windows=torch.rand(2, 8)),
        r"calibration_windows\(\): the tensor is of type torch.float32",
    ),
    "windows without ids": (
        returning(validation_windows={"x": 1}),
        r"validation_windows\(\) gives dict; it must give token ids",
    ),
}


def refusal(trainer, module, data):
    """Return the line in which prunelight refuses, and check that it is one."""
    with pytest.raises((TypeError, ValueError)) as error:
        trainer.fit(module, data)
    assert our_error(error.value) is error.value
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("fault", MODULES)
def test_a_module_that_lacks_something_is_refused(fault, name, tmp_path):
    changes, message = MODULES[fault]
    trainer = make_trainer(tmp_path, ShortGPT(num_layers=2))
    line = refusal(trainer, type("Mine", (OwnModule,), changes)(name), OwnData())
    assert re.search(message, line), line
    assert not (tmp_path / "final").exists()


@pytest.mark.parametrize("fault", DATA)
def test_data_that_lacks_something_is_refused_before_the_pruning(fault, name, tmp_path):
    data, message = DATA[fault]
    line = refusal(make_trainer(tmp_path, ShortGPT(num_layers=2)), OwnModule(name), data)
    assert re.search(message, line), line
    assert not [*tmp_path.glob("pruned-*")]


FOR_RECOVERY = ("train empty", "an iterator", "tuples", "texts", "lists", "int32", "classes")


@pytest.mark.parametrize("fault", FOR_RECOVERY)
def test_a_recovery_module_refuses_such_data_before_it_trains(fault, name, tmp_path):
    data, message = DATA[fault]
    line = refusal(make_trainer(tmp_path), make_module(name), data)
    assert re.search(message, line), line


def test_a_recovery_module_needs_labels(name, tmp_path):
    line = refusal(make_trainer(tmp_path), make_module(name), fields())
    assert re.search(
        r"gives batches of \['input_ids'\], without the labels .*; add labels", line
    ), line


def test_a_later_batch_of_another_kind_is_refused_too(name, tmp_path):
    good = [*OwnData().train_dataloader()]
    data = returning(train_dataloader=DataLoader([good[0], [good[1]]], batch_size=None))
    line = refusal(make_trainer(tmp_path), make_module(name), data)
    assert re.search("gives batches of list", line), line


def test_num_calibration_of_own_data_is_checked(name, tmp_path):
    for value in ("x", 0, 1.5, None):
        data = OwnData()
        data.num_calibration = value
        line = refusal(make_trainer(tmp_path, ShortGPT(num_layers=2)), OwnModule(name), data)
        assert re.search(
            "num_calibration=.* of OwnData must be a whole number of at least 1", line
        ), line
