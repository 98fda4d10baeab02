"""What all pruning callbacks share: when they act in a fit, and the pruned base on disk.

A method overrides `plan` and `check`. The first pruning callback of the trainer runs
all of them in list order, in `setup`, before the optimizer exists: layers removed later would
stay in it as dead tensors. Ranks share the windows: all score, plan, apply and evaluate together;
rank 0 saves a verified directory, and every rank loads the same bytes. A directory with the same
fingerprint is reused: a resume never scores again.
"""

from __future__ import annotations

import inspect
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from transformers import PreTrainedModel

from prunelight.calibration.shared_windows import group_of, share_windows
from prunelight.calibration.windows import Windows, check_windows, split_windows
from prunelight.evaluation.report.record import FORMAT, Cost, RunRecord
from prunelight.evaluation.speed import forward_seconds
from prunelight.evaluation.stages import new_record
from prunelight.models.placement import device_with_room, move_if_it_fits, to_device
from prunelight.models.saving import check_replaceable, save
from prunelight.planning.fingerprints import (
    describe_model,
    describe_windows,
    fingerprint_of,
    model_fingerprint,
)
from prunelight.planning.plan import Plan
from prunelight.planning.steps import Step
from prunelight.pruning.apply import apply
from prunelight.recovery.lora import check_targets
from prunelight.recovery.packed_rows import check_packed
from prunelight.recovery.quantization import check_quantizable, check_widths
from prunelight.run.checkpoints import check_format
from prunelight.run.measurements import describe_evaluation, evaluation_windows, measure_run_stage
from prunelight.run.run_state import plan_files
from prunelight.run.strategies import check_strategy, group_of_run
from prunelight.run.teacher import check_teacher
from prunelight.runtime.atomic_files import explaining, replacing
from prunelight.runtime.devices import device_name
from prunelight.runtime.measuring import Measurement, measuring
from prunelight.runtime.processes import ProcessGroup
from prunelight.training.recovery_module import RecoveryModule

log = logging.getLogger(__name__)

MEASURED = "measured.json"  # beside the pruned base: the record of the run so far


class PruningCallback(Callback, ABC):
    """Base of all pruning methods; `plan` and `prunelight.apply` work without a Trainer too."""

    version = 1  # raise it when the same arguments lead to other decisions than before
    device: torch.device | None = None  # where layers compute; None: where the model is
    offload_activations = False  # keep calibration states on the CPU
    gradual = False  # prunes while the model trains, not at fit start
    slices = False  # leaves hidden states that are not those of the dense model
    follows_slicing = False  # can prune a model whose hidden states were sliced
    export_remote_code = False  # leaves a class of ours whose code goes beside the model

    @abstractmethod
    def plan(self, model: PreTrainedModel, windows: Windows) -> Plan:
        """Decide what to prune; the model is unchanged afterwards."""

    def arguments(self) -> dict[str, Any]:
        """Return the constructor's arguments that matter for the plan, as JSON values."""
        names = [*inspect.signature(type(self)).parameters]  # each is kept under its own name
        return {name: getattr(self, name) for name in names if name != "offload_activations"}

    def make_plan(
        self,
        model: PreTrainedModel,
        windows: Windows,
        *steps: Step,
        scores: Mapping[str, Sequence[float | None]],
        found: dict[str, Any] | None = None,
    ) -> Plan:
        """Return the plan of these steps, with what it was made from; on all ranks rank 0's."""
        plan = Plan(
            method=type(self).__name__,
            arguments=self.arguments(),
            model=describe_model(model),
            calibration=describe_windows(*split_windows(windows)),
            scores=scores,
            found=found or {},
            steps=steps,
        )
        return group_of(windows).on_zero(lambda: plan)

    @abstractmethod
    def check(self, model: PreTrainedModel) -> None:
        """Check the arguments against the model, before any data is read.

        Raises:
            ValueError: if they ask for something that this model cannot give.
        """

    def widths(self, model: PreTrainedModel) -> dict[str, int]:
        """Return widths of inputs that the method will leave, or their divisor, by what sets them.

        `quantization.check_widths` holds them against 4-bit kernels before anything is computed.
        """
        return {}

    def check_run(self, trainer: Trainer, module: RecoveryModule) -> None:
        """Check the arguments against the run, before anything is computed."""

    def check_calibration(self, model: PreTrainedModel, windows: Windows) -> None:
        """Check the calibration windows against the model, before anything is computed.

        Raises:
            ValueError: if the model cannot read them, or they do not suffice.
        """
        check_windows(model, windows)

    def apply(
        self, model: PreTrainedModel, plan: Plan, windows: Windows, outcomes: list[dict[str, Any]]
    ) -> PreTrainedModel:
        """Carry out the plan at fit start; `outcomes` gets what each step did."""
        places: dict[str, Any] = {"device": self.device, "offload": self.offload_activations}
        return apply(model, plan, windows, outcomes=outcomes, **places)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prune at the start of a fit; Lightning calls it."""
        callbacks = pruning_callbacks(trainer)
        if stage == "fit" and self is callbacks[0]:
            if not isinstance(pl_module, RecoveryModule):
                raise TypeError(
                    f"{type(self).__name__} prunes a prunelight RecoveryModule, not a "
                    f"{type(pl_module).__name__}; elsewhere call plan and prunelight.apply yourself"
                )
            if pl_module.base is None:  # a second fit goes on with the pruned model
                pl_module.check_output()
                prune_base(trainer, pl_module, callbacks)


def pruning_callbacks(trainer: Trainer) -> list[PruningCallback]:
    """Return the trainer's pruning callbacks in the order in which they act."""
    return [c for c in trainer.callbacks if isinstance(c, PruningCallback)]  # type: ignore[attr-defined]


def prune_base(
    trainer: Trainer, module: RecoveryModule, callbacks: Sequence[PruningCallback]
) -> None:
    """Make, or find, the pruned base of a run and load it into the module on every rank.

    Raises:
        ValueError, TypeError: for arguments or data that do not fit, before the first forward.
        RuntimeError: on the other ranks, if one failed.
    """
    check_strategy(trainer, module.quantization, module.recovery)
    for callback in callbacks:  # on every rank: Lightning counts the steps of all together
        callback.check_run(trainer, module)
    group = group_of_run(trainer)
    with group.together():
        directory = _find_or_make(trainer, module, callbacks, group)
        record = _read_measured(directory)
        if record is None:
            raise FileNotFoundError(
                f"this process does not see {directory}, which rank 0 wrote; trainer."
                "default_root_dir must be on a disk that all nodes share"
            )
        module.use_base(directory, record)


def _find_or_make(
    trainer: Trainer,
    module: RecoveryModule,
    callbacks: Sequence[PruningCallback],
    group: ProcessGroup,
) -> Path:
    datamodule: Any = getattr(trainer, "datamodule", None)
    for needed in ("calibration_windows", "validation_windows"):
        if not hasattr(datamodule, needed):
            raise ValueError(
                f"pruning needs data: give the Trainer a TextDataModule, or a LightningDataModule "
                f"with a method {needed}()"
            )
    model = module.load_model()
    check_quantizable(model, module.quantization)
    for callback in callbacks:
        callback.check(model)
        check_widths(callback.widths(model), module.quantization)
    check_targets(model, module.lora)
    check_teacher(module, model, sliced=any(callback.slices for callback in callbacks))
    check_packed(model, datamodule)
    windows = share_windows(datamodule.calibration_windows(), group)
    for callback in callbacks:
        callback.check_calibration(model, windows)
    held_out = share_windows(evaluation_windows(trainer), group)
    check_windows(model, held_out)
    fingerprint = _base_fingerprint(model, callbacks, windows)
    facts = (fingerprint, fingerprint_of(describe_windows(*split_windows(held_out))))
    group.check_same("the fingerprint of model, arguments and windows", " ".join(facts))
    root = group.on_zero(lambda: str(trainer.default_root_dir))
    directory = Path(root) / f"pruned-{fingerprint}"
    group.on_zero(partial(check_replaceable, directory))
    record = group.on_zero(lambda: _read_measured(directory))
    if record is None:
        _make_base(trainer, module, callbacks, windows, held_out, directory, fingerprint)
    else:
        log.info("reusing %s: same model, arguments and calibration", directory)
        _reuse_base(trainer, module, held_out, directory, record)
    module.forget_model()
    return directory


def _reuse_base(
    trainer: Trainer,
    module: RecoveryModule,
    held_out: Windows,
    directory: Path,
    record: RunRecord,
) -> None:
    """Keep the decision; measure again if text, timing or device of the evaluation are others."""
    record.costs = [replace(cost, reused=True) for cost in record.costs]
    described, group = describe_evaluation(module), group_of(held_out)
    same = all(record.evaluation.get(k) == described.get(k) for k in ("fingerprint", "latency"))
    place = device_with_room(module.load_model(), trainer.strategy.root_device)
    device = group.on_zero(lambda: device_name(place))
    if not same or record.device != device:
        stages = [
            measure_run_stage(module, "dense", to_device(module.load_model(), place), held_out)
        ]
        record.device = device
        if len(record.stages) > 1:
            module.use_base(directory, None)
            pruned = move_if_it_fits(module.load_model(), trainer.strategy.root_device)
            stages.append(measure_run_stage(module, "pruned", pruned, held_out))
            module.base = None
        record.stages, record.evaluation = stages, described
    group.on_zero(lambda: _write_measured(directory, record))


def _make_base(
    trainer: Trainer,
    module: RecoveryModule,
    callbacks: Sequence[PruningCallback],
    windows: Windows,
    held_out: Windows,
    directory: Path,
    fingerprint: str,
) -> None:
    model = move_if_it_fits(module.load_model(), trainer.strategy.root_device)
    described = describe_evaluation(module)
    record = new_record(module.name, model, fingerprint, described)
    with measuring(model.device) as dense:
        record.stages.append(measure_run_stage(module, "dense", model, held_out))
    record.forward_seconds = unit = forward_seconds(model, windows)

    def cost(name: str, phase: Measurement) -> None:
        record.costs.append(Cost(name, phase.seconds, phase.seconds / unit, phase.peak_bytes))

    cost("evaluate dense", dense)
    plans: list[Plan] = []
    for callback in callbacks:
        callback.device = trainer.strategy.root_device
        with measuring(model.device) as phase:
            plans.append(callback.plan(model, windows))
        cost(f"score and plan ({plans[-1].method})", phase)
        if callback.gradual:
            continue
        with measuring(model.device) as phase:
            model = callback.apply(model, plans[-1], windows, record.outcomes)
        cost(f"apply ({plans[-1].method})", phase)
    record.plans = [plan.to_dict() for plan in plans]
    if not all(callback.gradual for callback in callbacks):
        with measuring(model.device) as phase:
            record.stages.append(measure_run_stage(module, "pruned", model, held_out))
        cost("evaluate pruned", phase)
    with measuring(model.device) as phase, explaining(directory):
        # What was done to the model before this run still holds: zeros stay planned zeros.
        texts = [file.read_text(encoding="utf-8") for file in plan_files(Path(module.name))]
        texts += [json.dumps(plan.to_dict(), indent=1) + "\n" for plan in plans]
        writing = partial(
            save,
            model,
            module.checked_tokenizer(),
            directory,
            extra_files={f"plan{f'-{i + 1}' * (i > 0)}.json": t for i, t in enumerate(texts)},
            trust_remote_code=module.trust_remote_code,
            export_remote_code=any(callback.export_remote_code for callback in callbacks),
        )
        saved = group_of(windows).on_zero(writing)
    cost("save and verify pruned", phase)
    record.verification[directory.name] = saved.verification
    record.stages[-1] = replace(record.stages[-1], size_bytes=saved.size_bytes)
    group_of(windows).on_zero(lambda: _write_measured(directory, record))


def _base_fingerprint(
    model: PreTrainedModel, callbacks: Sequence[PruningCallback], windows: Windows
) -> str:
    methods = [[type(c).__name__, c.version, c.arguments()] for c in callbacks]
    data = describe_windows(*split_windows(windows))
    config = json.loads(model.config.to_json_string(use_diff=False))
    for name in ("_name_or_path", "transformers_version"):  # not what the model computes
        config.pop(name, None)
    return fingerprint_of(model_fingerprint(model), str(model.dtype), config, methods, data)


def _read_measured(directory: Path) -> RunRecord | None:
    """Return the record of a base on disk; None if there is no whole one of this version.

    Raises:
        ValueError: if a newer version wrote it.
    """
    try:
        data = json.loads((directory / MEASURED).read_text())
        newer = data["format"] > FORMAT
        record = None if newer else RunRecord.from_dict(data)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        log.warning("%s is damaged or of another version (%s): pruning anew", directory, error)
        return None
    check_format(str(directory / MEASURED), data["format"], FORMAT)
    return record


def _write_measured(directory: Path, record: RunRecord) -> None:
    with explaining(directory / MEASURED), replacing(directory / MEASURED) as temporary:
        temporary.write_text(json.dumps(record.to_dict(), indent=1))
