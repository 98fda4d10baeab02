"""Carries out a plan on a model by name, and saves the result: all that can fail, fails before."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from prunelight.calibration.windows import Windows, split_windows
from prunelight.evaluation.saved.subject import find_device
from prunelight.models.families.layers import decoder_layers
from prunelight.models.families.own_classes.registration import code_file
from prunelight.models.loading import load
from prunelight.models.placement import move_if_it_fits
from prunelight.models.saving import SavedModel, generation_fault, save
from prunelight.models.written_files import check_place
from prunelight.planner.counting import Size, planned_size
from prunelight.planner.settings import CalibrationSettings
from prunelight.planning.fingerprints import describe_windows
from prunelight.planning.plan import Plan
from prunelight.pruning.apply import apply, keeps_layers, needs_windows
from prunelight.run.run_state import plan_texts, plans_beside
from prunelight.runtime.devices import free_memory
from prunelight.runtime.files.atomic_files import check_writable, explaining_write_errors
from prunelight.runtime.files.directory_lock import DirectoryLock

log = logging.getLogger(__name__)

_OTHER_FILES = 64 * 2**20  # bytes of config, tokenizer and plan, generously


@torch.no_grad()
def apply_to_saved(
    name: str,
    plan: Plan,
    out: Path,
    data: CalibrationSettings | None,
    *,
    dtype: str = "auto",
    device: str = "auto",
    offload: bool = False,
    strict: bool = True,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> tuple[SavedModel, Size]:
    """Prune a model by a plan and save it, with the plan beside it; all of it, or nothing.

    Args:
        name: what `load` takes.
        plan: made for this model.
        out: new directory.
        data: what steps look at that fit weights, or choose zeros; None without data.
        dtype: of the weights.
        device: where layers compute; auto takes a GPU if there is one.
        offload: keep it off the device, with one layer there at a time, even if it fits.
        strict: require the very weights that the plan was made for.
        trust_remote_code: run Python code that comes with the model.
        attn_implementation: attention that it computes with; None: transformers chooses.

    Returns:
        What was saved, and the sizes before and after.

    Raises:
        FileExistsError: if the directory exists.
        ValueError, TypeError: if the plan does not fit the model, or needs windows.
        OSError: if the result would not fit on the disk, or cannot be written.
        RuntimeError: if another process makes the same directory.
    """
    place = find_device(device)
    check_data(plan, data)
    unfinished = out.absolute().with_name(f".{out.name}.layers")
    with held_until_done(out, unfinished, "finished layers"):
        model, tokenizer = load(
            name,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
        )
        plan.check(model, strict=strict, num_layers=len(decoder_layers(model)))
        size = planned_size(model, plan)
        check_room(out, size.bytes_after)
        windows = None
        if data is not None and needs_windows(plan.steps):
            windows = data.windows(model, tokenizer, place, offload=offload)
            _tell_other_windows(plan, windows)
        model = move_if_it_fits(model, place, offload=offload)
        on_disk = goes_to_disk(model, plan, out, unfinished, size.bytes_after)
        scratch = unfinished if on_disk else None
        fault = generation_fault(model)
        model = apply(model, plan, windows, strict=strict, device=place, scratch=scratch)
        with explaining_write_errors(out):
            saved = save(
                model,
                tokenizer,
                out,
                # What was done to the model before still holds: its zeros stay planned zeros.
                extra_files=plan_texts([*plans_beside(Path(name).expanduser()), plan]),
                trust_remote_code=trust_remote_code,
                export_remote_code=bool(plan.arguments.get("export_remote_code"))
                and code_file(model.config.model_type) is not None,
                dense_fault=fault,
                finished=scratch,
            )
    return saved, size


def goes_to_disk(
    model: PreTrainedModel, plan: Plan, out: Path, unfinished: Path, needed: int
) -> bool:
    """Return whether layers that a step has finished go to disk; else they stay in memory.

    They go there if a step of the plan can keep them, and the disk has room for both: the layers
    and the result.

    Args:
        model: before the plan.
        plan: of the model.
        out: new directory of the result.
        unfinished: directory of the layers, beside it.
        needed: bytes of the result's weights.

    Raises:
        OSError: if neither the disk nor the memory has room for the layers.
    """
    weights = {id(weight): weight for weight in decoder_layers(model).parameters()}.values()
    layers = sum(weight.numel() * weight.element_size() for weight in weights)
    on_disk = layers * len(keeps_layers(plan.steps))
    if not on_disk:
        return False
    there = sum(file.stat().st_size for file in unfinished.rglob("*") if file.is_file())
    free = _free_beside(out) + there
    if free >= needed + on_disk + _OTHER_FILES:
        return True
    lacking = (
        f"out={out} has {free / 1e9:.2f} GB free for {needed / 1e9:.2f} GB of weights and "
        f"{on_disk / 1e9:.2f} GB of finished layers"
    )
    if model.device.type == "cpu" and free_memory(model.device) < layers:
        raise OSError(
            f"{lacking}, which do not fit in memory either; free space, or choose another disk"
        )
    log.warning("%s: these stay in memory, and a run that is killed starts anew", lacking)
    return False


@contextmanager
def held_until_done(out: Path, place: Path, contents: str) -> Iterator[None]:
    """Hold a directory of finished parts for this process; remove it at the end, not on errors.

    Args:
        out: new directory of the result.
        place: beside it.
        contents: what it holds, for the log.

    Raises:
        RuntimeError: if another process makes the same result.
        FileExistsError: if the result exists.
        OSError: if it cannot be made.
    """
    check_new(out)
    lock = DirectoryLock(place, "out")
    try:
        check_new(out)  # another process may have made it before it let go
        yield
        shutil.rmtree(place, ignore_errors=True)
    except BaseException:
        if any(place.rglob("*.safetensors")):
            log.warning("%s are in %s: the same command goes on from there", contents, place)
        else:
            shutil.rmtree(place, ignore_errors=True)
        raise
    finally:
        lock.release()


def calibration_for(plan: Plan, data: CalibrationSettings, given: set[str]) -> CalibrationSettings:
    """Return settings whose number and length of windows are the plan's, where none was given.

    Args:
        plan: whose windows are drawn again.
        data: as parsed, with defaults.
        given: names of the settings that were given.
    """
    facts = {"seq_len": "seq_len", "num_calibration": "num_samples"}
    of_the_plan = {
        name: plan.calibration[fact]
        for name, fact in facts.items()
        if name not in given and fact in plan.calibration
    }
    return replace(data, **of_the_plan)


def check_new(out: Path) -> None:
    """Check that a directory does not exist yet and can be made.

    Raises:
        FileExistsError: if something has its name.
        ValueError: if it is one that cannot be replaced.
        OSError: if nothing can be written there.
    """
    check_place(out)
    if out.exists() or out.is_symlink():
        raise FileExistsError(f"out={out} exists; choose another directory, or remove it")
    check_writable(out)


def check_data(plan: Plan, data: CalibrationSettings | None) -> None:
    """Check that there are calibration windows if, and only if, a step looks at them.

    Raises:
        ValueError: if a step needs windows and there are none; names the step.
    """
    steps = needs_windows(plan.steps)
    if steps and data is None:
        raise ValueError(
            f"the step {steps[0].kind} of the plan looks at calibration windows; give "
            "data.calibration, the text that the plan was made with, such as "
            "--data.calibration sample:calibration"
        )
    if data is not None and not steps:
        log.warning("data.calibration has no effect: no step of the plan looks at windows")


def check_room(out: Path, needed: int) -> None:
    """Check that the disk has room for so many bytes of weights.

    Raises:
        OSError: if not; says what is needed and what is free.
    """
    free = _free_beside(out)
    if free < needed + _OTHER_FILES:
        raise OSError(
            f"out={out} needs {needed / 1e9:.2f} GB for its weights and {_OTHER_FILES / 1e9:.2f} "
            f"GB beside them, and {free / 1e9:.2f} GB are free there; free space, or choose "
            "another disk"
        )


def _free_beside(out: Path) -> int:
    """Return the free bytes of the disk on which a new directory will be."""
    existing = out.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def _tell_other_windows(plan: Plan, windows: Windows) -> None:
    """Warn if these are not the windows that the plan was made with."""
    facts = describe_windows(*split_windows(windows))
    if plan.calibration and facts["fingerprint"] != plan.calibration.get("fingerprint"):
        log.warning(
            "the plan was made with other calibration windows (%s of %s tokens, fingerprint %s); "
            "weights are fitted on these: %s of %s tokens, %s",
            *(plan.calibration.get(key) for key in ("num_samples", "seq_len", "fingerprint")),
            *(facts[key] for key in ("num_samples", "seq_len", "fingerprint")),
        )
