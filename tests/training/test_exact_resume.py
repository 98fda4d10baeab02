"""A run that was interrupted and started again equals one that was not; what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

import lightning.pytorch as pl
import pytest
import runs
import torch
import yaml
from file_limits import files_of_at_most
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities.exceptions import SIGTERMException
from runs import make_data, make_module, write_model
from safetensors.torch import load_file
from stopped_runs import Terminate, write_config
from tiny import tiny_model

from prunelight.callbacks import DLP, RecoveryCheckpoint, ShortGPT
from prunelight.cli import main
from prunelight.recovery.lora import LoRA
from prunelight.recovery.prepared_model import PreparedModel, RecoverySettings
from prunelight.recovery.zeros.gradual_zeros import Schedule
from prunelight.run.checkpoints import training_end
from prunelight.run.preflight import FinishedRunError
from prunelight.run.strategies import FSDP2Strategy
from prunelight.runtime.files.atomic_files import ENDING
from prunelight.runtime.files.checkpoint_files import check_checkpoint_path
from prunelight.runtime.processes import ProcessGroup
from prunelight.training.resuming.checkpoint_io import AtomicCheckpointIO
from prunelight.training.resuming.exact_resume import inexact_resume, seed_batch
from prunelight.training.trainer import Trainer

DROPOUT = {"lora": LoRA(dropout=0.2), "warmup_steps": 2}


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module", autouse=True)
def little_text():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "TEXT", runs.TEXT[:605])  # four batches an epoch
        yield


class Interrupted(Exception):
    pass


class Losses(pl.Callback):
    """Notes every loss with epoch, batch, optimizer step; interrupts after some batches."""

    def __init__(self, after=None):
        self.after, self.seen, self.validated = after, [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if len(self.seen) == self.after:
            raise Interrupted

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        place = (trainer.current_epoch, batch_idx, trainer.global_step)
        self.seen.append((*place, outputs["loss"].item()))

    def on_validation_end(self, trainer, pl_module):
        perplexity = trainer.callback_metrics["val/perplexity"].item()
        self.validated.append((trainer.global_step, perplexity))


def fit(
    name, root, *callbacks, after=None, ckpt_path="last", every=1, data=(), model=(), **trainer
):
    """Start a run, or start it again; return its losses and module."""
    root.mkdir(exist_ok=True)
    pl.seed_everything(3, verbose=False)
    losses = Losses(after)
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "num_sanity_val_steps": 0,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": root,
        **trainer,
    }
    made = pl.Trainer(callbacks=[*callbacks, losses, RecoveryCheckpoint(every)], **settings)
    module = make_module(name, **{**DROPOUT, **dict(model)})
    try:
        made.fit(module, make_data(name, root, **dict(data)), ckpt_path=ckpt_path)
    except Interrupted:
        assert after is not None
    return losses, module


def final(root):
    return load_file(root / "final" / "model.safetensors")


def assert_same(root, whole):
    mine, other = final(root), final(whole)
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[key], other[key]) for key in mine)


def short_gpt():
    return ShortGPT(num_layers=2)


def gradual():
    return DLP(0.5, schedule=Schedule(0, 4, every=2))


# --- the law


@pytest.mark.parametrize(
    ("callback", "after", "arguments"),
    [
        (short_gpt, 3, {"val_check_interval": 2}),
        (short_gpt, 6, {"accumulate_grad_batches": 3, "data": {"num_workers": 1}}),
        (short_gpt, 4, {"model": {"recovery": "full"}, "max_steps": 7, "max_epochs": None}),
        (gradual, 5, {"model": {"recovery": "full"}, "accumulate_grad_batches": 2}),
        (gradual, 2, {"val_check_interval": 1, "limit_train_batches": 3}),
    ],
    ids=["mid-epoch", "mid-accumulation", "epoch end", "gradual full", "gradual lora"],
)
def test_an_interrupted_run_equals_a_whole_one_bit_for_bit(
    callback, after, arguments, name, tmp_path
):
    whole, _ = fit(name, tmp_path / "whole", callback(), **arguments)
    root = tmp_path / "parts"
    first, _ = fit(name, root, callback(), after=after, **arguments)
    torch.rand(7)  # nothing that is drawn between may matter
    second, _ = fit(name, root, callback(), **arguments)
    assert len(first.seen) == after
    assert second.seen[0] != whole.seen[0], "it starts anew"
    begun = [row[:2] for row in whole.seen].index(second.seen[0][:2])
    assert first.seen[:begun] + second.seen == whole.seen
    assert first.seen == whole.seen[:after]
    assert dict(first.validated + second.validated) == dict(whole.validated)
    assert_same(root, tmp_path / "whole")
    reports = [json.loads((r / "report.json").read_text()) for r in (root, tmp_path / "whole")]
    assert reports[0]["recovery"] == reports[1]["recovery"]
    assert reports[0]["curves"] == reports[1]["curves"]
    assert reports[0]["curves"]["train_loss"]
    assert not list(root.rglob(".*tmp"))


def test_dropout_makes_losses_that_another_seed_would_not_give(name, tmp_path):
    """Without it the law above would say little about random numbers."""
    _, module = fit(name, tmp_path, short_gpt(), limit_train_batches=1, max_epochs=1)
    assert module.run.seed == 3
    draws = []
    for position in ((3, 0, 0, 0), (3, 0, 0, 1), (3, 1, 0, 0), (4, 0, 0, 0), (3, 0, 0, 0)):
        seed_batch(*position)
        draws.append(torch.rand(1).item())
    assert len(set(draws)) == 4
    assert draws[0] == draws[-1]


def test_adapters_start_from_the_seed_alone():
    weights = []
    for drawn, seed in ((0, 1), (5, 1), (0, 2)):
        model = tiny_model()
        torch.rand(drawn)
        before = torch.get_rng_state()
        adapted = PreparedModel(model, [], RecoverySettings(seed=seed))
        assert torch.equal(torch.get_rng_state(), before)
        weights.append(next(p for n, p in adapted.model.named_parameters() if "lora_A" in n))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("stop", [False, True], ids=["ended", "stopped early"])
def test_a_run_killed_before_its_report_trains_nothing_and_leaves_the_same(stop, name, tmp_path):
    whole, _ = fit(name, tmp_path, *ending(stop))
    assert {row[0] for row in whole.seen} == ({0} if stop else {0, 1})
    weights, report = final(tmp_path), json.loads((tmp_path / "report.json").read_text())
    (tmp_path / "report.md").unlink()
    again, _ = fit(name, tmp_path, *ending(stop))
    assert again.seen == []
    assert all(torch.equal(weights[key], value) for key, value in final(tmp_path).items())
    later = json.loads((tmp_path / "report.json").read_text())
    assert later["recovery"] == report["recovery"]
    assert later["curves"] == report["curves"]
    spent = [{c["name"]: c["seconds"] for c in r["costs"]}["recover"] for r in (report, later)]
    assert spent[0] == pytest.approx(spent[1], abs=0.05)


def ending(early):
    stop = EarlyStopping("val/perplexity", stopping_threshold=1e9, verbose=False)
    return [short_gpt(), *([stop] if early else [])]


@pytest.mark.parametrize("early", [False, True], ids=["ended", "stopped early"])
def test_a_finished_run_started_again_is_refused_and_keeps_its_files(early, name, tmp_path):
    fit(name, tmp_path, *ending(early))
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "final").iterdir()}
    with pytest.raises(FinishedRunError, match=r"final holds the result of \d+ steps"):
        fit(name, tmp_path, *ending(early))
    assert files == {file: file.stat().st_mtime_ns for file in (tmp_path / "final").iterdir()}


def test_our_trainer_refuses_a_finished_run_before_it_loads_a_model(name, tmp_path):
    trainer = {"max_steps": 2, "logger": False, "enable_progress_bar": False}

    def start(**changes):
        callbacks = [short_gpt(), RecoveryCheckpoint(1)]
        made = Trainer(**{**trainer, **changes}, default_root_dir=tmp_path, callbacks=callbacks)
        module = make_module(name)
        made.fit(module, make_data(name, tmp_path))
        return module

    start()
    held = Path(name, "model.safetensors")
    with pytest.raises(FinishedRunError, match="raise trainer.max_steps"), hidden(held):
        start()
    assert start(max_steps=3).describe_recovery()["optimizer_steps"] == 3
    with pytest.raises(FinishedRunError), hidden(held):
        start(max_steps=3)


@contextmanager
def hidden(file):
    """A file that is not there: who reads it fails."""
    other = file.rename(file.with_suffix(".hidden"))
    try:
        yield
    finally:
        other.rename(file)


@pytest.mark.parametrize(
    ("longer", "schedule"),
    [
        ({"max_epochs": 3}, "linear"),
        ({"max_steps": 11, "max_epochs": -1}, "constant"),
        pytest.param({"max_epochs": 3}, "constant", marks=pytest.mark.sweep),
        pytest.param({"max_steps": 11, "max_epochs": -1}, "linear", marks=pytest.mark.sweep),
    ],
)
def test_a_finished_run_trains_on_with_more_steps_into_a_new_result(
    schedule, longer, name, tmp_path
):
    model = {"lr_scheduler": schedule, "warmup_steps": 0}
    fit(name, tmp_path / "whole", short_gpt(), model=model, **longer)
    first, _ = fit(name, tmp_path / "parts", short_gpt(), model=model)
    before = final(tmp_path / "parts")
    rest, module = fit(name, tmp_path / "parts", short_gpt(), model=model, **longer)
    assert rest.seen[0][2] == first.seen[-1][2] + 1
    whole = json.loads((tmp_path / "whole" / "report.json").read_text())["recovery"]
    parts = json.loads((tmp_path / "parts" / "report.json").read_text())["recovery"]
    assert parts["optimizer_steps"] == whole["optimizer_steps"]
    # Lightning counts an epoch more where max_steps ends the training: its order is another one.
    if schedule == "constant" and "max_steps" not in longer:  # as one run
        assert_same(tmp_path / "parts", tmp_path / "whole")
    else:
        assert any(not torch.equal(before[key], x) for key, x in final(tmp_path / "parts").items())
        assert "need not be that of one training" in module.record.warnings[0]
    with pytest.raises(FinishedRunError):
        fit(name, tmp_path / "parts", short_gpt(), model=model, **longer)


class CtrlC(pl.Callback):
    """Presses Ctrl-C at the third call of a hook, as often as it is told."""

    def __init__(self, hook, times=1):
        self.calls, self.times = 0, times
        setattr(self, hook, self.press)

    def press(self, *_):
        self.calls += 1
        if self.calls == 3:
            for _ in range(self.times):
                signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("hook", "times"),
    [
        ("on_train_batch_start", 1),
        ("on_train_batch_end", 2),
        pytest.param("on_train_batch_start", 2, marks=pytest.mark.sweep),
        pytest.param("on_train_batch_end", 1, marks=pytest.mark.sweep),
    ],
)
def test_ctrl_c_saves_the_step_and_the_run_goes_on_from_there(hook, times, name, tmp_path, caplog):
    fit(name, tmp_path / "whole", short_gpt())
    every = 100 if times == 1 else 1  # the second one does not wait for a save
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        fit(name, tmp_path / "parts", short_gpt(), CtrlC(hook, times), every=every)
    assert "goes on from there" in caplog.text
    signal.signal(signal.SIGINT, before)  # Lightning leaves it ignored
    rest, _ = fit(name, tmp_path / "parts", short_gpt(), every=every)
    assert rest.seen[0][:2] == (0, 3 if times == 1 else 2)
    assert_same(tmp_path / "parts", tmp_path / "whole")


def test_ctrl_c_before_the_training_says_that_nothing_is_lost(name, tmp_path, caplog):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        fit(name, tmp_path, short_gpt(), PressAtFitStart())
    signal.signal(signal.SIGINT, before)
    assert "stopped before a step was trained" in caplog.text
    assert "pruned-" in caplog.text  # which is not made again
    fit(name, tmp_path, short_gpt())


@pytest.fixture(autouse=True)
def ctrl_c_raises():
    """Lightning leaves Ctrl-C ignored after a run that it ended."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class PressAtFitStart(pl.Callback):
    def on_fit_start(self, trainer, pl_module):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    "hook", ["on_train_batch_start", "on_validation_start", "on_validation_batch_start"]
)
def test_sigterm_saves_and_the_run_goes_on_from_there(hook, name, tmp_path):
    often = {"val_check_interval": 3, "check_val_every_n_epoch": None}
    fit(name, tmp_path / "whole", short_gpt(), **often)
    with pytest.raises(SIGTERMException):
        fit(name, tmp_path / "parts", short_gpt(), Terminate(hook), every=100, **often)
    rest, _ = fit(name, tmp_path / "parts", short_gpt(), Terminate(), every=100, **often)
    assert rest.seen[0][:2] == (0, 3)
    assert_same(tmp_path / "parts", tmp_path / "whole")


def test_sigterm_ends_a_validation_after_a_fit_at_once(name, tmp_path):
    terminate = Terminate("on_test_batch_start")
    settings = {"max_steps": 2, "logger": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        default_root_dir=tmp_path, callbacks=[terminate, RecoveryCheckpoint()], **settings
    )
    module, data = make_module(name), make_data(name, tmp_path, batch_size=1)
    trainer.fit(module, data)
    with pytest.raises(SIGTERMException):
        trainer.test(module, data, verbose=False)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.sweep), 1])
def test_two_processes_save_at_the_same_step_whichever_gets_the_signal(rank, tmp_path):
    root, made = tmp_path / "run", tmp_path / "made"
    arguments = write_config(made, "shortgpt")
    config = yaml.safe_load((made / "config.yaml").read_text())
    terminate = {"class_path": "stopped_runs.Terminate", "init_args": {"rank": rank}}
    often = {"class_path": "RecoveryCheckpoint", "init_args": {"every_n_train_steps": 100}}
    config["trainer"]["callbacks"] = [terminate, often]
    config["trainer"] |= {"devices": 2, "strategy": "ddp", "max_steps": 6}
    config["trainer"] |= {"default_root_dir": str(root)}
    (made / "config.yaml").write_text(yaml.safe_dump(config))

    def start():
        return subprocess.run(
            [Path(sys.executable).with_name("prunelight"), "fit", *arguments],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            timeout=300,
        )

    terminated = start()
    assert terminated.returncode == 128 + signal.SIGTERM, terminated.stderr[-3000:]
    saved = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 3
    resumed = start()
    assert resumed.returncode == 0, resumed.stderr[-3000:]


def test_a_rank_saves_with_those_that_got_the_signal_first(name, tmp_path, monkeypatch):
    class Other(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            # The first question is whether to end, the second whether by Ctrl-C.
            answers = iter([trainer.global_step == 2])  # of a rank that got it
            monkeypatch.setattr(ProcessGroup, "any", lambda group, ours: ours or next(answers, 0))

    with pytest.raises(SIGTERMException):
        fit(name, tmp_path, short_gpt(), Other(), every=100)
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 3


# --- writing


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one_intact(tmp_path):
    writer, path = AtomicCheckpointIO(), tmp_path / "checkpoints" / "last.ckpt"
    content = {"state_dict": {}, "pytorch-lightning_version": "2.6.0", "x": torch.ones(3)}
    writer.save_checkpoint(content, path)
    told = "cannot write .*last.ckpt: File too large; checkpoint .*last.ckpt is intact"
    with files_of_at_most(10_000), pytest.raises(OSError, match=told) as raised:
        writer.save_checkpoint({"x": torch.rand(100_000)}, path)
    assert "\n" not in str(raised.value)
    assert torch.equal(writer.load_checkpoint(path)["x"], torch.ones(3))
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def test_a_base_or_result_that_cannot_be_written_is_one_line(name, tmp_path):
    told = "cannot write .*pruned-.*: File too large; what was there before is intact"
    with files_of_at_most(50_000), pytest.raises(OSError, match=told):
        fit(name, tmp_path, short_gpt())
    fit(name, tmp_path, short_gpt(), after=2)

    class Full(pl.Callback):
        def on_fit_end(self, trainer, pl_module):
            stack.enter_context(files_of_at_most(50_000))

    told = "cannot write .*final: File too large; checkpoint .*last.ckpt is intact"
    with ExitStack() as stack, pytest.raises(OSError, match=told):
        fit(name, tmp_path, short_gpt(), Full(), every=100)
    fit(name, tmp_path, short_gpt(), every=100)
    assert (tmp_path / "final" / "config.json").is_file()


def test_an_unwritable_directory_is_refused_before_any_work(name, tmp_path):
    data = make_data(name, tmp_path)
    trainer = pl.Trainer(
        callbacks=[short_gpt()],
        default_root_dir="/proc/nowhere",
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
    )
    with pytest.raises(OSError, match="cannot write /proc/nowhere: .*choose another directory"):
        trainer.fit(make_module(name), data)


def test_the_command_line_tells_of_an_unwritable_directory_in_one_line(name, tmp_path):
    (tmp_path / "text.txt").write_text(runs.TEXT)
    sources = [f"--data.{role}={tmp_path}/text.txt" for role in ("train", "validation")]
    with pytest.raises(SystemExit, match="^prunelight: error: cannot write /proc/nowhere: [^\n]*$"):
        main(["fit", f"--model.name={name}", *sources, "--trainer.default_root_dir=/proc/nowhere"])


def test_what_a_killed_process_left_half_written_is_removed(name, tmp_path):
    directory = tmp_path / "checkpoints"
    left, foreign = directory / f".last.ckpt.1-ab{ENDING}", directory / ".last.ckpt.1.tmp"
    directory.mkdir()
    left.write_bytes(b"half")
    foreign.write_bytes(b"half")
    fit(name, tmp_path, short_gpt(), limit_train_batches=1)
    assert not left.exists()
    assert foreign.exists()


# --- refusals


@pytest.fixture(scope="module")
def interrupted(name, tmp_path_factory):
    root = tmp_path_factory.mktemp("interrupted")
    fit(name, root, short_gpt(), after=3)
    return root


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": {"learning_rate": 0.5}}, r"learning_rate=0.01, .*learning_rate=0.5"),
        ({"data": {"seed": 7}}, "data.seed=0, this one has .*data.seed=7"),
        (
            {"data": {"batch_size": 1}},
            "data.batch_size=2, scheduled_steps=8, this one has data.batch_size=1, ",
        ),
        ({"max_epochs": 3}, "scheduled_steps=8, this one has scheduled_steps=12"),
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches=1, .*accumulate_grad_batches=2"),
    ],
)
def test_a_run_with_other_settings_is_refused_with_both_and_the_remedy(
    arguments, message, interrupted, name
):
    with pytest.raises(ValueError, match=f"{message}.*: going on would .*ckpt_path=null"):
        fit(name, interrupted, short_gpt(), **arguments)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (LoRA(r=4), r"do not fit, e.g. .*: \(8, 64\) in the checkpoint, \(4, 64\) in this"),
        (LoRA(targets=["o_proj"]), r"do not fit, e.g. .*: \(8, 64\) .*, None in this run"),
        (LoRA(alpha=3), "run with alpha=16, .*this one has alpha=3"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(lora, message, interrupted, name):
    with pytest.raises(ValueError, match=message):
        fit(name, interrupted, short_gpt(), model={"lora": lora})


def test_another_seed_or_text_is_refused(interrupted, name, tmp_path, monkeypatch):
    (tmp_path / "other.txt").write_text(runs.TEXT.replace("mill", "dam"))
    with pytest.raises(ValueError, match=r"run with data.tokens=\w+, this one has data.tokens="):
        fit(name, interrupted, short_gpt(), data={"train": str(tmp_path / "other.txt")})
    monkeypatch.setattr(pl, "seed_everything", lambda *_, **__: torch.manual_seed(9))
    with pytest.raises(ValueError, match="run with seed=3, this one has seed=9"):
        fit(name, interrupted, short_gpt())


def test_a_damaged_checkpoint_is_refused_with_the_remedy(interrupted, name, tmp_path):
    whole = (interrupted / "checkpoints" / "last.ckpt").read_bytes()
    (tmp_path / "last.ckpt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"last.ckpt is damaged, .*; delete it to start"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"last.ckpt is damaged, .*; delete it to start"):
        FSDP2Strategy().load_checkpoint(tmp_path / "last.ckpt")
    torch.save({"x": Path("a")}, tmp_path / "odd.ckpt")
    with pytest.raises(ValueError, match="holds other objects than tensors and plain data"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "odd.ckpt")


def copy_of(run, root):
    """Copy a run without the bases that other tests made in its directory."""
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    shutil.copytree(run, root)
    for base in root.glob("pruned-*"):
        if base.name != Path(checkpoint["prunelight"]["base"]).name:
            shutil.rmtree(base)
    return root


@pytest.mark.parametrize("left", [0, 3, 30, 400])
def test_a_checkpoint_of_which_little_is_left_is_one_line(left, interrupted, name, tmp_path):
    root = copy_of(interrupted, tmp_path / "run")
    file = root / "checkpoints" / "last.ckpt"
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(FileExistsError, match=r"last.ckpt is damaged, or no checkpoint[^\n]*$"):
        fit(name, root, short_gpt())
    with pytest.raises(ValueError, match=r"last.ckpt is damaged[^\n]*$"):
        training_end(file)  # where the command line names the file
    with pytest.raises(ValueError, match=r"last.ckpt is damaged[^\n]*$"):
        check_checkpoint_path(file)


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("pruned-*/config.json", r"is not as it was saved: config.json was changed; delete the"),
        ("pruned-*/model.safetensors", r"is not as it was saved: model.safetensors was changed"),
        ("checkpoints/last.ckpt", r"last.ckpt is damaged, or no checkpoint of prunelight"),
    ],
)
def test_damage_to_base_or_checkpoint_is_told_of(pattern, told, interrupted, name, tmp_path):
    root = copy_of(interrupted, tmp_path / "run")
    (file,) = root.glob(pattern)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises((ValueError, FileExistsError), match=told):
        fit(name, root, short_gpt())


def test_a_base_whose_record_is_damaged_is_made_again(interrupted, name, tmp_path, caplog):
    root = copy_of(interrupted, tmp_path / "run")
    (file,) = root.glob("pruned-*/measured.json")
    file.write_text(file.read_text().replace('"perplexity": ', '"perplexity": 1', 1))
    fit(name, root, short_gpt())
    assert "its text is not what was written): pruning anew" in caplog.text


def test_a_base_under_the_name_of_another_is_refused(interrupted, name, tmp_path):
    root = copy_of(interrupted, tmp_path / "run")
    (base,) = root.glob("pruned-*")
    fit(name, root, ShortGPT(num_layers=3), after=0, ckpt_path=None)
    (other,) = set(root.glob("pruned-*")) - {base}
    shutil.rmtree(base)
    other.rename(base)
    with pytest.raises(
        ValueError, match=r"holds the base \w+: it was renamed; delete the director"
    ):
        fit(name, root, short_gpt())


def test_a_damaged_base_is_told_of_when_a_checkpoint_is_evaluated(interrupted, name, tmp_path):
    root = copy_of(interrupted, tmp_path / "run")
    checkpoint = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)
    (base,) = root.glob("pruned-*")
    checkpoint["prunelight"]["base"] = str(base)
    AtomicCheckpointIO().save_checkpoint(checkpoint, root / "moved.ckpt")
    (base / "plan.json").write_text("{}")
    trainer = pl.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu")
    with pytest.raises(ValueError, match=r"is not as it was saved: plan.json was changed"):
        trainer.validate(make_module(name), make_data(name, root), ckpt_path=root / "moved.ckpt")


def test_newer_formats_are_refused(interrupted, name, tmp_path):
    checkpoint = torch.load(interrupted / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoint["prunelight"]["format"] = 99
    torch.save(checkpoint, tmp_path / "newer.ckpt")
    with pytest.raises(ValueError, match="format=99, written by a newer prunelight"):
        fit(name, interrupted, short_gpt(), ckpt_path=tmp_path / "newer.ckpt")
    root = tmp_path / "run"
    fit(name, root, short_gpt(), after=0)
    (measured,) = root.glob("pruned-*/measured.json")
    measured.write_text(json.dumps({**json.loads(measured.read_text()), "format": 99}))
    with pytest.raises(ValueError, match="measured.json has format=99, written by a newer prune"):
        fit(name, root, short_gpt())


def test_a_checkpoint_between_accumulated_batches_is_told_of(name, tmp_path, caplog):
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 0:
                trainer.save_checkpoint(tmp_path / "between.ckpt")

    arguments = {"accumulate_grad_batches": 2, "max_epochs": 1}
    fit(name, tmp_path, short_gpt(), Save(), **arguments)
    fit(name, tmp_path, short_gpt(), ckpt_path=tmp_path / "between.ckpt", **arguments)
    assert "whose gradients it does not hold: the resumed run will differ" in caplog.text


def test_only_a_run_on_cuda_without_deterministic_sums_is_told_that_it_may_differ():
    before = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(False)
        assert "trainer.deterministic=true" in inexact_resume(torch.device("cuda", 0))
        assert not inexact_resume(torch.device("cpu"))
        torch.use_deterministic_algorithms(True)
        assert not inexact_resume(torch.device("cuda", 0))
    finally:
        torch.use_deterministic_algorithms(before)


def test_a_checkpoint_every_less_than_one_step_is_refused():
    with pytest.raises(ValueError, match="every_n_train_steps=0 must be at least 1"):
        RecoveryCheckpoint(0)
