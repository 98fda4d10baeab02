"""All checks of a run in one list, in the order of their cost, each called once a fit.

First come the checks that need settings only, then those that need the model, then those that need
text. A check is a small function of `Facts` that ends the run with one error. The model is loaded,
and the text read, when the first check asks for it. Nothing is computed before all have passed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from difflib import get_close_matches
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeAlias

from peft import PeftModel
from transformers import PreTrainedModel

from prunelight.calibration.data_windows import (
    are_self_written,
    calibration_windows_of,
    check_data,
    check_training_batch,
    stand_in_windows,
)
from prunelight.calibration.shared_windows import share_windows
from prunelight.calibration.windows import Windows, check_length, check_windows
from prunelight.evaluation.report.writing import check_report_files
from prunelight.models.families.layers import decoder_layers
from prunelight.models.placement import move_if_it_fits
from prunelight.models.saving import MARKER, check_replaceable
from prunelight.planning.fingerprints import without_folders
from prunelight.recovery.lora import check_targets
from prunelight.recovery.packed_rows import check_packed
from prunelight.recovery.precision import precision_faults
from prunelight.recovery.quantization import check_quantizable, check_trainable, check_widths
from prunelight.run.checkpoints import TrainingEnd, training_end
from prunelight.run.measurements import (
    added_examiners,
    can_measure,
    changed_examinations,
    describe_evaluation,
    examiners_of,
    further_names,
    further_windows,
    held_out_windows,
    measures_the_same,
)
from prunelight.run.method import PruningMethod
from prunelight.run.run_state import ADAPTER, FINAL, Run
from prunelight.run.teacher import check_teacher
from prunelight.runtime.arguments import at_least, checked_value
from prunelight.runtime.files.atomic_files import check_writable
from prunelight.runtime.files.checkpoint_files import is_url
from prunelight.runtime.finite import check_weights

DATA = "read and tokenize the data"  # a phase


class Facts:
    """What the checks of a run look at.

    Attributes:
        run: that is about to start.
        methods: that will prune, in order; none where a model is recovered as it is.
    """

    def __init__(self, run: Run, methods: Sequence[PruningMethod] = ()) -> None:
        self.run, self.methods = run, methods

    @property
    def model(self) -> PreTrainedModel:
        """The dense model, loaded when it is first asked for."""
        return self.run.load_model()

    @cached_property
    def windows(self) -> Windows:
        """The calibration windows, of which each process feeds its share."""
        place = self.run.place
        if not are_self_written(place.data):
            with self.run.phases.phase(DATA):
                return share_windows(calibration_windows_of(place.data), place.group)
        model = move_if_it_fits(self.model, place.device)
        with self.run.phases.phase("write calibration windows"):
            write = partial(calibration_windows_of, place.data, model)
            return share_windows(place.group.run_on_rank_zero(write), place.group)

    @cached_property
    def held_out(self) -> Windows:
        """The held-out windows, of which each process evaluates its share."""
        with self.run.phases.phase(DATA):
            return share_windows(held_out_windows(self.run), self.run.place.group)


# Attributes of Lightning's Trainer, which bear the names of its arguments.
TRAINER_RULES = {
    "accumulate_grad_batches": at_least(1),
    "check_val_every_n_epoch": at_least(1),
    "gradient_clip_val": at_least(0),
    "limit_train_batches": at_least(0),
    "limit_val_batches": at_least(0),
    "log_every_n_steps": at_least(0),
    "max_epochs": at_least(-1),
    "max_steps": at_least(-1),
}

# What a RecoveryModule logs, and which end of it is best.
METRICS = {"val/perplexity": "min", "val/accuracy": "max", "train/loss": "min"}

Check: TypeAlias = Callable[[Facts], None]


def preflight(run: Run, methods: Sequence[PruningMethod] = ()) -> Facts:
    """Check a run before anything is computed; return the facts that were gathered for it.

    Raises:
        ValueError, TypeError, OSError: naming the value, the rule and the remedy.
        RuntimeError: on the other processes, if one failed.
    """
    facts = Facts(run, methods)
    with run.phases.phase("check the run"):
        for check in _checks(facts):
            # Lightning counts the steps on all processes together: none may wait elsewhere then.
            alone = check in COUNTING_STEPS
            with nullcontext() if alone else run.place.group.failing_together():
                check(facts)
    return facts


def _checks(facts: Facts) -> tuple[Check, ...]:
    """Return the checks that a run needs."""
    stage, in_training = facts.run.place.stage, facts.run.in_training
    if facts.methods:
        return PRUNING
    if stage in ("validate", "test", "predict"):
        return SECOND_EVALUATION if in_training else EVALUATION
    return SECOND_FIT if in_training else RECOVERY


# --- settings --------------------------------------------------------------------------------


def trainer_settings(facts: Facts) -> None:
    """The Trainer's values lie in their ranges; Lightning takes some that it cannot use."""
    trainer: Any = facts.run.place.trainer
    check_root(trainer.default_root_dir)
    for name, rule in TRAINER_RULES.items():
        value = getattr(trainer, name)
        checked_value(f"trainer.{name}", value, int | float | None, rule)
    if trainer.num_sanity_val_steps < 0:  # -1 has become infinity
        raise ValueError(
            f"trainer.num_sanity_val_steps={trainer.num_sanity_val_steps} must be at least -1"
        )
    interval = getattr(trainer, "val_check_interval", None)  # none where it is a time
    if isinstance(interval, int | float) and interval <= 0:
        raise ValueError(
            f"trainer.val_check_interval={interval} must be a number of batches, or a share of "
            "the epoch in (0, 1]"
        )


def check_root(root: Any) -> None:
    """Check that a run writes to this machine.

    Raises:
        ValueError: if the directory is a URL.
    """
    if is_url(root):
        raise ValueError(
            f"trainer.default_root_dir={str(root)!r} must be a directory of this machine; copy the "
            "result from there afterwards"
        )


def validation_interval(facts: Facts) -> None:
    """A validation comes before the epoch ends; Lightning looks only when the training starts."""
    trainer: Any = facts.run.place.trainer
    if facts.run.place.stage != "fit" or trainer.datamodule is None:
        return
    try:
        trainer.fit_loop.setup_data()
    except ValueError as error:
        if "val_check_interval" not in str(error):
            raise
        raise ValueError(
            f"trainer.val_check_interval={trainer.val_check_interval} must be at most "
            f"{trainer.num_training_batches}, the batches of an epoch; lower it, or set "
            "trainer.check_val_every_n_epoch=null"
        ) from error


def order_of_callbacks(facts: Facts) -> None:
    """What sets the steps of the training comes before what prunes and asks for them."""
    callbacks: list[Any] = facts.run.place.trainer.callbacks  # type: ignore[attr-defined]
    pruning = False
    for callback in callbacks:
        pruning = pruning or isinstance(callback, PruningMethod)
        if pruning and getattr(callback, "precedes_pruning", False):
            raise ValueError(
                f"{type(callback).__name__} must come before the pruning callbacks in "
                "trainer.callbacks: their schedules ask how many steps there are"
            )


def strategy(facts: Facts) -> None:
    """The strategy leaves the right model in the right process."""
    settings = facts.run.settings
    facts.run.place.check_strategy(settings.quantization, settings.recovery)


def watched_metrics(facts: Facts) -> None:
    """Callbacks that watch a metric of ours name it right, and know which end of it is best."""
    if facts.run.settings.recovery == "own" or facts.run.place.stage != "fit":
        return
    texts = further_names(facts.run)
    known = METRICS | {
        f"{metric}/{text}": mode
        for metric, mode in METRICS.items()
        for text in texts
        if metric.startswith("val/")
    }
    for callback in facts.run.place.trainer.callbacks:  # type: ignore[attr-defined]
        monitor, mode = getattr(callback, "monitor", None), getattr(callback, "mode", None)
        if not isinstance(monitor, str) or mode not in ("min", "max"):
            continue
        name = type(callback).__name__
        near = get_close_matches(monitor, known, n=1, cutoff=0.75)
        if monitor not in known and near:
            raise ValueError(
                f"{name}(monitor={monitor!r}): the metrics are {', '.join(known)}; did you mean "
                f"{near[0]}?"
            )
        if monitor in known and mode != known[monitor]:
            raise ValueError(
                f"{name}(monitor={monitor!r}, mode={mode!r}) would keep the worst step; set "
                f"mode={known[monitor]!r}"
            )


def methods_in_this_run(facts: Facts) -> None:
    """Each method can do its work in this run, and beside the other methods."""
    for method in facts.methods:
        method.check_run(facts.run, facts.methods)


def examinations(facts: Facts) -> None:
    """What examines the stages of the report can do so, and there is a report."""
    run = facts.run
    if run.place.stage not in ("fit", "prune"):
        return
    for examiner in examiners_of(run):
        examiner.check_examination(run.name, run.tokenizer)
    added = added_examiners(run)
    if added and not facts.methods and not can_measure(run):
        raise ValueError(
            f"{type(added[0]).__name__} examines the stages of the report, and without held-out "
            "text there is none; give the data a validation text, or remove the callback"
        )


def output(facts: Facts) -> None:
    """The run may write its result and its report, and no other run writes there."""
    group = facts.run.place.group
    group.run_on_rank_zero(partial(check_output, facts.run.place.root))
    group.run_on_rank_zero(facts.run.hold_directory)


def check_output(root: Path) -> None:
    """Check that a run may write its result and report.

    Raises:
        FileExistsError: if there is a final/, an adapter/ or a file of the report's name that
            prunelight did not write.
        OSError: if nothing can be written there.
    """
    check_writable(root)
    check_replaceable(root / FINAL)
    check_replaceable(root / ADAPTER)
    check_report_files(root)


def unfinished(facts: Facts) -> None:
    """Something is left to do, if the run goes on where an earlier one ended."""
    place = facts.run.place
    path = place.resumes_from if place.stage == "fit" else None
    end = None if path is None else training_end(path)
    if path is not None and end is not None and _is_the_same_run(facts, end):
        refuse_finished(facts.run, path, end, place.optimizer_steps())


def _is_the_same_run(facts: Facts, end: TrainingEnd) -> bool:
    """Whether the report of a finished run is of the model, methods and settings of this one.

    What differs otherwise is refused later, by the fingerprint of the base.
    """
    run, told = facts.run, _told(facts.run)
    given = [[type(method).__name__, _as_json(method.arguments())] for method in facts.methods]
    plans = [[plan["method"], plan["arguments"]] for plan in told.get("plans", [])]
    same_dtype = run.dtype in ("auto", told.get("dtype"))
    same_model = told.get("model") == without_folders(run.name)
    same_settings = run.is_same_training is None or run.is_same_training(end.settings)
    return given == plans and same_dtype and same_model and same_settings


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _told(run: Run) -> dict[str, Any]:
    """Return what the report of an earlier start says; nothing, if there is none."""
    try:
        told: dict[str, Any] = json.loads((run.place.root / "report.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return told


class FinishedRunError(ValueError):
    """Nothing is left to do: the result of a run is complete."""


def refuse_finished(run: Run, checkpoint: Path, end: TrainingEnd, planned: float) -> None:
    """Refuse to train what is trained, saved and reported already.

    A run that was killed after its training, before all of that was on disk, goes on.

    Args:
        run: that would go on.
        checkpoint: the last one of the training.
        end: of the training.
        planned: optimizer steps that this start is to have.

    Raises:
        FinishedRunError: if nothing is left to do.
    """
    # Each is written after the one before it.
    files = [checkpoint, run.place.root / FINAL / MARKER]
    if can_measure(run):
        files.append(run.place.root / "report.md")
        then, now = _told(run).get("evaluation", {}), describe_evaluation(run)
        is_old = "examined" not in then  # written before stages were examined
        if not measures_the_same(then, now) or (not is_old and changed_examinations(then, now)):
            return  # it is measured anew
    if planned > end.planned or not all(file.is_file() for file in files):
        return
    times = [file.stat().st_mtime_ns for file in files]
    if times == sorted(times):
        is_early = end.step < end.planned < float("inf")
        early = f", where it ended before step {end.planned:.0f}" if is_early else ""
        raise FinishedRunError(
            f"nothing is left to do: {run.place.root / FINAL} holds the result of {end.step} "
            f"steps{early}. To train on from there, raise trainer.max_steps (or max_epochs, or "
            "tokens); for another run, set another trainer.default_root_dir"
        )


def data(facts: Facts) -> None:
    """The data can give the windows that pruning needs."""
    check_data(facts.run.place.gives)


# --- the model -------------------------------------------------------------------------------


def finite(facts: Facts) -> None:
    """No weight of a model in memory is NaN or infinite; one that was read was looked at then."""
    run = facts.run
    model = facts.model
    if not run.source:
        check_weights(model)


def quantizable(facts: Facts) -> None:
    """The weights can be quantized as asked."""
    run, model = facts.run, facts.model
    # A pruned base can always be read again; a model that is recovered as it is needs a source.
    source = None if facts.methods else run.source
    check_quantizable(model, run.settings.quantization, source)


def trainable(facts: Facts) -> None:
    """The recovery can change the weights, which are not packed ones of 4 or 8 bits."""
    check_trainable(facts.model, facts.run.settings.recovery)


def shardable(facts: Facts) -> None:
    """A model that is cut into shards can be read again, to be merged."""
    run = facts.run
    run.load_model()  # which tells its source
    if run.place.shards_weights and not run.source:
        raise ValueError(
            "a model in memory cannot be sharded and merged again; save it (prunelight.save) "
            "and give its directory as name"
        )


def methods_on_this_model(facts: Facts) -> None:
    """Each method fits the model, and leaves widths that can be quantized."""
    left = len(decoder_layers(facts.model))
    for method in facts.methods:
        method.check(facts.model)
        try:
            left = method.layers_left(left)
        except ValueError as error:
            raise ValueError(
                f"{type(method).__name__} finds {left} layers after the methods before it: {error}"
            ) from error
        check_widths(method.widths(facts.model), facts.run.settings.quantization)


def adapter_targets(facts: Facts) -> None:
    """Each module that LoRA shall adapt is there."""
    check_targets(facts.model, facts.run.settings.lora)


def teacher(facts: Facts) -> None:
    """The teacher fits the model."""
    slices = any(method.slices for method in facts.methods)
    check_teacher(facts.run, facts.model, sliced=slices)


def packing(facts: Facts) -> None:
    """The model keeps the documents of a packed row apart."""
    model: Any = facts.run.model or facts.model
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    check_packed(model, facts.run.place.data)


def precision(facts: Facts) -> None:
    """Dtype, precision and recovery go together; what they lose is told when training starts."""
    run = facts.run
    model = run.model or facts.model
    run.precision_losses = []
    if run.place.stage == "fit":
        run.precision_losses = precision_faults(
            model.dtype, run.place.precision, run.settings.recovery
        )


def training_length(facts: Facts) -> None:
    """The model reads sequences as long as those of the data."""
    for name in ("seq_len", "calibration_seq_len", "validation_seq_len"):
        check_length(facts.model, getattr(facts.run.place.data, name, None) or 0, name=name)


def training_batches(facts: Facts) -> None:
    """The first batch of data that is no TextDataModule holds what a RecoveryModule trains on."""
    place = facts.run.place
    trains = place.stage == "fit" and facts.run.settings.recovery in ("lora", "full")
    if trains and not place.gives("calibration_windows") and place.gives("train_dataloader"):
        check_training_batch(place.data)


# --- the text --------------------------------------------------------------------------------


def calibration(facts: Facts) -> None:
    """The calibration windows fit the model, and suffice for each method."""
    place = facts.run.place
    if are_self_written(place.data):  # which takes minutes
        shape = place.data.num_calibration, place.data.seq_len_of("calibration")
        like_them = share_windows(stand_in_windows(facts.model, *shape), place.group)
        for method in facts.methods:
            method.check_calibration(facts.model, like_them)
    for method in facts.methods:
        method.check_calibration(facts.model, facts.windows)


def held_out(facts: Facts) -> None:
    """The held-out windows fit the model."""
    check_windows(facts.model, facts.held_out)
    for windows in further_windows(facts.run).values():
        check_windows(facts.model, share_windows(windows, facts.run.place.group))


# These ask Lightning how many steps there are, on all processes together.
COUNTING_STEPS: tuple[Check, ...] = (
    order_of_callbacks,
    trainer_settings,
    strategy,
    methods_in_this_run,
    unfinished,
    validation_interval,
)
SETTINGS: tuple[Check, ...] = (
    order_of_callbacks,
    trainer_settings,
    strategy,
    watched_metrics,
    methods_in_this_run,
    examinations,
    output,
    unfinished,
)
MODEL: tuple[Check, ...] = (
    finite,
    quantizable,
    trainable,
    adapter_targets,
    teacher,
    packing,
    precision,
)
PRUNING = (
    *SETTINGS,
    data,
    finite,
    methods_on_this_model,
    *MODEL[1:],
    training_length,
    training_batches,
    calibration,
    held_out,
    validation_interval,
)
RECOVERY = (*SETTINGS, *MODEL, shardable, training_length, training_batches, validation_interval)
EVALUATION: tuple[Check, ...] = (
    trainer_settings,
    strategy,
    quantizable,
    shardable,
    training_length,
)
# Of a model that is prepared for its training already, as one from a checkpoint.
SECOND_FIT: tuple[Check, ...] = (strategy, output, packing, precision)
SECOND_EVALUATION: tuple[Check, ...] = (strategy,)
