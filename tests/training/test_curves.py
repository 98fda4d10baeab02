"""The curves of a report: what was trained and validated, however long the training is."""

from types import SimpleNamespace

import pytest
import torch
from runs import make_data, make_trainer, write_model

from prunelight import RecoveryModule
from prunelight.callbacks import ShortGPT
from prunelight.evaluation.report.record import RunRecord
from prunelight.training import curves
from prunelight.training.curves import TrainingCurves


def step(collector, number, loss, accumulate=1):
    trainer = SimpleNamespace(global_step=number, accumulate_grad_batches=accumulate)
    optimizer = SimpleNamespace(param_groups=[{"lr": 1.0 / max(number, 1)}])
    collector.on_before_optimizer_step(trainer, None, optimizer)
    outputs = {"loss": torch.tensor(loss / accumulate)}
    collector.on_train_batch_end(trainer, None, outputs, None, 0)


def test_a_run_tells_its_curves_without_any_logger(tmp_path):
    write_model(tmp_path / "model")
    name = str(tmp_path / "model")
    module = RecoveryModule(name, warmup_steps=2, learning_rate=1e-2)
    trainer = make_trainer(tmp_path / "run", ShortGPT(num_layers=2), max_steps=3, logger=False)
    trainer.fit(module, datamodule=make_data(name, tmp_path))
    told = module.record.curves
    assert [point[0] for point in told["train_loss"]] == [1, 2, 3]
    assert [point[1] for point in told["learning_rate"]] == pytest.approx([0, 0.005, 0.01])
    assert told["validation_perplexity"][-1][0] == 3
    assert RunRecord.from_dict(module.record.to_dict()).curves == told


def test_the_points_of_a_long_training_stand_for_equally_many_steps(monkeypatch):
    monkeypatch.setattr(curves, "MOST_POINTS", 8)
    collector = TrainingCurves(run=None)
    for number in range(1, 65):
        step(collector, number, float(number))
    steps = [point[0] for point in collector.losses]
    assert steps == list(range(16, 65, 16))
    assert [point[1] for point in collector.losses] == [8.5, 24.5, 40.5, 56.5]  # means of 16
    assert [point[0] for point in collector.rates] == steps


def test_batches_of_one_optimizer_step_are_one_point():
    collector = TrainingCurves(run=None)
    for number, loss in ((0, 1.0), (0, 2.0), (1, 3.0), (1, 5.0), (1, 5.0), (2, 5.0)):
        step(collector, number, loss, accumulate=3)
    assert collector.losses == [(1, pytest.approx(2.0)), (2, pytest.approx(5.0))]


def test_a_step_that_is_validated_again_has_one_point():
    collector = TrainingCurves(run=None)
    for number, value in ((2, 9.0), (4, 8.0), (4, 7.0)):
        trainer = SimpleNamespace(
            global_step=number, callback_metrics={"val/perplexity": value}, sanity_checking=False
        )
        collector.on_validation_end(trainer, None)
    assert collector.perplexities == [(2, 9.0), (4, 7.0)]
