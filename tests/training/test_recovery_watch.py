"""The best weights of a run, and warnings of overfitting."""

import json
from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from runs import SEQ_LEN, make_data, make_module, make_trainer, write_model
from safetensors.torch import load_file

import prunelight
from prunelight.callbacks import DLP, ShortGPT, TokenBudget
from prunelight.run.run_state import FINAL
from prunelight.training.recovery_watch import RecoveryWatch


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


def budget_trainer(root, *callbacks, **arguments):
    """A Trainer that leaves the end of the training to a budget, validating every two batches."""
    settings = {"max_epochs": None, "limit_train_batches": 1.0, "val_check_interval": 2}
    settings["check_val_every_n_epoch"] = None
    return make_trainer(root, *callbacks, **{**settings, **arguments})


def best(root):
    return ModelCheckpoint(root / "best", monitor="val/perplexity", filename="best")


def destroyed(name, tmp_path, *callbacks, **arguments):
    """Fit with a rate that learns at first and then destroys."""
    module = make_module(
        name,
        optimizer=partial(torch.optim.AdamW, lr=1.0),
        lr_scheduler="constant_with_warmup",
        warmup_steps=100,
        **arguments,
    )
    trainer = budget_trainer(tmp_path, *callbacks, best(tmp_path), max_steps=20)
    trainer.fit(module, make_data(name, tmp_path))
    return trainer, module


@pytest.mark.parametrize(
    ("recovery", "method"),
    [("lora", ShortGPT(num_layers=2)), ("full", DLP(sparsity=0.5, solver="magnitude"))],
)
def test_final_holds_the_best_weights_and_the_report_says_of_which_step(
    name, tmp_path, recovery, method
):
    stop = EarlyStopping("val/perplexity", patience=1)
    trainer, module = destroyed(name, tmp_path, method, stop, recovery=recovery)
    checkpoint = torch.load(tmp_path / "best" / "best.ckpt", weights_only=True)
    step = checkpoint["global_step"]
    assert step < trainer.global_step < 20, "stopped early, after the best"
    told = module.record.recovery
    assert (told["weights_of_step"], told["optimizer_steps"]) == (step, trainer.global_step)
    assert told["tokens_seen"] == trainer.global_step * 2 * SEQ_LEN
    final, _ = prunelight.load(tmp_path / FINAL)
    windows = make_data(name, tmp_path).validation_windows()
    score = float(trainer.checkpoint_callbacks[0].best_model_score)
    assert prunelight.perplexity(final, windows) == pytest.approx(score, rel=1e-4)
    if recovery == "full":  # its masks were restored with the weights
        key = "model.layers.0.mlp.up_proj.weight"
        (base,) = tmp_path.glob("pruned-*/model.safetensors")
        assert torch.equal(
            load_file(base)[key] == 0, load_file(tmp_path / FINAL / base.name)[key] == 0
        )


def test_without_restore_best_the_last_weights_are_final(name, tmp_path):
    trainer, module = destroyed(name, tmp_path, recovery="full", restore_best=False)
    assert module.record.recovery["weights_of_step"] == trainer.global_step == 20
    assert module.record.stages[-1].perplexity > trainer.checkpoint_callbacks[0].best_model_score


@pytest.fixture(scope="module")
def overfitted(name, tmp_path_factory):
    """A run that learns its few words by heart, while other text gets worse."""
    root = tmp_path_factory.mktemp("overfitted")
    (root / "other.txt").write_text("A grey cat sleeps under seven broken ladders! " * 40)
    module = make_module(name, recovery="full", learning_rate=3e-3, lr_scheduler="constant")
    data = make_data(name, root, validation=str(root / "other.txt"))
    trainer = budget_trainer(root, TokenBudget(tokens=64 * 40), val_check_interval=5)
    trainer.fit(module, data)
    return trainer, module, root


def test_a_run_that_overfits_is_told_in_the_report_early_and_late(overfitted):
    _, module, root = overfitted
    warned = "\n".join(module.record.warnings)
    assert "which can learn them by heart" in warned
    assert "the model overfits: val/perplexity rose from" in warned
    assert "the recovery made the model worse: perplexity" in warned
    report = (root / "report.md").read_text()
    assert all(line in report for line in module.record.warnings)


def test_a_fit_within_a_budget_sees_its_tokens(overfitted):
    trainer, module, _ = overfitted
    assert trainer.global_step == 40
    assert (trainer.max_steps, trainer.max_epochs) == (-1, 1000), "as it was given"
    assert module.record.recovery["tokens_seen"] == 64 * 40


def test_validations_are_kept_over_a_resume(overfitted, tmp_path):
    trainer, _, _ = overfitted
    (watch,) = (c for c in trainer.callbacks if isinstance(c, RecoveryWatch))
    assert [e.step for e in watch.history] == list(range(5, 41, 5))
    again = RecoveryWatch()
    again.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    assert again.history == watch.history
