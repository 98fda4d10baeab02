"""Each stage of a run is examined by callbacks; a reused base asks again what has changed."""

import random
import re

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from runs import make_data, make_module, make_trainer, write_model

from prunelight.callbacks import RecoveryCheckpoint, ShortGPT
from prunelight.run.checkpoints import read_measured
from prunelight.run.preflight import FinishedRunError
from prunelight.training.trainer import Trainer


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


class LayerCounter(pl.Callback):
    """Counts the layers of each stage, by more random numbers than any other examiner draws."""

    def __init__(self, factor=1, examines="layers", fault=None):
        self.factor, self.examines, self.fault = factor, examines, fault
        self.asked = []

    def check_examination(self, name, tokenizer):
        if self.fault is not None:
            raise ValueError(self.fault)

    def describe_examination(self):
        return {"factor": self.factor}

    def examine(self, model, tokenizer, earlier, group):
        self.asked.append([stage.name for stage in earlier])
        assert tokenizer("the river")["input_ids"]
        random.random(), np.random.rand(), torch.rand(3)
        return {"layers": self.factor * model.config.num_hidden_layers, "ranks": group.size}


def fit(name, root, *counters, **arguments):
    root.mkdir(exist_ok=True)
    module = make_module(name, **arguments)
    trainer = make_trainer(root, ShortGPT(num_layers=2), *counters)
    trainer.fit(module, make_data(name, root))
    return module.record


def layers_of(record, examiner="layers"):
    return {stage.name: stage.examined[examiner]["layers"] for stage in record.stages}


def test_each_stage_is_examined_once_after_those_before_it(name, tmp_path):
    counter = LayerCounter()
    record = fit(name, tmp_path, counter)
    assert counter.asked == [[], ["dense"], ["dense", "pruned"]]
    dense = layers_of(record)["dense"]
    assert layers_of(record) == {"dense": dense, "pruned": dense - 2, "recovered": dense - 2}
    rows = {cost.name for cost in record.costs}
    assert {f"examine {stage}: layers" for stage in ("dense", "pruned", "recovered")} <= rows


def test_examiners_leave_the_random_numbers_of_the_training_alone(name, tmp_path):
    losses = []
    for number, counters in enumerate(([], [LayerCounter()])):
        pl.seed_everything(3, verbose=False)
        record = fit(name, tmp_path / str(number), *counters)
        losses.append((record.stages[-1].perplexity, random.random(), np.random.rand()))
    assert losses[0] == losses[1]


def test_a_reused_base_is_examined_again_only_where_settings_changed(name, tmp_path):
    first, other = LayerCounter(), LayerCounter(examines="others")
    before = fit(name, tmp_path, first, other, recovery="none")
    changed, same = LayerCounter(factor=10), LayerCounter(examines="others")
    after = fit(name, tmp_path, changed, same, recovery="none")
    assert changed.asked == [[], ["dense"]]
    assert same.asked == []
    assert layers_of(after) == {stage: 10 * n for stage, n in layers_of(before).items()}
    assert layers_of(after, "others") == layers_of(before, "others")
    speeds = [[stage.decode_tokens_per_second for stage in r.stages] for r in (before, after)]
    assert speeds[0] == speeds[1], "what no examiner measures is not measured again"
    (base,) = tmp_path.glob("pruned-*")
    assert layers_of(read_measured(base)) == layers_of(after)


def test_a_reused_base_keeps_no_answer_of_an_examiner_that_is_gone(name, tmp_path):
    fit(name, tmp_path, LayerCounter(), recovery="none")
    after = fit(name, tmp_path, recovery="none")
    assert all("layers" not in stage.examined for stage in after.stages)


def test_a_model_that_is_recovered_as_it_is_is_examined_too(name, tmp_path):
    counter, module = LayerCounter(), make_module(name)
    make_trainer(tmp_path, counter).fit(module, make_data(name, tmp_path))
    assert counter.asked == [[], ["dense"]]
    assert [*layers_of(module.record)] == ["dense", "recovered"]


def test_an_examiner_fails_before_anything_is_computed(name, tmp_path):
    with pytest.raises(ValueError, match=re.escape("tasks=['arc'] is unknown")):
        fit(name, tmp_path, LayerCounter(fault="tasks=['arc'] is unknown"))
    assert not [*tmp_path.glob("pruned-*")]


def test_an_examiner_without_a_report_is_refused(name, tmp_path):
    loader = torch.utils.data.DataLoader([{"input_ids": torch.ones(8, dtype=torch.long)}] * 4)
    with pytest.raises(ValueError, match="LayerCounter examines the stages of the report"):
        make_trainer(tmp_path, LayerCounter()).fit(make_module(name), loader)


def test_a_finished_run_goes_on_if_it_is_to_be_examined_otherwise(name, tmp_path):
    def start(*counters):
        settings = {"max_steps": 2, "logger": False, "enable_progress_bar": False}
        callbacks = [ShortGPT(num_layers=2), *counters, RecoveryCheckpoint(1)]
        trainer = Trainer(**settings, default_root_dir=tmp_path, callbacks=callbacks)
        module = make_module(name)
        trainer.fit(module, make_data(name, tmp_path))
        return module.record

    start(LayerCounter())
    with pytest.raises(FinishedRunError):
        start(LayerCounter())
    with pytest.raises(FinishedRunError):
        start()
    record = start(LayerCounter(factor=10))
    assert record.recovery["optimizer_steps"] == 2, "it trains no further"
    assert all(number % 10 == 0 for number in layers_of(record).values())
