"""Each option of the command line with one other valid value, and what a resume makes of it.

The options come from the parser of `prunelight fit`, and from the constructors of the classes that
a case names. A run of the case is stopped half way; its copy is started again with one option
changed. It must be refused in one line, or end with the weights of the run that nobody stopped.

Run as a module, with a case, a directory and names of options, it prints their verdicts as JSON.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import subprocess
import sys
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser
from runs import measure_speed_briefly, write_model
from safetensors.torch import load_file
from torch.optim import AdamW

from prunelight.callbacks import DLP, RecoveryCheckpoint, ShortGPT
from prunelight.lightning_cli import CLI, main, parser_settings
from prunelight.recovery.zeros.gradual_zeros import Schedule
from prunelight.training.recovery_module import RecoveryModule
from prunelight.training.resuming.run_identity import (
    HARMLESS_IN_DATA,
    HARMLESS_IN_MODULE,
    HARMLESS_IN_TRAINER,
)
from prunelight.training.text_datamodule import TextDataModule
from prunelight.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
VERBS = ("fit", "validate", "test", "prune", "analyze")
TIMEOUT = 300  # seconds of one start
# Options of a case that belong to a class in its config: where its arguments stand there.
CLASSES: dict[str, dict[str, tuple[type, tuple[Any, ...]]]] = {
    "lora": {
        "ShortGPT": (ShortGPT, ("trainer", "callbacks", 0, "init_args")),
        "ModelCheckpoint": (ModelCheckpoint, ("trainer", "callbacks", 1, "init_args")),
        "EarlyStopping": (EarlyStopping, ("trainer", "callbacks", 2, "init_args")),
        "RecoveryCheckpoint": (RecoveryCheckpoint, ("trainer", "callbacks", 4, "init_args")),
    },
    "kd": {
        "DLP": (DLP, ("trainer", "callbacks", 0, "init_args")),
        "Schedule": (Schedule, ("trainer", "callbacks", 0, "init_args", "schedule")),
        "AdamW": (AdamW, ("model", "optimizer", "init_args")),
    },
    "kd_topk": {},
}
# Options that nothing here can change, and why.
NOT_TRIED = {
    "trainer.num_nodes": "waits for another machine",
    "trainer.callbacks": "the arguments of each callback are tried",
    "ckpt_path": "it says which checkpoint",
    "ModelCheckpoint.train_time_interval": "excludes every_n_epochs",
    "ModelCheckpoint.every_n_train_steps": "excludes every_n_epochs",
    "AdamW.differentiable": "no training step can run under it",
    "AdamW.capturable": "CUDA only",
    "AdamW.params": "the trained parameters",
    "model.bitsandbytes.use_double_quant": "no effect without 4 bits",
    "model.bitsandbytes.compute_dtype": "no effect without 4 bits",
}
# Of each option whose type does not tell a valid value; "{root}" is the directory of the case.
OTHER: dict[str, Any] = {
    "trainer.accelerator": "auto",
    "trainer.strategy": "ddp",
    "trainer.devices": "auto",
    "trainer.precision": "bf16-mixed",
    "trainer.logger": False,
    "trainer.max_epochs": 4,
    "trainer.max_time": "00:01:00:00",
    "trainer.limit_train_batches": 3,
    "trainer.limit_val_batches": 1,
    "trainer.limit_test_batches": 1,
    "trainer.limit_predict_batches": 1,
    "trainer.overfit_batches": 2,
    "trainer.val_check_interval": 1,
    "trainer.gradient_clip_algorithm": "value",
    "trainer.profiler": "simple",
    "trainer.plugins": [{"class_path": "lightning.pytorch.plugins.DoublePrecision"}],
    "trainer.model_registry": "registry",
    "trainer.default_root_dir": "{run}/../linked",
    "model.name": "{root}/copy",
    "model.dtype": "bfloat16",
    "model.lr_scheduler": "cosine",
    "model.lr_scheduler_kwargs": {"num_cycles": 1.0},
    "model.lora.targets": ["q_proj"],
    "model.optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
    "model.attn_implementation": "eager",
    "model.compile_backend": "eager",
    "model.distillation.lm_weight": 0.5,
    "model.distillation.hidden_weight": 0.5,
    "model.distillation.teacher": "int8",
    "model.quantization": "int8",
    "model.distillation.name": "{root}/copy",
    "model.distillation.cache": "{root}/cache",
    "model.latency": {"num_tokens": 2, "num_warmup": 0, "num_runs": 2},
    "data.train": "{root}/other.txt",
    "data.validation": "{root}/other.txt",
    "data.calibration": "{root}/other.txt",
    "data.calibration_seq_len": 16,
    "data.validation_seq_len": 16,
    "data.text_field": "body",
    "data.bos": "always",
    "ShortGPT.ratio": None,
    "ShortGPT.layers": None,
    "ShortGPT.parameter_ratio": None,
    "ShortGPT.seed": None,
    "ShortGPT.loads_in": ["vLLM"],
    "ShortGPT.protected": [1],
    "ShortGPT.granularity": "mlp",
    "ModelCheckpoint.dirpath": "{run}/elsewhere",
    "ModelCheckpoint.filename": "other",
    "ModelCheckpoint.monitor": "val/accuracy",
    "ModelCheckpoint.mode": "max",
    "ModelCheckpoint.save_last": True,
    "EarlyStopping.monitor": "val/accuracy",
    "EarlyStopping.mode": "max",
    "EarlyStopping.stopping_threshold": 1.0,
    "EarlyStopping.divergence_threshold": 1e9,
    "RecoveryCheckpoint.dirpath": "{run}/checkpoints",
    "DLP.pattern": "2:4",
    "DLP.solver": "magnitude",
    "DLP.allocation": "uniform",
    "DLP.alpha": 0.3,
    "DLP.schedule": {"start_step": 0, "end_step": 4, "every": 1},
    "AdamW.betas": [0.8, 0.99],
    "AdamW.fused": True,
    "AdamW.foreach": True,
    "Schedule.start_step": 1,
}


@dataclass(frozen=True)
class Option:
    """One option of a case: name, type, default, and where its value stands in the config."""

    name: str
    type: Any
    default: Any
    path: tuple[Any, ...]


class _Found(Exception):
    pass


class _Parser(CLI):
    def parse_arguments(self, parser: Any, args: Any) -> None:
        raise _Found(self._subcommand_parsers["fit"])


@cache
def parser() -> Any:
    """The parser of `prunelight fit`."""
    try:
        _Parser(
            RecoveryModule,
            TextDataModule,
            trainer_class=Trainer,
            parser_kwargs=parser_settings("", dict.fromkeys(VERBS, "")),
            auto_configure_optimizers=False,
            args=["fit"],
        )
    except _Found as found:
        return found.args[0]
    raise AssertionError("LightningCLI parses without parse_arguments")


def options(case: str) -> list[Option]:
    """All options of a case."""
    found = []
    for action in parser()._actions:
        if getattr(action, "_typehint", None) is not None and not action.dest.endswith(".help"):
            path = tuple(action.dest.split("."))
            found.append(Option(action.dest, action._typehint, action.default, path))
    for name, (kind, path) in CLASSES[case].items():
        of_class = LightningArgumentParser(prog="class")
        of_class.add_class_arguments(kind, "of")
        found += [
            Option(f"{name}.{own}", action._typehint, action.default, (*path, own))
            for action in of_class._actions
            if getattr(action, "_typehint", None) is not None
            and (own := action.dest.removeprefix("of.")) != action.dest
            and not own.endswith(".help")
        ]
    return found


def value_in(config: Any, option: Option) -> Any:
    """The value of an option in a config; its default where the config does not set it."""
    for key in option.path:
        if isinstance(config, dict) and key not in config:
            return option.default
        config = config[key]
    return config


def other_value(option: Option, now: Any) -> Any:
    """Another valid value of an option."""
    if option.name in OTHER:
        return OTHER[option.name]
    kinds = [*_kinds(option.type)]
    choices = [kind for kind in kinds if isinstance(kind, tuple)]
    if choices:
        return next(choice for choice in choices[0] if choice != now and choice != "auto")
    if bool in kinds and not (isinstance(now, int) and now > 1):
        return not now
    if int in kinds:
        return (now or 0) + 1
    if float in kinds:
        return (now or 0.1) * 1.5
    raise LookupError(f"name another value of {option.name}: {option.type} in OTHER")


def _kinds(hint: Any) -> Iterator[Any]:
    """The types of a union; a Literal as the tuple of its values."""
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        yield typing.get_args(hint)
    elif origin is typing.Union or type(hint).__name__ == "UnionType":
        for part in typing.get_args(hint):
            yield from _kinds(part)
    else:
        yield hint


def config_of(case: str, root: Path) -> dict[str, Any]:
    """Write model and texts of a case; return its config."""
    sizes = {"hidden_size": 32, "intermediate_size": 64}
    name = write_model(root / "model", **sizes)
    shutil.copytree(name, root / "copy")
    for file, seed in (("text.txt", 0), ("other.txt", 1)):
        words = random.Random(seed).choices(["river", "mill", "sea", "runs", "to"], k=2500)
        (root / file).write_text(" ".join(words), encoding="utf-8")
    terminate = {"class_path": "stopped_runs.Terminate"}
    often = {"class_path": "RecoveryCheckpoint", "init_args": {"every_n_train_steps": 1}}
    model: dict[str, Any] = {"name": name, "learning_rate": 0.01, "warmup_steps": 1}
    if case == "lora":
        best = {"monitor": "val/perplexity", "mode": "min", "dirpath": "{run}/best"}
        stop = {"monitor": "val/perplexity", "mode": "min", "patience": 50}
        callbacks = [
            {"class_path": "ShortGPT", "init_args": {"num_layers": 2}},
            {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": best},
            {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": stop},
        ]
        model["lora"] = {"r": 4, "dropout": 0.1}
    elif case == "kd":
        schedule = {"start_step": 0, "end_step": 5, "every": 1}
        callbacks = [
            {"class_path": "DLP", "init_args": {"sparsity": 0.5, "schedule": schedule}},
        ]
        model |= {"recovery": "full", "loss": "kd", "lr_scheduler": "cosine"}
        model["optimizer"] = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}
    else:
        callbacks = [{"class_path": "ShortGPT", "init_args": {"num_layers": 2}}]
        model |= {"loss": "kd_topk", "distillation": {"k": 4}, "lr_scheduler": "cosine"}
    sources = dict.fromkeys(("train", "validation", "calibration"), str(root / "text.txt"))
    return {
        "seed_everything": 5,
        "model": model,
        "data": {
            **sources,
            "seq_len": 32,
            "batch_size": 2,
            "num_calibration": 4,
            "num_validation": 4,
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 6,
            "max_epochs": 2,
            "limit_train_batches": 4,
            "val_check_interval": 2,
            "gradient_clip_val": 0.5,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [*callbacks, terminate, often],
        },
    }


class Case:
    """A run that was stopped half way, and one that was not."""

    def __init__(self, case: str, root: Path) -> None:
        self.name, self.root = case, root
        root.mkdir(parents=True, exist_ok=True)
        self.config = config_of(case, root)
        self.options = [option for option in options(case) if option.name not in NOT_TRIED]
        (root / "whole").mkdir()
        (root / "whole" / "told").touch()  # nobody stops it
        code, said = start(self.written("whole", {}), root / "whole")
        if code != 0:
            raise AssertionError(f"the whole run failed:\n{said[-3000:]}")
        code, said = start(self.written("stopped", {}), root / "stopped")
        if not (root / "stopped" / "checkpoints" / "last.ckpt").is_file():
            raise AssertionError(f"the run was not stopped ({code}):\n{said[-3000:]}")

    def changes(self) -> dict[str, Any]:
        """Name -> other value, of all options of the case."""
        return {
            option.name: other_value(option, value_in(self.config, option))
            for option in self.options
        }

    def resume(self, name: str, value: Any) -> str:
        """Go on with one option changed; return "equal", "refused", or what is wrong."""
        (option,) = (option for option in self.options if option.name == name)
        run = self.root / "runs" / name
        shutil.copytree(self.root / "stopped", run)
        (run.parent / "linked").unlink(missing_ok=True)
        (run.parent / "linked").symlink_to(run)
        code, said = start(self.written(f"runs/{name}", {option.path: value}), run)
        verdict = self.compared(run) if code == 0 else _refusal(said)
        shutil.rmtree(run)
        return verdict

    def compared(self, run: Path) -> str:
        mine, whole = (
            load_file(r / "final" / "model.safetensors") for r in (run, self.root / "whole")
        )
        if mine.keys() == whole.keys() and all(torch.equal(mine[k], whole[k]) for k in whole):
            return "equal"
        return "FAULT: goes on with another result"

    def written(self, run: str, changes: dict[tuple[Any, ...], Any]) -> Path:
        """Write the config of a start, with some values changed."""
        config = copy.deepcopy(self.config)
        config["trainer"]["default_root_dir"] = "{run}"
        for path, value in changes.items():
            place = config
            for key in path[:-1]:
                place = place[key] if isinstance(place, list) else place.setdefault(key, {})
            place[path[-1]] = value
            if path[-1] == "ratio":  # of layers: excludes their number
                place.pop("num_layers")
                place["ratio"] = 0.5
        text = yaml.safe_dump(config).replace("{run}", str(self.root / run))
        file = self.root / f"{run.replace('/', '-')}.yaml"
        file.write_text(text.replace("{root}", str(self.root)), encoding="utf-8")
        return file


def _refusal(said: str) -> str:
    """Say whether a start that failed was refused in one line."""
    lines = [line for line in said.splitlines() if line.startswith("prunelight: error: ")]
    if "Traceback" in said or len(lines) != 1:
        return f"FAULT: {said[-1000:]}"
    return f"refused: {lines[0].removeprefix('prunelight: error: ')}"


def start(config: Path, run: Path) -> tuple[int, str]:
    """Run the command line in a process of its own; return its exit code and what it said."""
    run.mkdir(parents=True, exist_ok=True)
    process = get_context("fork").Process(target=_command, args=(config, run))
    process.start()
    process.join(TIMEOUT)
    if process.exitcode is None:
        process.kill()
        process.join()
    return process.exitcode or 0, (run / ".output.txt").read_text(encoding="utf-8")


def _command(config: Path, run: Path) -> None:
    output = os.open(run / ".output.txt", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = sys.stderr = os.fdopen(output, "w", buffering=1)
    main(["fit", "--config", str(config)], "", dict.fromkeys(VERBS, ""))


def verdicts(case: str, root: Path, names: list[str] | None = None) -> dict[str, str]:
    """Name -> "equal", "refused: ..." or "FAULT: ..." of some options of a case, or of all.

    A process of its own does it: a fork of one that has threads may wait for ever.
    """
    command = [sys.executable, "-m", "option_changes", case, str(root), *(names or [])]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    environment = {**os.environ, **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(done.stderr[-3000:])
    told: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return told


def needlessly_refused(told: dict[str, str]) -> dict[str, str]:
    """The verdicts that are not "equal", on options that are named as harmless."""
    sections = {
        "trainer": HARMLESS_IN_TRAINER,
        "model": HARMLESS_IN_MODULE,
        "data": HARMLESS_IN_DATA,
    }
    # A schedule depends on the number of steps; Lightning itself refuses barebones.
    allowed = ("trainer.max_steps", "trainer.barebones")
    return {
        name: verdict
        for name, verdict in told.items()
        if name.partition(".")[2] in sections.get(name.partition(".")[0], ())
        and verdict != "equal"
        and name not in allowed
    }


if __name__ == "__main__":
    measure_speed_briefly()
    made = Case(sys.argv[1], Path(sys.argv[2]))
    changes = made.changes()
    told = {name: made.resume(name, changes[name]) for name in sys.argv[3:] or changes}
    sys.stdout.write(f"{json.dumps(told)}\n")
