"""A budget of tokens becomes steps."""

import pytest
from runs import SEQ_LEN, make_data, make_module, make_trainer, write_model

from prunelight.callbacks import DLP, TokenBudget
from prunelight.recovery.zeros.gradual_zeros import Schedule
from prunelight.training.recovery_watch import training_text


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


def budget_trainer(root, *callbacks, **arguments):
    """A Trainer that leaves the end of the training to a budget, validating every two batches."""
    settings = {"max_epochs": None, "limit_train_batches": 1.0, "val_check_interval": 2}
    settings["check_val_every_n_epoch"] = None
    return make_trainer(root, *callbacks, **{**settings, **arguments})


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
        budget_trainer(tmp_path, gradual, budget).fit(make_module(name), make_data(name, tmp_path))
    with pytest.raises(ValueError, match="end_step=9 must not come after the end of training, 4"):
        budget_trainer(tmp_path, budget, gradual).fit(make_module(name), make_data(name, tmp_path))


def test_a_budget_without_tokens_or_known_data_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match="tokens=0 must be at least 1"):
        TokenBudget(tokens=0)
    budget = TokenBudget(tokens=9)
    with pytest.raises(ValueError, match="tokens=9 needs a prunelight TextDataModule"):
        set_up(budget_trainer(tmp_path, budget), budget, make_module(name), None)
