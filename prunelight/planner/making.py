"""Makes the plan of a method for a model, without a run: no training, no Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from prunelight.calibration.data_windows import stand_in_windows
from prunelight.calibration.windows import check_length
from prunelight.callbacks.base import PruningCallback
from prunelight.evaluation.saved.subject import find_device
from prunelight.models.loading import load
from prunelight.models.placement import move_if_it_fits
from prunelight.models.saving import MARKER
from prunelight.planner.counting import Size, planned_size
from prunelight.planner.scores import read_scores
from prunelight.planner.settings import CalibrationSettings
from prunelight.planning.plan import Plan
from prunelight.runtime.files.atomic_files import check_writable, explaining_write_errors


def make_method(made: type[PruningCallback], arguments: Mapping[str, Any]) -> PruningCallback:
    """Return a method whose plan can be made before anything is trained.

    Raises:
        ValueError, TypeError: if an argument is out of its range, or the method prunes while the
            model trains; names the method.
    """
    try:
        method = made(**arguments)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{made.__name__}: {error}") from error
    if method.gradual:
        raise ValueError(
            f"{made.__name__} with a schedule prunes while it trains, and a plan is carried out "
            "at once; leave schedule out, or use prunelight fit"
        )
    return method


@torch.no_grad()
def plan_of_model(
    method: PruningCallback,
    name: str,
    data: CalibrationSettings,
    *,
    dtype: str = "auto",
    device: str = "auto",
    offload: bool = False,
    trust: bool = False,
    attn_implementation: str | None = None,
) -> tuple[Plan, Size]:
    """Return the plan that a run would make with the same data, and the sizes before and after.

    Args:
        method: that decides.
        name: of the dense model, what `load` takes.
        data: what the method looks at.
        dtype: of the weights.
        device: where the model computes; auto takes a GPU if there is one.
        offload: keep it off the device, with one layer there at a time, even if it fits.
        trust: run Python code that comes with the model.
        attn_implementation: attention that it computes with; None: transformers chooses.

    Raises:
        ValueError, TypeError: if arguments, model and windows do not go together.
    """
    place = find_device(device)
    model, tokenizer = load(
        name, dtype=dtype, trust_remote_code=trust, attn_implementation=attn_implementation
    )
    method.check(model)  # before any text is read
    if data.self_written:  # which takes minutes
        check_length(model, data.seq_len)
        like_them = stand_in_windows(model, data.num_calibration, data.seq_len)
        method.check_calibration(model, like_them)
    windows = data.windows(model, tokenizer, place, offload=offload)
    method.check_calibration(model, windows)
    method.device = place
    plan = method.plan(move_if_it_fits(model, place, offload=offload), windows)
    return plan, planned_size(model, plan)


@torch.no_grad()
def plan_of_scores(
    method: PruningCallback, directory: Path, *, trust: bool = False
) -> tuple[Plan, Size]:
    """Return the plan that a method makes of scores, and the sizes before and after.

    No weight is read, and nothing is computed.

    Args:
        method: that decides.
        directory: of the scores.
        trust: run Python code that comes with the model.

    Raises:
        ValueError, TypeError: if the scores lack what the method asks for, it reads weights, or
            its arguments do not fit the model.
    """
    scores = read_scores(directory)
    with scores.in_place_of(directory, trust=trust) as model:
        method.check(model)
        try:
            method.check_calibration(model, scores.windows)
            plan = method.plan(model, scores.windows)
        except (RuntimeError, NotImplementedError) as error:
            if "meta" not in str(error):
                raise
            raise ValueError(
                f"{type(method).__name__} with these arguments runs the model or reads its "
                f"weights, which {directory} does not hold; plan from the model itself: prunelight "
                "plan MODEL"
            ) from error
        return plan, planned_size(model, plan)


def check_plan_file(file: Path) -> None:
    """Check that a plan may be written to a file: a new one, or one that holds a plan.

    Raises:
        FileExistsError: if the file holds something else, or is one of a saved model's.
        IsADirectoryError: if it is a directory.
        FileNotFoundError: if its directory does not exist.
        OSError: if nothing can be written there.
    """
    if file.is_dir():
        raise IsADirectoryError(f"out={file} is a directory; give the name of a file in it")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"out={file}: there is no directory {file.parent}; make it first")
    if (file.parent / MARKER).is_file():
        raise FileExistsError(
            f"out={file} lies in a saved model, whose plans say how it was made; give the name of "
            "a file elsewhere"
        )
    check_writable(file.parent)
    if not file.exists():
        return
    try:
        Plan.load(file)
    except (ValueError, OSError) as error:
        raise FileExistsError(
            f"out={file} exists and holds no plan; choose another name, or remove it"
        ) from error


def write_plan(plan: Plan, file: Path) -> None:
    """Write a plan, whole or not at all.

    Raises:
        OSError: if it cannot be written.
    """
    with explaining_write_errors(file):
        plan.save(file)


def read_plan(file: Path) -> Plan:
    """Return the plan of a file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds no plan.
    """
    if not file.is_file():
        hint = f"; did you mean {file / 'plan.json'}?" if (file / "plan.json").is_file() else ""
        raise FileNotFoundError(
            f"there is no plan {file}{hint or '; prunelight plan MODEL --method NAME writes one'}"
        )
    return Plan.load(file)
