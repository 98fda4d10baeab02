"""A training that turns NaN or infinite ends within a logging interval; good checkpoints stay."""

import re

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from poison import FAULTS
from runs import make_data, make_module, make_trainer, write_model

import prunelight
from prunelight.callbacks import ShortGPT
from prunelight.callbacks.recovery.checkpoint import RecoveryCheckpoint
from prunelight.recovery.sharded_weights import trained_parameters
from prunelight.runtime.finite import check_checkpoint_tensors
from prunelight.training.finite_training import MOST_SKIPS

SMALL = {"num_hidden_layers": 2, "tie_word_embeddings": False}
STEP = 7  # after which something turns NaN
INTERVAL = 4  # of logging


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "tiny", **SMALL)


def kinds():
    """The tensors of one decoder layer and those outside, as the trained ones are named."""
    import tiny

    model = tiny.tiny_model(**SMALL)
    return [n for n, _ in model.named_parameters() if "layers.0" not in n]


class Poison(pl.Callback):
    """Makes one number of a trained tensor none, after a step."""

    def __init__(self, ending, fault):
        self.ending, self.fault = ending, FAULTS[fault]

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == STEP:
            trained = trained_parameters(pl_module.model)
            (tensor,) = (p for n, p in trained.items() if n.endswith(self.ending))
            with torch.no_grad():
                tensor.view(-1)[-1] = self.fault


class BadLoss(pl.Callback):
    """Lets the states before the head be no numbers at one step, and so the loss."""

    def __init__(self, fault, step=STEP + 1):
        self.fault, self.step = FAULTS[fault], step

    def on_train_batch_start(self, trainer, pl_module, *_):
        if trainer.global_step + 1 == self.step:
            (norm,) = (m for n, m in pl_module.named_modules() if n.endswith("model.norm"))
            self.hook = norm.register_forward_hook(lambda *call: call[-1] * self.fault)

    def on_train_batch_end(self, trainer, pl_module, *_):
        if hasattr(self, "hook"):
            self.hook.remove()


def train(name, tmp_path, *callbacks, every=2, plugins=None, module=None, **arguments):
    """Fit for 60 steps; return the Trainer and the error that ended the fit."""
    settings = {"max_epochs": 20, "max_steps": 60, "log_every_n_steps": INTERVAL}
    trainer = make_trainer(
        tmp_path,
        *callbacks,
        RecoveryCheckpoint(every_n_train_steps=every),
        **{**settings, **arguments.pop("trainer", {})},
        plugins=plugins,
    )
    pl.seed_everything(0, verbose=False)
    module = module or make_module(name, **arguments)
    with pytest.raises((RuntimeError, ValueError)) as caught:
        trainer.fit(module, make_data(name, tmp_path))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "final").exists()
    return trainer, str(caught.value)


def last_checkpoint(tmp_path):
    """The checkpoint that is left, whose numbers must be finite."""
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    check_checkpoint_tensors(checkpoint, "it", "help")
    return checkpoint


@pytest.mark.parametrize("ending", kinds())
def test_a_trained_tensor_that_turns_nan_ends_the_run_and_never_enters_a_checkpoint(
    ending, name, tmp_path
):
    fault = [*FAULTS][kinds().index(ending) % 3]
    trainer, told = train(name, tmp_path, Poison(ending, fault), recovery="full")
    assert trainer.global_step <= STEP + INTERVAL
    assert str(STEP + 1) in told
    assert last_checkpoint(tmp_path)["global_step"] == STEP - 1
    assert re.search(r"\.ckpt is the last good checkpoint. To go on, lower the learning", told)


@pytest.mark.parametrize("adapter", ["self_attn.v_proj.lora_A", "mlp.up_proj.lora_B"])
def test_so_does_an_adapter(adapter, name, tmp_path):
    trainer, _ = train(name, tmp_path, Poison(f"layers.1.{adapter}.default.weight", "NaN"))
    assert trainer.global_step <= STEP + INTERVAL
    assert last_checkpoint(tmp_path)["global_step"] == STEP - 1


@pytest.mark.parametrize("fault", ["NaN", "inf"])
@pytest.mark.parametrize("accumulated", [1, 3])
def test_a_loss_that_is_no_number_names_its_step_within_a_logging_interval(
    fault, accumulated, name, tmp_path
):
    trainer, told = train(
        name,
        tmp_path,
        BadLoss(fault),
        every=100,
        trainer={"accumulate_grad_batches": accumulated},
    )
    assert re.search(rf"the training loss is (nan|inf) at optimizer step {STEP + 1}, ", told)
    assert trainer.global_step == 2 * INTERVAL
    assert "ckpt is the last good checkpoint" in told


def test_a_run_shorter_than_the_interval_ends_with_the_error_too(name, tmp_path):
    settings = {"max_steps": STEP + 2, "log_every_n_steps": 50}
    _, told = train(name, tmp_path, BadLoss("NaN"), every=100, trainer=settings)
    assert f"at optimizer step {STEP + 1}, the run ends at step {STEP + 2}" in told
    settings = {"max_steps": STEP, "log_every_n_steps": 50}  # only the last step's weights
    (tmp_path / "weights").mkdir()
    poison = Poison("model.norm.weight", "inf")
    _, told = train(
        name, tmp_path / "weights", poison, every=100, recovery="full", trainer=settings
    )
    assert f"the training after optimizer step {STEP}: " in told
    assert "norm.weight holds inf" in told


def test_the_best_weights_are_never_those_of_a_failed_training(name, tmp_path):
    best = ModelCheckpoint(
        tmp_path / "best", monitor="val/perplexity", filename="best", save_weights_only=True
    )
    settings = {
        "val_check_interval": 2,
        "check_val_every_n_epoch": None,
        "limit_train_batches": 1.0,
    }
    train(name, tmp_path, best, Poison("lm_head.weight", "NaN"), recovery="full", trainer=settings)
    checkpoint = torch.load(tmp_path / "best" / "best.ckpt", weights_only=True)
    check_checkpoint_tensors(checkpoint, "it", "help")
    assert checkpoint["global_step"] <= STEP


def test_the_same_command_goes_on_from_the_good_checkpoint(name, tmp_path):
    train(name, tmp_path, BadLoss("NaN"))
    trainer = make_trainer(
        tmp_path, RecoveryCheckpoint(2), max_epochs=20, max_steps=60, log_every_n_steps=INTERVAL
    )
    pl.seed_everything(0, verbose=False)
    trainer.fit(make_module(name), make_data(name, tmp_path), ckpt_path="last", weights_only=True)
    assert trainer.global_step == 60
    assert (tmp_path / "final").exists()


@pytest.mark.parametrize("where", ["weights", "optimizer"])
def test_a_damaged_checkpoint_is_found_on_load(where, name, tmp_path):
    train(name, tmp_path, BadLoss("NaN"))
    file = tmp_path / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    if where == "weights":
        place, tensor = [*checkpoint["state_dict"].items()][3]
    else:
        tensor = checkpoint["optimizer_states"][0]["state"][2]["exp_avg"]
        place = "optimizer state 0.state.2.exp_avg"
    tensor.view(-1)[0] = float("nan")
    torch.save(checkpoint, file)
    trainer = make_trainer(tmp_path, RecoveryCheckpoint(2), max_steps=60)
    pl.seed_everything(0, verbose=False)
    with pytest.raises(ValueError, match=rf"last.ckpt: {re.escape(place)} holds NaN"):
        trainer.fit(make_module(name), make_data(name, tmp_path), ckpt_path="last")


# --- loss scaling ----------------------------------------------------------------------------


class Overflow(pl.Callback):
    """Makes gradients infinite at some steps, as an overflow of float16 does."""

    def __init__(self, steps):
        self.steps = steps

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step in self.steps:
            next(iter(trained_parameters(pl_module.model).values())).grad.fill_(float("inf"))


def scaler():
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))


def test_skipped_steps_are_right_as_long_as_the_scaler_finds_a_scale(name, tmp_path):
    trainer = make_trainer(
        tmp_path,
        Overflow({*range(15), 20, 21, 40}),
        plugins=scaler(),
        max_epochs=20,
        max_steps=45,
        log_every_n_steps=1,
    )
    module = make_module(name)
    trainer.fit(module, make_data(name, tmp_path))
    assert trainer.global_step == 45
    assert (tmp_path / "final").exists()


def test_endless_skipping_ends_the_run(name, tmp_path):
    trainer, told = train(name, tmp_path, Overflow(range(9, 1000)), plugins=scaler())
    assert trainer.global_step == 9 + MOST_SKIPS + 1
    assert "the loss scaler skipped the last 21 optimizer steps" in told
    last_checkpoint(tmp_path)


def test_a_short_run_of_which_every_step_is_skipped_is_no_success(name, tmp_path):
    trainer = make_trainer(
        tmp_path, Overflow(range(1000)), plugins=scaler(), max_epochs=20, max_steps=6
    )
    with pytest.raises(RuntimeError, match="skipped all 6 optimizer steps: nothing is trained"):
        trainer.fit(make_module(name), make_data(name, tmp_path))
    assert not (tmp_path / "final").exists()


def test_with_a_scaler_weights_that_are_no_numbers_end_the_run_at_once(name, tmp_path):
    poison = Poison("model.norm.weight", "NaN")
    trainer, told = train(name, tmp_path, poison, recovery="full", plugins=scaler(), every=100)
    assert trainer.global_step <= STEP + INTERVAL
    assert "norm.weight holds NaN" in told


def test_full_float16_training_that_fails_says_so(name, tmp_path):
    trainer, told = train(name, tmp_path, recovery="full", dtype="float16", learning_rate=10.0)
    assert trainer.global_step <= INTERVAL
    assert "the training loss is nan at optimizer step" in told or "holds" in told


# --- a module of the user's own --------------------------------------------------------------


class Own(pl.LightningModule):
    """Trains in its own way, and diverges after a step."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def setup(self, stage):
        self.model, self.tokenizer = prunelight.load(self.name)

    def training_step(self, batch, batch_idx):
        loss = self.model(**batch).loss
        return loss * float("nan") if self.global_step == STEP else loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.model.parameters(), lr=1e-3)


def test_a_module_of_the_users_own_ends_alike(name, tmp_path):
    trainer, told = train(name, tmp_path, ShortGPT(num_layers=1), module=Own(name), every=2)
    assert f"the training loss is nan at optimizer step {STEP + 1}, " in told
    assert trainer.global_step == 2 * INTERVAL
    assert last_checkpoint(tmp_path)["global_step"] == STEP - 1
