"""A fit changes no Trainer for good, and what it counts survives a resume and accumulation."""

import lightning.pytorch as pl
import pytest
import torch
from runs import SEQ_LEN, make_data, make_module, make_trainer, write_model
from torch.utils._python_dispatch import TorchDispatchMode

from prunelight.callbacks import ShortGPT, TokenBudget
from prunelight.training.recovery_watch import RecoveryWatch

SETTINGS = (
    "max_steps",
    "max_epochs",
    "limit_train_batches",
    "limit_val_batches",
    "limit_test_batches",
    "val_check_interval",
    "check_val_every_n_epoch",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "num_sanity_val_steps",
    "log_every_n_steps",
)


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=3)


class Fail(pl.Callback):
    """Fails at a hook."""

    def __init__(self, hook):
        setattr(self, hook, self.fail)

    def fail(self, *arguments, **named):
        raise RuntimeError("the disk of this machine is gone")


def settings_of(trainer):
    return {name: getattr(trainer, name) for name in SETTINGS}


@pytest.mark.parametrize("hook", [None, "on_train_start", "on_fit_end"])
def test_without_recovery_the_trainer_is_given_back_as_it_was(hook, name, tmp_path):
    failing = [Fail(hook)] if hook else []
    trainer = make_trainer(tmp_path, ShortGPT(num_layers=1), *failing)
    before = settings_of(trainer)
    if hook == "on_fit_end":
        with pytest.raises(RuntimeError, match="the disk"):
            trainer.fit(make_module(name, recovery="none"), make_data(name, tmp_path))
    else:
        trainer.fit(make_module(name, recovery="none"), make_data(name, tmp_path))
    assert settings_of(trainer) == before


@pytest.mark.parametrize("hook", [None, "on_train_start"])
def test_a_token_budget_gives_the_trainer_back(hook, name, tmp_path):
    failing = [Fail(hook)] if hook else []
    budget = {"max_epochs": 1000, "limit_train_batches": 1.0}
    trainer = make_trainer(tmp_path, TokenBudget(tokens=256), *failing, **budget)
    before = settings_of(trainer)
    if hook:
        with pytest.raises(RuntimeError, match="the disk"):
            trainer.fit(make_module(name), make_data(name, tmp_path))
    else:
        trainer.fit(make_module(name), make_data(name, tmp_path))
        assert trainer.global_step == 4
    assert settings_of(trainer) == before


def test_a_pruning_callback_computes_where_it_did_before_once_the_run_has_used_it(name, tmp_path):
    method = ShortGPT(num_layers=1)
    make_trainer(tmp_path, method, max_steps=1).fit(make_module(name), make_data(name, tmp_path))
    assert method.device is None


class Losses(pl.Callback):
    """The loss that the module itself gives for each batch."""

    def __init__(self):
        self.logged = []

    def on_train_batch_end(self, trainer, *_):
        self.logged.append(float(trainer.callback_metrics["train/loss"]))


@pytest.mark.parametrize("accumulated", [1, 3])
def test_the_running_loss_is_the_mean_of_all_batches_since_the_last_validation(
    accumulated, name, tmp_path
):
    losses = Losses()
    trainer = make_trainer(
        tmp_path, losses, max_epochs=2, limit_train_batches=3, accumulate_grad_batches=accumulated
    )
    module = make_module(name)
    trainer.fit(module, make_data(name, tmp_path))
    (watch,) = (c for c in trainer.callbacks if isinstance(c, RecoveryWatch))
    means = [sum(losses.logged[i : i + 3]) / 3 for i in (0, 3)]
    assert [point.training_loss for point in watch.history] == pytest.approx(means, rel=1e-5)
    assert module.tokens_seen == 6 * 2 * SEQ_LEN


def test_a_second_fit_counts_its_own_tokens(name, tmp_path):
    module = make_module(name)
    for root in ("first", "second"):
        trainer = make_trainer(tmp_path / root, max_epochs=1, limit_train_batches=2)
        trainer.fit(module, make_data(name, tmp_path))
        assert module.tokens_seen == 2 * 2 * SEQ_LEN


def test_running_loss_and_tokens_are_those_of_a_run_without_interruption(name, tmp_path):
    settings = {"max_epochs": 1, "limit_train_batches": 4, "val_check_interval": 4}
    told = []
    for stop in (None, 2):
        root = tmp_path / str(stop)
        root.mkdir()
        if stop:
            pl.seed_everything(0, verbose=False)
            first = make_trainer(root, **settings, max_steps=-1, enable_checkpointing=True)
            first.callbacks.insert(0, Interrupt(stop, root / "middle.ckpt"))
            with pytest.raises(RuntimeError, match="interrupted"):
                first.fit(make_module(name), make_data(name, root))
        pl.seed_everything(0, verbose=False)
        trainer, module = make_trainer(root, **settings), make_module(name)
        trainer.fit(
            module,
            make_data(name, root),
            ckpt_path=root / "middle.ckpt" if stop else None,
            weights_only=True,
        )
        (watch,) = (c for c in trainer.callbacks if isinstance(c, RecoveryWatch))
        told.append((watch.history, module.tokens_seen))
    assert told[0] == told[1]


class Interrupt(pl.Callback):
    """Saves a checkpoint after a step, and ends the run."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise RuntimeError("interrupted")


class Widest(TorchDispatchMode):
    """The most rows of any tensor that is as wide as the vocabulary."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (self.vocabulary,):
                self.rows = max(self.rows, tensor.numel() // self.vocabulary)
        return out


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_no_evaluation_holds_all_logits(stage, name, tmp_path):
    measured, ids = {}, torch.randint(3, 40, (20, 120))
    loader = torch.utils.data.DataLoader(
        [0], collate_fn=lambda _: {"input_ids": ids, "labels": ids}
    )
    for chunked in (True, False):
        pl.seed_everything(0, verbose=False)
        module, data = make_module(name, chunked_loss=chunked), make_data(name, tmp_path)
        trainer = make_trainer(tmp_path, limit_train_batches=1, max_epochs=1)
        trainer.fit(module, data)
        with Widest(module.model.config.vocab_size) as widest:
            results = getattr(trainer, stage)(module, loader, verbose=False)[0]
        measured[chunked] = (widest.rows, results)
    chunks, whole = measured[True], measured[False]
    assert whole[0] == 20 * 120
    assert chunks[0] == 256  # as many as are copied to float32 at a time
    assert chunks[1] == pytest.approx(whole[1], rel=1e-5)
