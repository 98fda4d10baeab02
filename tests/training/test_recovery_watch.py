"""Full retraining: token budgets, schedules, the best weights, and warnings of overfitting."""

import json
from functools import partial
from itertools import pairwise

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from runs import SEQ_LEN, make_data, make_module, make_trainer, write_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import prunelight
from prunelight.callbacks import DLP, ShortGPT, TokenBudget
from prunelight.recovery.overfitting import TrainingText, ValidationPoint, overfit_risk, overfitting
from prunelight.recovery.precision import precision_faults
from prunelight.recovery.schedules import make_schedule
from prunelight.recovery.zeros.gradual_zeros import Schedule
from prunelight.run.run_state import FINAL
from prunelight.training.recovery_watch import RecoveryWatch, training_text


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


def budget_trainer(root, *callbacks, **arguments):
    """A Trainer that leaves the end of the training to a budget, validating every two batches."""
    settings = {"max_epochs": None, "limit_train_batches": 1.0, "val_check_interval": 2}
    settings["check_val_every_n_epoch"] = None
    return make_trainer(root, *callbacks, **{**settings, **arguments})


# --- schedules


def rates(name, steps, warmup=0, **arguments):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = make_schedule(name, optimizer, warmup, steps, arguments)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_warmup_stable_decay_rises_stays_and_decays_over_the_last_tenth():
    found = rates("warmup_stable_decay", 100, warmup=5)
    assert found[:5] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert found[5:91] == [1.0] * 86
    assert all(high > low for high, low in pairwise(found[90:]))
    assert rates("warmup_stable_decay", 100, num_decay_steps=50).count(1.0) == 51


def test_arguments_of_the_schedule_are_passed_on_and_odd_ones_named(name):
    floor = rates("cosine_with_min_lr", 50, min_lr_rate=0.1)
    assert min(floor) >= 0.1
    with pytest.raises(ValueError, match=r"lr_scheduler_kwargs=\{'decay': 3\} do not fit linear"):
        make_module(name, lr_scheduler_kwargs={"decay": 3})


# --- token budgets


def set_up(trainer, callback, module, data):
    """Do what a fit does with a budget, without the fit."""
    trainer.datamodule = data
    callback.setup(trainer, module, "fit")
    return trainer


@pytest.mark.parametrize(("tokens", "accumulate", "steps"), [(64, 1, 1), (65, 1, 2), (640, 2, 5)])
def test_a_budget_becomes_the_steps_that_hold_it(name, tmp_path, tokens, accumulate, steps):
    budget = TokenBudget(tokens=tokens)
    trainer = budget_trainer(tmp_path, budget, accumulate_grad_batches=accumulate)
    set_up(trainer, budget, make_module(name), make_data(name, tmp_path))
    assert trainer.max_steps == steps


def test_a_small_last_batch_is_a_step_of_the_budget_too(name, tmp_path):
    data = make_data(name, tmp_path)
    count = len(data.examples("train"))
    data.batch_size, trainer = count - 1, budget_trainer(tmp_path)
    trainer.datamodule = data
    text = training_text(trainer)
    assert (text.tokens, text.steps) == (count * SEQ_LEN, 2)
    full = (count - 1) * SEQ_LEN
    budgets = [full - 1, full, full + 1, text.tokens, text.tokens + full, text.tokens + full + 1]
    assert [text.steps_for(tokens) for tokens in budgets] == [1, 1, 2, 2, 3, 4]
    assert [text.epochs(steps) for steps in (2, 4)] == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_steps": 7}, "trainer.max_steps=7 contradicts tokens=6400, which are 100 steps"),
        ({"max_epochs": 1}, r"max_epochs=1 ends before tokens=6400, which are \d+.\d+ epochs of"),
    ],
)
def test_a_budget_that_the_trainer_contradicts_is_refused(name, tmp_path, arguments, message):
    budget = TokenBudget(tokens=6400)
    trainer = budget_trainer(tmp_path, budget, **arguments)
    with pytest.raises(ValueError, match=message):
        set_up(trainer, budget, make_module(name), make_data(name, tmp_path))


def test_a_budget_comes_first_so_that_a_gradual_schedule_can_ask_it(name, tmp_path):
    budget, gradual = TokenBudget(tokens=256), DLP(sparsity=0.5, schedule=Schedule(0, 9))
    with pytest.raises(ValueError, match="TokenBudget must come before the pruning callbacks"):
        set_up(
            budget_trainer(tmp_path, gradual, budget),
            budget,
            make_module(name),
            make_data(name, tmp_path),
        )
    with pytest.raises(ValueError, match="end_step=9 must not come after the end of training, 4"):
        budget_trainer(tmp_path, budget, gradual).fit(make_module(name), make_data(name, tmp_path))


def test_a_budget_without_tokens_or_known_data_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match="tokens=0 must be at least 1"):
        TokenBudget(tokens=0)
    budget = TokenBudget(tokens=9)
    with pytest.raises(ValueError, match="tokens=9 needs a prunelight TextDataModule"):
        set_up(budget_trainer(tmp_path, budget), budget, make_module(name), None)


# --- the best weights


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


# --- warnings


def text(tokens, tokens_per_step=100):
    return TrainingText(tokens, tokens_per_step, tokens // tokens_per_step)


@pytest.mark.parametrize(
    ("recovery", "tokens", "steps", "parameters", "expected"),
    [
        ("full", 1000, 20, 2000, "read 2.0 times, train 0.0M parameters"),
        ("full", 1000, 10, 2000, None),  # each token once: nothing to learn by heart
        ("full", 4000, 80, 2000, None),  # more tokens than parameters
        ("lora", 1000, 20, 2000, None),
        ("lora", 1000, 50, 2000, "are read 5.0 times; more than 4 times"),
        ("full", 4000, 200, 2000, "are read 5.0 times; more than 4 times"),
    ],
)
def test_too_little_text_is_told_before_training(recovery, tokens, steps, parameters, expected):
    risk = overfit_risk(recovery, text(tokens), steps, parameters)
    assert (risk is None) if expected is None else expected in risk


def history(perplexities, losses):
    pairs = zip(perplexities, losses, strict=True)
    return [ValidationPoint(10 * i, p, loss) for i, (p, loss) in enumerate(pairs)]


@pytest.mark.parametrize(
    ("perplexities", "losses", "told"),
    [
        ([9, 5, 6, 7, 8], [3, 2, 1.5, 1.2, 1], True),
        ([9, 5, 6, 7, 8], [3, 2, 2.5, 2.7, 3], False),  # both worse: not learnt by heart
        ([9, 5, 6, 5.9, 8], [3, 2, 1.5, 1.2, 1], False),  # a bump
        ([6, 7, 8], [3, 2, 1], False),  # too few to tell
        ([9, 8, 7, 6, 5], [5, 4, 3, 2, 1], False),
    ],
)
def test_overfitting_is_validation_that_rises_while_training_falls(perplexities, losses, told):
    found = overfitting(history(perplexities, losses))
    assert (found is not None) == told
    if told:
        assert "rose from 5 at step 10 to 8 at step 40" in found


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
    assert (trainer.global_step, trainer.max_epochs) == (40, -1)
    assert module.record.recovery["tokens_seen"] == 64 * 40


def test_validations_are_kept_over_a_resume(overfitted, tmp_path):
    trainer, _, _ = overfitted
    (watch,) = (c for c in trainer.callbacks if isinstance(c, RecoveryWatch))
    assert [e.step for e in watch.history] == list(range(5, 41, 5))
    again = RecoveryWatch()
    again.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    assert again.history == watch.history


# --- precision


class Dtypes(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        parameters = [*pl_module.model.parameters()]
        self.trained = {p.dtype for p in parameters if p.requires_grad}
        self.frozen = {p.dtype for p in parameters if not p.requires_grad}


@pytest.mark.parametrize(
    ("recovery", "dtype", "precision", "trained", "final"),
    [
        ("lora", "float32", "bf16-true", torch.float32, torch.bfloat16),
        ("lora", "bfloat16", "bf16-mixed", torch.float32, torch.bfloat16),
        ("lora", "float16", "16-true", torch.float32, torch.float16),
        ("full", "float32", "bf16-mixed", torch.float32, torch.float32),
        ("full", "float32", "bf16-true", torch.bfloat16, torch.bfloat16),
    ],
)
def test_adapters_stay_float32_under_every_precision(
    name, tmp_path, recovery, dtype, precision, trained, final
):
    module = make_module(name, recovery=recovery, dtype=dtype, gradient_checkpointing=True)
    dtypes = Dtypes()
    trainer = make_trainer(tmp_path, dtypes, precision=precision, max_steps=3)
    trainer.fit(module, make_data(name, tmp_path))
    assert dtypes.trained == {trained}
    assert dtypes.frozen <= {final}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / FINAL).dtype == final
    dense, recovered = module.record.stages
    assert recovered.perplexity < dense.perplexity


@pytest.mark.parametrize(
    ("dtype", "precision", "recovery", "expected"),
    [
        (torch.float32, "32-true", "full", []),
        (torch.float32, "bf16-mixed", "full", []),
        (torch.float32, "16-mixed", "full", []),
        (torch.bfloat16, "32-true", "lora", []),
        (torch.bfloat16, "bf16-true", "lora", []),
        (torch.float16, "16-mixed", "lora", []),
        (torch.float16, "16-true", "none", []),
        (torch.float32, "bf16-true", "lora", ["casts torch.float32 weights to torch.bfloat16"]),
        (torch.bfloat16, "bf16-mixed", "full", ["small updates are lost"]),
        (torch.float16, "32-true", "lora", ["does not scale the loss"]),
        (torch.float32, "16-true", "full", ["casts", "small updates", "does not scale the loss"]),
    ],
)
def test_what_a_precision_loses_is_told(dtype, precision, recovery, expected):
    faults = precision_faults(dtype, precision, recovery)
    assert len(faults) == len(expected)
    assert all(part in fault for part, fault in zip(expected, faults, strict=True))


def test_float16_weights_cannot_be_trained_with_a_gradient_scaler():
    with pytest.raises(ValueError, match="torch scales no float16 gradients; set model.dtype=fl"):
        precision_faults(torch.float16, "16-mixed", "full")
