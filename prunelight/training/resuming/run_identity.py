"""What a run's numbers depend on, beside its base: a resumed run must have the same.

Every argument counts, of the Trainer, the module, the data, the pruning methods and the callbacks,
unless it is named here as harmless, or as told by another key. So an argument that a later version
adds is compared without further work. Arguments at their default are left out: what a later version
adds at its default changes nothing. Of classes that are not ours nor Lightning's nobody knows what
they do: a difference is told, and the run goes on.

Private names of Lightning: `_accelerator_connector` of the Trainer, tested with lightning 2.6.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import SaveConfigCallback

from prunelight.planning.fingerprints import model_fingerprint
from prunelight.recovery.schedules import describe_schedule
from prunelight.run.checkpoints import given_arguments
from prunelight.run.method import PruningMethod
from prunelight.run.run_state import Run

log = logging.getLogger(__name__)

OWN_CLASSES = "own_classes"  # the key of classes that are neither ours nor Lightning's
# Keys of `describe_run` that format 2 did not have at first: an older checkpoint lacks them.
LATER_KEYS = (
    OWN_CLASSES,
    "dtype",
    "schedule",
    "model",
    "trainer",
    "data",
    "methods",
    "calibration",
    "callbacks",
    "teacher",
)
# Keys that are not known before the model, its plans and its teacher are loaded.
OF_THE_MODEL = ("dtype", "calibration", "teacher")
# Of a recovery's description: they grow, or are paths.
VOLATILE = ("optimizer_steps", "tokens_seen", "weights_of_step", "distillation.cache")

# Of these an int is a number of batches, and a float a share of them.
COUNT_OR_SHARE = (
    "limit_train_batches",
    "limit_val_batches",
    "overfit_batches",
    "val_check_interval",
)

# Arguments that change no number, or are told by another key of `describe_run`.
HARMLESS_IN_TRAINER = frozenset(
    {
        # what is written and shown
        *("logger", "log_every_n_steps", "profiler", "default_root_dir", "enable_autolog_hparams"),
        *("enable_checkpointing", "enable_progress_bar", "enable_model_summary", "model_registry"),
        # checks, and verbs that do not train
        *("num_sanity_val_steps", "detect_anomaly", "barebones", "inference_mode"),
        *("limit_test_batches", "limit_predict_batches"),
        "sync_batchnorm",  # no decoder has batch norms
        # where training ends: a schedule over other steps differs in `scheduled_steps`
        *("max_epochs", "max_steps", "max_time"),
    }
)
TOLD_OF_TRAINER = frozenset(
    {
        *("devices", "num_nodes"),  # processes
        *("callbacks", "precision", "accumulate_grad_batches", "gradient_clip_val"),
        "limit_train_batches",
    }
)
HARMLESS_IN_MODULE = frozenset({"latency", "probes", "trust_remote_code", "gradient_checkpointing"})
TOLD_OF_MODULE = frozenset(
    {
        "name",  # the base is known by its weights
        *("dtype", "recovery", "lora", "learning_rate", "warmup_steps", "lr_scheduler"),
        *("lr_scheduler_kwargs", "optimizer", "loss", "distillation", "quantization"),
        "bitsandbytes",
    }
)
HARMLESS_IN_DATA = frozenset({"num_workers", "trust_remote_code"})
TOLD_OF_DATA = frozenset(
    {
        *("tokenizer", "train", "text_field", "bos"),  # tokens
        *("seq_len", "batch_size", "packing", "seed"),
        *("validation", "num_validation", "validation_seq_len"),  # validation
        *("calibration", "num_calibration", "calibration_seq_len"),  # calibration
    }
)
HARMLESS_CALLBACKS = frozenset(
    {
        "RecoveryCheckpoint",
        *("ModelSummary", "RichModelSummary", "DeviceStatsMonitor", "LearningRateMonitor"),
        *("ThroughputMonitor", "OnExceptionCheckpoint"),
        *("Timer", "TokenBudget"),  # where training ends, as max_steps
    }
)
HARMLESS_IN_CALLBACKS = frozenset(
    {
        *("verbose", "log_rank_zero_only"),
        *("dirpath", "filename", "save_last", "save_weights_only", "save_on_exception"),
        *("auto_insert_metric_name", "enable_version_counter"),
    }
)
HARMLESS_IN_STRATEGY = frozenset(
    {
        *("accelerator", "device", "parallel_devices", "cluster_environment", "checkpoint_io"),
        *("precision_plugin", "timeout", "process_group_backend", "start_method", "config"),
    }
)
# How an argument of the Trainer is read off it where no attribute has its name.
READ_OFF_TRAINER: dict[str, Callable[[Trainer], Any]] = {
    "accelerator": lambda trainer: type(trainer.accelerator).__name__,
    "strategy": lambda trainer: described(trainer.strategy, HARMLESS_IN_STRATEGY),
    "plugins": lambda trainer: type(trainer.precision_plugin).__name__,
    "val_check_interval": lambda trainer: (
        getattr(trainer, "val_check_interval", None)
        or getattr(trainer, "_val_check_time_interval", None)
    ),
    "deterministic": lambda _: torch.are_deterministic_algorithms_enabled(),
    "benchmark": lambda _: torch.backends.cudnn.benchmark,
    "use_distributed_sampler": lambda trainer: (
        trainer._accelerator_connector.use_distributed_sampler
    ),
}
# Callbacks that the package adds itself: they are no arguments, and each version has others.
OUR_OWN_WORK = ("prunelight.training.", "prunelight.lightning_cli")
LIBRARIES = ("prunelight", "lightning", "pytorch_lightning")


def describe_run(
    trainer: Trainer,
    run: Run,
    make_optimizer: Callable[..., Any],
    arguments: Mapping[str, Any],
    recovery: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what the numbers of a run depend on besides its base, as JSON values.

    Args:
        trainer: of the run.
        run: its seed, its precision, its methods and its teacher count.
        make_optimizer: called with parameters.
        arguments: of the module that differ from their defaults.
        recovery: settings of the recovery.
    """
    optimizer = make_optimizer([torch.nn.Parameter(torch.zeros(1, 1))])  # Muon takes matrices only
    name = str(recovery.get("lr_scheduler", "constant"))
    constant = name.startswith("constant")
    steps = None if constant else trainer.estimated_stepping_batches
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return plain(
        {
            **{name: value for name, value in recovery.items() if name not in VOLATILE},
            "optimizer": {"class": type(optimizer).__name__, **optimizer.defaults},
            "scheduled_steps": steps,
            "schedule": describe_schedule(name, steps or 0),
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "gradient_clip_val": trainer.gradient_clip_val,
            "limit_train_batches": trainer.limit_train_batches,
            "processes": trainer.world_size,
            "seed": run.seed,
            "dtype": run.prepared and run.prepared.dtype,
            "model": without(arguments, HARMLESS_IN_MODULE | TOLD_OF_MODULE),
            "trainer": describe_trainer(trainer),
            "callbacks": describe_callbacks(callbacks),
            "methods": describe_methods(callbacks),
            "calibration": [plan["calibration"]["fingerprint"] for plan in plans_of(run)],
            "teacher": describe_teacher(run),
            **describe_data(getattr(trainer, "datamodule", None)),
            OWN_CLASSES: describe_own_classes(trainer),
        }
    )


def differences(
    saved: Mapping[str, Any], ours: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings that differ, by their dotted names, on each side.

    What the version that wrote the checkpoint did not know is not compared: a key that came later,
    and an argument of the Trainer that only one of two versions of Lightning has.
    """
    known = {key: ours[key] for key in ours if key in saved or key not in LATER_KEYS}
    sides = [without(side, (*VOLATILE, OWN_CLASSES)) for side in (saved, known)]
    if all("trainer" in side for side in sides):
        options = [side["trainer"] for side in sides]
        for side, mine, others in zip(sides, options, reversed(options), strict=True):
            side["trainer"] = {name: mine[name] for name in mine if name in others}
    then, now = map(flat, sides)
    odd = [key for key in {*then, *now} if not same(key, then.get(key), now.get(key))]
    return {key: then[key] for key in odd if key in then}, {
        key: now[key] for key in odd if key in now
    }


def same(key: str, then: Any, now: Any) -> bool:
    """Return whether two values of a setting are the same; 1 batch is not 1.0, all batches."""
    as_written = key.rpartition(".")[2] in COUNT_OR_SHARE
    return bool(then == now) and (type(then) is type(now) or not as_written)


def tell_own_classes(saved: Mapping[str, Any], ours: Mapping[str, Any], path: Any) -> None:
    """Warn of classes of the user's own that differ: only the user knows what they change."""
    then, now = saved.get(OWN_CLASSES), ours[OWN_CLASSES]
    if then is not None and then != now:
        log.warning(
            "%s was written by a run with %s, this one has %s: prunelight does not know whether "
            "they change its numbers",
            path,
            _sentence(then),
            _sentence(now),
        )


def _sentence(classes: Mapping[str, Mapping[str, Any]]) -> str:
    told = [
        f"{name}({', '.join(f'{k}={v}' for k, v in options.items() if k != 'class')})"
        for name, options in classes.items()
    ]
    return ", ".join(told) or "no classes of your own"


# --- the parts -------------------------------------------------------------------------------


def describe_trainer(trainer: Trainer) -> dict[str, Any]:
    """Return the arguments of a Trainer that can change numbers, as it resolved them."""
    names = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    compared = names - HARMLESS_IN_TRAINER - TOLD_OF_TRAINER
    read = {name: READ_OFF_TRAINER.get(name, partial(_attribute, name)) for name in compared}
    return {name: read[name](trainer) for name in sorted(compared)}


def _attribute(name: str, trainer: Trainer) -> Any:
    return getattr(trainer, name, None)


def describe_callbacks(callbacks: Iterable[Callback]) -> dict[str, Any]:
    """Return class and arguments of the callbacks of ours and of Lightning that change numbers."""
    compared = [
        described(callback, HARMLESS_IN_CALLBACKS)
        for callback in callbacks
        if is_known(callback) and not is_harmless(callback)
    ]
    return numbered(compared)


def is_known(value: object) -> bool:
    """Return whether a class is ours or Lightning's."""
    return type(value).__module__.split(".")[0] in LIBRARIES


def is_harmless(callback: Callback) -> bool:
    """Return whether a callback changes no number, or is told by another key.

    A ModelCheckpoint only chooses the weights of the result if it watches the validation.
    """
    if isinstance(callback, PruningMethod | ProgressBar | SaveConfigCallback):
        return True
    if type(callback).__module__.startswith(OUR_OWN_WORK):
        return True
    if type(callback) is ModelCheckpoint:
        return not str(callback.monitor).startswith("val/")
    return type(callback).__name__ in HARMLESS_CALLBACKS


def describe_methods(callbacks: Iterable[Any]) -> dict[str, Any]:
    """Return class, version and arguments of the pruning methods, in order."""
    methods = [callback for callback in callbacks if isinstance(callback, PruningMethod)]
    return numbered(
        [
            {"class": type(method).__name__, "version": method.version, **given_arguments(method)}
            for method in methods
        ]
    )


def plans_of(run: Run) -> list[dict[str, Any]]:
    """Return the plans that were made in this run."""
    return run.record.plans if run.record is not None else []


def describe_teacher(run: Run) -> str | None:
    """Return the fingerprint of the teacher in memory, or of its cache; None without a teacher."""
    objective = run.objective
    if objective is None:
        return None
    if objective.cache is not None:
        return objective.cache.fingerprint
    if objective.teacher is None:
        return None
    teacher: Any = objective.teacher.model
    return model_fingerprint(teacher)


def describe_data(data: Any) -> dict[str, Any]:
    """Return what the batches depend on; nothing of data that is not ours."""
    if not hasattr(data, "describe_training"):
        return {}
    options = described(data, HARMLESS_IN_DATA | TOLD_OF_DATA)
    if hasattr(data, "describe_validation"):
        options["validation"] = data.describe_validation()
    told = {f"data.{name}": value for name, value in data.describe_training().items()}
    return {**told, "data": options}


def describe_own_classes(trainer: Trainer) -> dict[str, Any]:
    """Return class and arguments of the callbacks and of the data that we cannot judge."""
    parts = [*trainer.callbacks, getattr(trainer, "datamodule", None)]  # type: ignore[attr-defined]
    unknown = [part for part in parts if part is not None and not is_known(part)]
    return numbered([described(p, ()) for p in unknown if not isinstance(p, PruningMethod)])


# --- values ----------------------------------------------------------------------------------


def described(value: object, harmless: Iterable[str]) -> dict[str, Any]:
    """Return the class of an object and its arguments that differ from their defaults.

    An argument is read off the attribute of its name, with or without an underscore before it.
    """
    options: dict[str, Any] = {"class": type(value).__name__}
    for name, parameter in inspect.signature(type(value)).parameters.items():
        attribute = next((n for n in (name, f"_{name}") if hasattr(value, n)), None)
        if attribute is None or name in harmless:
            continue
        if plain(getattr(value, attribute)) != plain(parameter.default):
            options[name] = getattr(value, attribute)
    return options


def numbered(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return parts by their class; a second one of a class gets a number."""
    by_name: dict[str, Any] = {}
    for part in parts:
        name, number = part["class"], 1
        while (key := name if number == 1 else f"{name} {number}") in by_name:
            number += 1
        by_name[key] = dict(part)
    return by_name


def without(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return a mapping without some of its keys."""
    return {name: value for name, value in values.items() if name not in names}


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted names."""
    result: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{name}.")
        else:
            result[f"{prefix}{name}"] = value
    return result


def plain(value: Any) -> Any:
    """Return JSON values for a setting; an object without a value of its own is its class."""
    if isinstance(value, bool | int | float | str | None):
        return value.value if isinstance(value, Enum) else value
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, set | frozenset):
        return sorted((plain(entry) for entry in value), key=json.dumps)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, partial):
        return [plain(value.func), plain(value.args), plain(value.keywords)]
    if isinstance(value, type) or inspect.isroutine(value):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, torch.Tensor):
        return value.tolist()
    text = str(value)
    return type(value).__name__ if " at 0x" in text else text
