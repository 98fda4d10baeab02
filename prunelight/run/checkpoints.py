"""What an earlier start of a run left on disk, and whether it fits this one.

The pruned base has a record of what was measured; its fingerprint names the directory. A checkpoint
says on which base it was trained, in which way, and which parameters it holds.
"""

from __future__ import annotations

import inspect
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from prunelight.calibration.windows import Windows, split_windows
from prunelight.evaluation.report import record as reports
from prunelight.evaluation.report.record import RunRecord
from prunelight.models.saving import check_unchanged
from prunelight.planning.fingerprints import describe_windows, fingerprint_of, model_fingerprint
from prunelight.recovery.quantization import FOUR_BIT, BitsAndBytes
from prunelight.run.method import PruningMethod
from prunelight.run.run_state import MEASURED
from prunelight.runtime.files.atomic_files import (
    atomic_replacement,
    explaining_write_errors,
)
from prunelight.runtime.files.checkpoint_files import read_checkpoint
from prunelight.runtime.files.checksums import sealed, unsealed

log = logging.getLogger(__name__)

FORMAT = 2  # of what a recovery keeps in a checkpoint
KEY = "prunelight"  # of a checkpoint: what the module that wrote it said of its training
RESUME_KEY = "prunelight_resume"  # of a checkpoint: what a resumed run needs and is compared by
# What format 1 said in words.
_ZEROS_OF_FORMAT_1 = {"not kept": "not_kept", "growing": "gradual"}
_QUANTIZATION_OF_FORMAT_1 = re.compile(r"(\w+) \((\w+) quantization, compute dtype (\w+)\)")
# Arguments that entered the fingerprint of a base of format 1, whatever their values.
_ARGUMENTS_OF_FORMAT_1 = {
    "DLP": "sparsity pattern allocation alpha outlier_factor granularity solver sparsegpt schedule "
    "strict",
    "DynamicSlicing": "slice_ratio base_ratio parameter_ratio round_to embedding signal "
    "orientation seed export_remote_code",
    "SLEB": "ratio num_layers criterion protected",
    "ShortGPT": "ratio num_layers score ignore_first_tokens protected granularity",
    "ShortenedLlama": "ratio num_layers score protected",
    "SliceGPT": "slice_ratio parameter_ratio round_to embedding signal orientation rotation seed "
    "export_remote_code",
    "SlidingLayerMerging": "num_layers ratio threshold merge criterion limit ignore_first_tokens "
    "protected",
    "WidthPruning": "neuron_ratio head_ratio intermediate_size num_key_value_heads score multiple "
    "correction",
}


# --- the pruned base -------------------------------------------------------------------------


def base_fingerprints(
    model: PreTrainedModel, methods: Sequence[PruningMethod], windows: Windows
) -> tuple[str, str | None]:
    """Return what identifies a pruned base, and what identified the same base in format 1.

    Arguments at their default do not enter the first: a method may get further ones. The second is
    None if an argument that format 1 did not have has another value.
    """
    config = json.loads(model.config.to_json_string(use_diff=False))
    for name in ("_name_or_path", "transformers_version"):  # not what the model computes
        config.pop(name, None)
    facts = (model_fingerprint(model), str(model.dtype), config)
    data = describe_windows(*split_windows(windows))
    given = [[type(method).__name__, method.version, given_arguments(method)] for method in methods]
    fingerprint = fingerprint_of(*facts, given, data, "format 2")
    complete = [_arguments_of_format_1(method) for method in methods]
    if None in complete:
        return fingerprint, None
    names = [(type(method).__name__, method.version) for method in methods]
    earlier = [[*name, values] for name, values in zip(names, complete, strict=True)]
    return fingerprint, fingerprint_of(*facts, earlier, data)


def state_arguments(method: PruningMethod) -> dict[str, Any]:
    """Return the arguments by which a checkpoint knows the state of a method.

    An argument that the method gets later does not enter while it has its default: the state of an
    older checkpoint is still found.
    """
    if type(method).__name__ in _ARGUMENTS_OF_FORMAT_1:
        earlier = _arguments_of_format_1(method)
        return method.arguments() if earlier is None else earlier
    return given_arguments(method)


def given_arguments(method: PruningMethod) -> dict[str, Any]:
    """Return the arguments of a method that differ from their defaults."""
    parameters = inspect.signature(type(method)).parameters
    return {
        name: value
        for name, value in method.arguments().items()
        if name not in parameters or value != _as_json(parameters[name].default)
    }


def _as_json(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def _arguments_of_format_1(method: PruningMethod) -> dict[str, Any] | None:
    """Return the arguments that entered a fingerprint of format 1; None if others are set."""
    arguments = method.arguments()
    known = _ARGUMENTS_OF_FORMAT_1.get(type(method).__name__)
    if known is None:  # a method of the user's own
        return arguments
    if set(given_arguments(method)) - set(known.split()):
        return None
    return {name: value for name, value in arguments.items() if name in known.split()}


def read_measured(directory: Path) -> RunRecord | None:
    """Return the record of a base on disk; None if there is no whole one of this version.

    Raises:
        ValueError: if a newer version wrote it.
    """
    try:
        text = (directory / MEASURED).read_text(encoding="utf-8")
        data = json.loads(text)
        newer = data["format"] > reports.FORMAT
        record = None if newer else RunRecord.from_dict(unsealed(text))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        log.warning("%s is damaged or of another version (%s): pruning anew", directory, error)
        return None
    check_format(str(directory / MEASURED), data["format"], reports.FORMAT)
    return record


def write_measured(directory: Path, record: RunRecord) -> None:
    """Write the record of a base beside it, whole or not at all."""
    with (
        explaining_write_errors(directory / MEASURED),
        atomic_replacement(directory / MEASURED) as temporary,
    ):
        temporary.write_text(sealed(record.to_dict()), encoding="utf-8")


def check_base(directory: Path, fingerprint: str | None = None) -> None:
    """Check that a pruned base on disk is whole, and the one that is meant.

    Args:
        directory: of the base.
        fingerprint: of model, arguments and windows; None: that of its name.

    Raises:
        ValueError: if a file is not as it was saved; names the file and the remedy.
    """
    check_unchanged(directory, leave_out=(MEASURED,))
    record = read_measured(directory)
    if record is not None and fingerprint not in (None, record.fingerprint):
        raise ValueError(
            f"{directory} holds the base {record.fingerprint}: it was renamed; delete the "
            "directory, and the same command makes the right one"
        )


# --- checkpoints -----------------------------------------------------------------------------


def read_metadata(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the module that wrote a checkpoint said of itself.

    Raises:
        ValueError: if another module or a newer version wrote it.
    """
    if KEY not in checkpoint:
        raise ValueError(f"the checkpoint has no key {KEY!r}: it is not from this module")
    saved = checkpoint[KEY]
    check_format("the checkpoint", saved.get("format", 1), FORMAT)
    earlier = {"zeros": "not kept", "masks": None, "quantization": "none"}  # before version 0.2
    metadata = {**earlier, **saved}
    if saved.get("format", 1) == 1:
        metadata["zeros"] = _ZEROS_OF_FORMAT_1.get(metadata["zeros"], metadata["zeros"])
        metadata["quantization"] = quantization_of_format_1(metadata["quantization"])
    return metadata


@dataclass(frozen=True)
class TrainingEnd:
    """The end of a training, as its last checkpoint tells it.

    Attributes:
        step: optimizer steps that were trained.
        planned: steps that were to be trained; early stopping may have ended it before.
        settings: what the losses depended on, see `describe_run` of the training.
    """

    step: int
    planned: float
    settings: Mapping[str, Any]


def training_end(path: Path) -> TrainingEnd | None:
    """Return the end of the training that wrote a checkpoint; None if it was interrupted.

    Tensors stay on disk; the checksum of the file is checked.

    Raises:
        ValueError: if the file is damaged.
    """
    return end_of(read_checkpoint(path, mmap=True))


def end_of(checkpoint: Mapping[str, Any]) -> TrainingEnd | None:
    """Return the end of the training that a checkpoint tells of; None if it was interrupted."""
    saved, step = checkpoint.get(RESUME_KEY), int(checkpoint.get("global_step", 0))
    if saved is None or not saved["finished"]:
        return None
    # Checkpoints of version 0.2 tell the plan only where the learning rate decays.
    planned = saved.get("planned_steps", saved["settings"].get("scheduled_steps"))
    return TrainingEnd(step, step if planned is None else planned, saved["settings"])


def quantization_keys(kind: str, options: BitsAndBytes) -> dict[str, Any]:
    """Return a quantization by stable keys, as checkpoints hold and compare it."""
    return {"kind": kind, **(asdict(options) if kind in FOUR_BIT else {})}


def quantization_of_format_1(words: str) -> dict[str, Any]:
    """Return by stable keys what format 1 said in words: "nf4 (double quantization, ...)"."""
    match = _QUANTIZATION_OF_FORMAT_1.fullmatch(words)
    if match is None:
        return {"kind": words}
    kind, scales, compute_dtype = match.groups()
    return quantization_keys(kind, BitsAndBytes(scales == "double", compute_dtype))


def check_format(what: str, found: Any, known: int) -> None:
    """Check that this version can read a file.

    Raises:
        ValueError: if a newer one wrote it.
    """
    if not isinstance(found, int) or found > known:
        raise ValueError(
            f"{what} has format={found!r}, written by a newer prunelight; this one reads up to "
            f"{known}: use the version that wrote it, or another trainer.default_root_dir"
        )


def check_same_run(saved: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Check that a checkpoint was trained on our base, in our way.

    Raises:
        ValueError: if not; names both.
    """
    if any(saved[key] != ours[key] for key in ("fingerprint", "recovery", "zeros", "quantization")):
        raise ValueError(
            f"the checkpoint was trained by {_describe(saved)}, this run trains by "
            f"{_describe(ours)}; use the arguments of that run, or start without ckpt_path"
        )


def check_same_settings(
    then: Mapping[str, Any], now: Mapping[str, Any], path: str | Path | None
) -> None:
    """Check that a run goes on with the settings that it began with.

    Args:
        then: settings of the run that wrote the checkpoint, those that differ.
        now: the same of this run.
        path: the checkpoint.

    Raises:
        ValueError: if there are any; names each on both sides, and the checkpoint.
    """
    if odd := sorted({*then, *now}):
        before, after = (
            ", ".join(f"{k}={side[k]}" if k in side else f"{k} unset" for k in odd)
            for side in (then, now)
        )
        raise ValueError(
            f"{path} was written by a run with {before}, this one has {after}: going on would give "
            "neither result. Take the settings of that run, or start anew with another "
            "trainer.default_root_dir or ckpt_path=null"
        )


def _describe(run: Mapping[str, Any]) -> str:
    kind, *options = run["quantization"].items()
    details = ", ".join(f"{name}={value}" for name, value in options)
    quantization = f"{kind[1]} ({details})" if details else kind[1]
    return (
        f"{run['recovery']} with quantization {quantization} on base {run['fingerprint']} "
        f"({run['base']}) with zeros {run['zeros'].replace('_', ' ')}"
    )


def check_same_parameters(saved: Mapping[str, Any], trained: Mapping[str, Any]) -> None:
    """Check that a checkpoint holds the trained parameters, and no other, in their shapes.

    Raises:
        ValueError: if not; names one.
    """
    then, now = ({k: tuple(p.shape) for k, p in side.items()} for side in (saved, trained))
    odd = sorted(k for k in {*then, *now} if then.get(k) != now.get(k))
    if odd:
        raise ValueError(
            f"{len(odd)} trained parameters do not fit, e.g. {odd[0]}: {then.get(odd[0])} in the "
            f"checkpoint, {now.get(odd[0])} in this run; the LoRA settings must be those of the "
            "run that wrote it"
        )
