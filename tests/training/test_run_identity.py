"""What the identity of a run holds, and what a resume with one option changed comes to."""

import inspect
import logging
import re
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum, StrEnum
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
    StochasticWeightAveraging,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.cli import SaveConfigCallback
from option_changes import needlessly_refused, options, verdicts
from stopped_runs import LossLog, Terminate

from prunelight.callbacks import DLP, RecoveryCheckpoint, ShortGPT, TokenBudget
from prunelight.losses import IGNORED_LABEL
from prunelight.recovery.schedules import describe_schedule
from prunelight.run.checkpoints import check_same_run, check_same_settings
from prunelight.training.recovery_watch import RecoveryWatch
from prunelight.training.resuming import run_identity
from prunelight.training.resuming.run_identity import (
    describe_callbacks,
    describe_data,
    describe_methods,
    describe_own_classes,
    describe_run,
    describe_teacher,
    describe_trainer,
    described,
    differences,
    flat,
    is_known,
    numbered,
    plain,
    plans_of,
    same,
    tell_own_classes,
)

HARMLESS = {
    "trainer": run_identity.HARMLESS_IN_TRAINER,
    "model": run_identity.HARMLESS_IN_MODULE,
    "data": run_identity.HARMLESS_IN_DATA,
}


def make_trainer(**options):
    return pl.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, **options)


# --- which arguments count
TRAINER_CHANGES = {
    "accelerator": None,  # there is one accelerator here: see below
    "strategy": {"strategy": "ddp"},
    "fast_dev_run": {"fast_dev_run": True},
    "min_epochs": {"min_epochs": 2},
    "min_steps": {"min_steps": 3},
    "limit_val_batches": {"limit_val_batches": 1},
    "overfit_batches": {"overfit_batches": 1},
    "val_check_interval": {"val_check_interval": 1},
    "check_val_every_n_epoch": {"check_val_every_n_epoch": 2},
    "gradient_clip_algorithm": {"gradient_clip_algorithm": "value"},
    "deterministic": {"deterministic": "warn"},
    "benchmark": {"benchmark": True},
    "use_distributed_sampler": {"use_distributed_sampler": False},
    "plugins": {"precision": "bf16-true"},
    "reload_dataloaders_every_n_epochs": {"reload_dataloaders_every_n_epochs": 1},
}


@pytest.fixture(autouse=True)
def flags_of_torch():
    flags = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(flags[0])
    torch.backends.cudnn.benchmark = flags[1]


def test_each_argument_of_the_trainer_is_compared_or_named_as_harmless():
    compared = describe_trainer(make_trainer())
    assert compared.keys() == TRAINER_CHANGES.keys()
    assert None in compared.values()
    for name in compared.keys() - run_identity.READ_OFF_TRAINER.keys():
        assert hasattr(make_trainer(), name), f"{name} is read off no attribute"
    assert compared["accelerator"] == "CPUAccelerator"
    assert compared["strategy"] == {"class": "SingleDeviceStrategy"}
    assert not run_identity.HARMLESS_IN_TRAINER & run_identity.TOLD_OF_TRAINER


@pytest.mark.parametrize("name", [name for name, change in TRAINER_CHANGES.items() if change])
def test_an_argument_of_the_trainer_that_changes_is_seen(name):
    before, after = (
        {"trainer": plain(describe_trainer(make_trainer(**options)))}
        for options in ({}, TRAINER_CHANGES[name])
    )
    then, now = differences(before, after)
    assert f"trainer.{name}" in {*then, *now} or any(
        key.startswith(f"trainer.{name}.") for key in now
    )


def test_options_that_the_identity_names_are_options_of_the_command_line():
    names = {tuple(option.name.split(".")) for option in options("lora")}
    of = {section: {n[1] for n in names if n[0] == section} for section in HARMLESS}
    linked = {"trust_remote_code", "tokenizer"}  # of the data, to those of the model
    assert of["trainer"] >= run_identity.HARMLESS_IN_TRAINER | run_identity.TOLD_OF_TRAINER
    assert of["model"] >= run_identity.HARMLESS_IN_MODULE | run_identity.TOLD_OF_MODULE
    assert of["data"] | linked >= run_identity.HARMLESS_IN_DATA | run_identity.TOLD_OF_DATA


# --- the parts


def test_callbacks_count_with_what_they_are_given():
    best = ModelCheckpoint(monitor="val/perplexity", dirpath="a", filename="b", verbose=True)
    early = EarlyStopping("val/perplexity", patience=7, verbose=True, log_rank_zero_only=True)
    every = {"every_n_train_steps": 0, "every_n_epochs": 1}  # as Lightning resolves None
    assert describe_callbacks([best, early, early]) == {
        "ModelCheckpoint": {"class": "ModelCheckpoint", "monitor": "val/perplexity", **every},
        "EarlyStopping": {"class": "EarlyStopping", "monitor": "val/perplexity", "patience": 7},
        "EarlyStopping 2": {"class": "EarlyStopping", "monitor": "val/perplexity", "patience": 7},
    }
    averaging = StochasticWeightAveraging(swa_lrs=0.1)
    assert describe_callbacks([averaging])["StochasticWeightAveraging"]["swa_lrs"] == 0.1


def test_callbacks_that_only_show_write_or_end_do_not_count():
    shown = [RichProgressBar(), TQDMProgressBar(), LearningRateMonitor(), Timer("00:01:00:00")]
    written = [RecoveryCheckpoint(3), ModelCheckpoint(), ModelCheckpoint(monitor="train/loss")]
    cli = type("SaveConfig", (SaveConfigCallback,), {"__module__": "prunelight.lightning_cli"})
    added = [RecoveryWatch(), SaveConfigCallback(None, {"a": 1}), cli(None, {"a": 1})]
    later = type("Later", (pl.Callback,), {"__module__": "prunelight.training.later"})
    added += [later(), type("Later", (pl.Callback,), {"__module__": "prunelight.lightning_cli"})()]
    methods_and_own = [ShortGPT(num_layers=1), TokenBudget(9), LossLog(), Terminate()]
    assert describe_callbacks([*shown, *written, *added, *methods_and_own]) == {}


@pytest.mark.parametrize(
    "library", ["prunelight.callbacks", "lightning.pytorch", "pytorch_lightning"]
)
def test_classes_of_the_libraries_are_known(library):
    kind = type("Averaging", (pl.Callback,), {"__module__": library})
    assert is_known(kind())
    assert not is_known(Terminate())
    assert describe_callbacks([kind()]) == {"Averaging": {"class": "Averaging"}}


def test_methods_count_in_order_with_their_versions():
    later = ShortGPT(num_layers=2)
    later.version = 2
    assert describe_methods([ShortGPT(num_layers=1), LossLog(), DLP(0.5), later]) == {
        "ShortGPT": {"class": "ShortGPT", "version": 1, "num_layers": 1, "protected": []},
        "DLP": {"class": "DLP", "version": DLP.version, "sparsity": 0.5}
        | {"alpha": DLP(0.5).alpha},
        "ShortGPT 2": {"class": "ShortGPT", "version": 2, "num_layers": 2, "protected": []},
    }


def test_a_teacher_counts_by_its_weights_or_its_cache():
    model = torch.nn.Linear(2, 2)
    model.config = SimpleNamespace(model_type="linear")
    objective = SimpleNamespace(teacher=SimpleNamespace(model=model), cache=None)
    first = describe_teacher(SimpleNamespace(objective=objective))
    with torch.no_grad():
        model.weight += 1
    assert describe_teacher(SimpleNamespace(objective=objective)) != first
    objective.cache = SimpleNamespace(fingerprint="of the cache")
    assert describe_teacher(SimpleNamespace(objective=objective)) == "of the cache"
    objective.cache = objective.teacher = None
    assert describe_teacher(SimpleNamespace(objective=objective)) is None
    assert describe_teacher(SimpleNamespace(objective=None)) is None


class Data:
    """Data that says what it trains on."""

    def __init__(self, workers=1, shift=0):
        self.workers, self._shift = workers, shift

    def describe_training(self):
        return {"tokens": "abc"}


def test_data_counts_by_what_it_says_and_its_own_arguments():
    assert describe_data(None) == {}
    assert describe_data(object()) == {}
    own = describe_data(Data(2, 3))
    assert own == {"data.tokens": "abc", "data": {"class": "Data", "workers": 2, "shift": 3}}
    with_validation = type("Data", (Data,), {"describe_validation": lambda self: "def"})
    assert describe_data(with_validation())["data"] == {"class": "Data", "validation": "def"}


def test_arguments_that_are_harmless_or_told_elsewhere_are_left_out():
    """Each name stands here again: without it the argument would count twice, or needlessly."""
    of_module = (
        "latency probes trust_remote_code gradient_checkpointing name dtype recovery lora "
        "learning_rate warmup_steps lr_scheduler lr_scheduler_kwargs optimizer loss distillation "
        "quantization bitsandbytes"
    )
    given = {**dict.fromkeys(of_module.split(), 1), "keep_zeros": False}
    assert a_run(given=given)["model"] == {"keep_zeros": False}
    of_data = (
        "num_workers trust_remote_code tokenizer train text_field bos seq_len batch_size packing "
        "seed validation num_validation calibration num_calibration validation_seq_len "
        "calibration_seq_len"
    )
    names = of_data.split()
    parameters = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in (*names, "new")]
    given = {**dict.fromkeys(names, 1), "new": 2, "__signature__": inspect.Signature(parameters)}
    data = type("Data", (), {**given, "describe_training": lambda self: {}})()
    assert describe_data(data) == {"data": {"class": "Data", "new": 2}}


def test_arguments_of_callbacks_that_only_show_or_write_are_left_out():
    of_callbacks = (
        "verbose log_rank_zero_only dirpath filename save_last save_weights_only "
        "save_on_exception auto_insert_metric_name enable_version_counter"
    )
    of_strategies = (
        "accelerator device parallel_devices cluster_environment checkpoint_io precision_plugin "
        "timeout process_group_backend start_method config"
    )
    assert set(of_callbacks.split()) == run_identity.HARMLESS_IN_CALLBACKS
    assert set(of_strategies.split()) == run_identity.HARMLESS_IN_STRATEGY
    shown = (
        "RecoveryCheckpoint ModelSummary RichModelSummary DeviceStatsMonitor LearningRateMonitor "
        "ThroughputMonitor OnExceptionCheckpoint Timer TokenBudget"
    )
    assert set(shown.split()) == run_identity.HARMLESS_CALLBACKS


def test_a_schedule_counts_with_the_defaults_of_transformers():
    assert describe_schedule("cosine", 100) == {"num_cycles": 0.5}
    assert describe_schedule("constant", 100) == {}
    wsd = describe_schedule("warmup_stable_decay", 100)
    assert (wsd["num_decay_steps"], wsd["min_lr_ratio"]) == (10, 0)
    assert describe_schedule("warmup_stable_decay", 200)["num_decay_steps"] == 20


def a_run(max_steps=8, **changes):
    trainer = make_trainer(max_steps=max_steps, gradient_clip_val=0.5, limit_train_batches=4)
    trainer.fit_loop.setup_data = lambda: None
    trainer.datamodule = Data()
    run = SimpleNamespace(seed=3, prepared=SimpleNamespace(dtype=torch.bfloat16), record=None)
    run.objective = None
    optimizer = partial(torch.optim.AdamW, lr=0.25)
    given = {"name": "a", "latency": 1, "chunked_loss": False, "lora": 3}
    recovery = {"mode": "full", "lr_scheduler": "constant", "tokens_seen": 5}
    values = {"optimizer": optimizer, "given": given, "recovery": recovery, **changes}
    return describe_run(trainer, run, values["optimizer"], values["given"], values["recovery"])


def test_the_description_of_a_run_is_complete():
    told = a_run()
    defaults = torch.optim.AdamW([torch.zeros(1)]).defaults
    assert told.pop("optimizer") == plain({"class": "AdamW", **defaults, "lr": 0.25})
    assert told.pop("trainer").keys() == TRAINER_CHANGES.keys()
    assert told == {
        "mode": "full",
        "lr_scheduler": "constant",
        "scheduled_steps": None,
        "schedule": {},
        "accumulate_grad_batches": 1,
        "gradient_clip_val": 0.5,
        "limit_train_batches": 4,
        "processes": 1,
        "seed": 3,
        "dtype": "torch.bfloat16",
        "model": {"chunked_loss": False},
        "callbacks": {},
        "methods": {},
        "calibration": [],
        "teacher": None,
        "own_classes": {"Data": {"class": "Data"}},
        "data.tokens": "abc",
        "data": {"class": "Data"},
    }
    assert {*run_identity.LATER_KEYS} == {"schedule", "dtype", "model", "trainer", "data"} | {
        "callbacks",
        "methods",
        "calibration",
        "teacher",
        "own_classes",
    }


def test_a_schedule_that_is_not_constant_counts_with_its_steps():
    told = a_run(recovery={"lr_scheduler": "cosine"})
    assert told["scheduled_steps"] == 8
    assert told["schedule"] == {"num_cycles": 0.5}
    told = a_run(max_steps=40, recovery={"lr_scheduler": "warmup_stable_decay"})
    assert told["schedule"]["num_decay_steps"] == 4
    assert a_run(recovery={})["scheduled_steps"] is None


def test_plans_count_by_what_they_were_made_from():
    assert plans_of(SimpleNamespace(record=None)) == []
    assert plans_of(SimpleNamespace(record=SimpleNamespace(plans=[1]))) == [1]


# --- the comparison


def test_what_an_older_version_did_not_write_is_not_compared():
    names = "own_classes dtype schedule model trainer data methods calibration callbacks teacher"
    assert set(names.split()) == set(run_identity.LATER_KEYS)
    assert set(run_identity.OF_THE_MODEL) == {"dtype", "calibration", "teacher"}
    ours = {"seed": 1, **{key: {"a": "x"} for key in run_identity.LATER_KEYS}}
    assert differences({"seed": 1}, ours) == ({}, {})
    for key in (key for key in run_identity.LATER_KEYS if key != run_identity.OWN_CLASSES):
        then = {"seed": 1, key: {"a": "y"}}
        assert differences(then, ours) == ({f"{key}.a": "y"}, {f"{key}.a": "x"})
        assert differences(ours, {"seed": 1}) != ({}, {})


def test_a_setting_that_only_one_side_has_differs():
    assert differences({"alpha": 1}, {}) == ({"alpha": 1}, {})
    assert differences({}, {"alpha": 1}) == ({}, {"alpha": 1})
    nested = ({"model": {"a": {"b": 1}, "c": 2}}, {"model": {"c": 2}})
    assert differences(*nested) == ({"model.a.b": 1}, {})


def test_settings_that_differ_are_refused_with_both_sides():
    check_same_settings({}, {}, "last.ckpt")
    words = "last.ckpt was written by a run with {}, this one has {}: going on would give neither"
    for then, now, told in (
        ({"a": 1}, {"a": 2}, ("a=1", "a=2")),
        ({"a": 1}, {}, ("a=1", "a unset")),
        ({}, {"b": None, "a": 2}, ("a unset, b unset", "a=2, b=None")),
    ):
        with pytest.raises(ValueError, match=words.format(*told)):
            check_same_settings(then, now, "last.ckpt")


@pytest.mark.parametrize("key", ["fingerprint", "recovery", "zeros", "quantization"])
def test_a_checkpoint_of_another_training_does_not_fit(key):
    saved = {"fingerprint": "a", "recovery": "lora", "zeros": "not_kept", "base": "b"}
    saved |= {"quantization": {"kind": "none"}}
    check_same_run(saved, {**saved, "base": "moved"})
    other = {"kind": "nf4"} if key == "quantization" else "other"
    with pytest.raises(
        ValueError, match="the checkpoint was trained by lora with quantization non"
    ):
        check_same_run(saved, {**saved, key: other})


def test_what_grows_or_is_a_path_does_not_count():
    grows = ("optimizer_steps", "tokens_seen", "weights_of_step")
    for name in (*grows, "distillation.cache"):
        assert differences({name: 1}, {name: 2}) == ({}, {})
        assert differences({name: 1}, {}) == ({}, {})


def test_an_option_that_one_version_of_lightning_lacks_does_not_count():
    then = {"trainer": {"old": 1, "same": 2, "strategy": {"class": "A"}}}
    now = {"trainer": {"same": 2, "new": 3, "strategy": {"class": "A", "option": 1}}}
    assert differences(then, now) == ({}, {"trainer.strategy.option": 1})
    now["trainer"]["same"] = 4
    assert differences(then, now)[0] == {"trainer.same": 2}
    assert differences({"trainer": {"same": 1}}, {}) == ({"trainer.same": 1}, {})


@pytest.mark.parametrize(
    "name",
    ["limit_train_batches", "limit_val_batches", "overfit_batches", "val_check_interval"],
)
def test_one_batch_is_not_all_batches(name):
    assert not same(f"trainer.{name}", 1, 1.0)
    assert not same(name, 1.0, 1)
    assert same(name, 1, 1)
    assert not same(name, 1, 2)
    assert same("learning_rate", 1, 1.0)


def test_classes_of_the_users_own_are_told_and_not_refused(caplog):
    trainer = make_trainer(callbacks=[Terminate(rank=2), ModelCheckpoint(), ShortGPT(ratio=0.5)])
    trainer.datamodule = Data()
    own = {"Terminate": {"class": "Terminate", "rank": 2}, "Data": {"class": "Data"}}
    assert describe_own_classes(trainer) == own
    ours, key = {"own_classes": own}, "own_classes"
    caplog.clear()  # of what Lightning says of a Trainer
    with caplog.at_level(logging.WARNING):
        tell_own_classes({}, ours, "last.ckpt")
        tell_own_classes({key: own}, ours, "last.ckpt")
        assert caplog.messages == []
        tell_own_classes({key: {}}, ours, "last.ckpt")
    (line,) = caplog.messages
    assert "last.ckpt was written by a run with no classes of your own" in line
    assert "this one has Terminate(rank=2), Data(): prunelight does not know" in line
    assert differences({key: {}}, ours) == ({}, {})


# --- values


class Color(StrEnum):
    RED = "red"


class Number(Enum):
    ONE = 1


@dataclass
class Pair:
    left: int
    right: Path


def test_values_become_plain_ones_without_addresses_of_memory():
    pair = Pair(1, Path("a"))
    assert plain([True, 1, 0.5, None, "x", Color.RED]) == [True, 1, 0.5, None, "x", "red"]
    assert plain(({2: pair}, {"b", "a"})) == [{"2": {"left": 1, "right": "a"}}, ["a", "b"]]
    assert plain(frozenset({2, 1})) == [1, 2]
    assert plain(Number.ONE) == "Number.ONE"
    assert plain(torch.bfloat16) == "torch.bfloat16"
    assert plain(torch.tensor([1, 2])) == [1, 2]
    assert plain(timedelta(hours=1)) == "1:00:00"
    assert plain(object()) == "object"
    assert plain(Pair).endswith("Pair")
    assert plain(describe_run) == "prunelight.training.resuming.run_identity.describe_run"
    assert plain(partial(max, 1, key=2)) == ["builtins.max", [1], {"key": 2}]


def test_arguments_are_read_with_and_without_an_underscore():
    assert described(Data(), ()) == {"class": "Data"}
    assert described(Data(2, 3), ("workers",)) == {"class": "Data", "shift": 3}
    assert flat({"a": {"b": {}, "c": 1}, "d": 2}) == {"a.c": 1, "d": 2}
    three = [{"class": "A"}, {"class": "A"}, {"class": "A"}]
    assert [*numbered(three)] == ["A", "A 2", "A 3"]
    assert IGNORED_LABEL


# --- one option changed, from the command line


EQUAL = (
    "trainer.inference_mode",
    "model.gradient_checkpointing",
    "data.num_workers",
    "ModelCheckpoint.save_weights_only",
)
REFUSED = {
    "model.dtype": "dtype=torch.float32, this one has dtype=torch.bfloat16",
    "model.chunked_loss": "model.chunked_loss unset, this one has model.chunked_loss=False",
    "trainer.gradient_clip_algorithm": "trainer.gradient_clip_algorithm=value",
    "trainer.gradient_clip_val": "gradient_clip_val=0.5, .* gradient_clip_val=1.5",
    "trainer.limit_train_batches": "limit_train_batches=4, .* limit_train_batches=3",
    "trainer.limit_val_batches": "limit_val_batches=1.0, .*limit_val_batches=1:",
    "ShortGPT.ignore_first_tokens": "methods.ShortGPT.ignore_first_tokens=1",
}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    return verdicts("lora", tmp_path_factory.mktemp("stopped"), [*EQUAL, *REFUSED])


@pytest.mark.parametrize("name", EQUAL)
def test_an_option_that_changes_no_number_changes_no_weight(name, told):
    assert told[name] == "equal"


@pytest.mark.parametrize("name", REFUSED)
def test_an_option_that_changes_numbers_is_refused(name, told):
    assert told[name].startswith("refused: ")
    assert re.search(REFUSED[name], told[name])


@pytest.mark.sweep
@pytest.mark.parametrize("case", ["lora", "kd", "kd_topk"])
def test_each_option_changed_once_is_refused_or_changes_nothing(case, tmp_path):
    told = verdicts(case, tmp_path)
    assert {name: verdict for name, verdict in told.items() if verdict.startswith("FAULT")} == {}
    assert needlessly_refused(told) == {}


@pytest.mark.parametrize(("interval", "told"), [("00:00:00:10", 10.0), (2, 2), (0.5, 0.5)])
def test_a_validation_by_the_clock_is_compared_too(interval, told):
    trainer = pl.Trainer(val_check_interval=interval, logger=False, accelerator="cpu")
    assert describe_trainer(trainer)["val_check_interval"] == told
