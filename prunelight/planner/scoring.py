"""Scores a model once, in one pass over the windows, for all plans that are made of the scores."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from prunelight.calibration.windows import Windows, check_windows
from prunelight.evaluation.saved.subject import find_device
from prunelight.models.loading import load
from prunelight.models.placement import how_computed, move_if_it_fits
from prunelight.planner.applying import held_until_done
from prunelight.planner.score_readers import READERS, leave_out, read_together
from prunelight.planner.scores import (
    Scores,
    describe_scored,
    read_scores,
    windows_like,
    write_scores,
)
from prunelight.planner.settings import CalibrationSettings
from prunelight.pruning.healing.writers import first_writer
from prunelight.runtime.arguments import did_you_mean
from prunelight.runtime.finite import check_weights
from prunelight.scoring.importance import taylor_scores
from prunelight.scoring.remembered import Memory, remembering_scores
from prunelight.scoring.width_scores import KINDS, width_scores

log = logging.getLogger(__name__)


def _healing(model: PreTrainedModel, windows: Windows, memory: Memory) -> None:
    """Keep what of this model's layers is healed in closed form, if anything is."""
    first_writer(model, windows)


def _taylor(model: PreTrainedModel, windows: Windows, memory: Memory) -> None:
    """Keep first-order terms of layers, groups and neurons, both and each; needs gradients."""
    taylor_scores(model, windows)
    start = time.perf_counter()
    both = width_scores(model, windows, "taylor", [*KINDS])
    seconds = time.perf_counter() - start
    for kind, scores in both.items():
        memory.keep(width_scores, {kind: scores}, seconds, model, windows, "taylor", [kind])


# Scores that read more, or less, than one pass over the layers.
_ALONE: dict[str, Callable[[PreTrainedModel, Windows, Memory], None]] = {
    "healing": _healing,
    "taylor": _taylor,
}
SCORERS = (*READERS, *_ALONE)
CHEAP = [name for name in SCORERS if name != "taylor"]


def check_scorers(names: Collection[str]) -> None:
    """Check names of scores.

    Raises:
        ValueError: if one is none of `SCORERS`, or there is none.
    """
    if not names:
        raise ValueError(f"scores=[] asks for nothing; name some of {', '.join(SCORERS)}")
    for name in names:
        if name not in SCORERS:
            raise ValueError(
                f"scores: there is no score {name!r}{did_you_mean(name, [*SCORERS])}; the scores "
                f"are {', '.join(SCORERS)}"
            )


def score_model(
    model: PreTrainedModel,
    windows: Windows,
    *,
    scores: Collection[str] = CHEAP,
    device: torch.device,
    offload: bool = False,
    earlier: Scores | None = None,
    keep: Callable[[Scores], None] | None = None,
) -> Scores:
    """Return the scores of a model; the model is unchanged.

    Args:
        model: it is moved to the device if it fits.
        windows: calibration windows.
        scores: names of `SCORERS`. One that the family does not have is left out, and named.
        device: where the model computes.
        offload: keep it off the device, with one layer there at a time, even if it fits.
        earlier: of the same model and windows; what they hold is not computed again.
        keep: called with all that is there after each score.

    Raises:
        ValueError: if a name is unknown, the windows do not fit, or a state is NaN or Inf.
    """
    check_scorers(scores)
    check_weights(model)
    check_windows(model, windows)
    windows = windows_like(windows)
    model = move_if_it_fits(model, device, offload=offload)
    computed = Scores(describe_scored(model), windows, Memory(), how=how_computed(model, device))
    if earlier is not None and (differing := earlier.differing(computed)):
        log.warning(
            "scores that were left (%s) are of another computation (%s): all are computed anew",
            ", ".join(earlier.seconds),
            ", ".join(differing),
        )
    elif earlier is not None:
        computed.memory.scores |= earlier.memory.scores
        computed.memory.calls |= earlier.memory.calls
        computed.seconds.update(earlier.seconds)
        scored = ", ".join(earlier.seconds)
        log.info("%s was scored before: %s", model.config._name_or_path, scored)
    left_out, memory = computed.left_out, computed.memory
    asked = [name for name in dict.fromkeys(scores) if name not in computed.seconds]
    together = [name for name in asked if name in READERS]

    def note(name: str, seconds: float) -> None:
        computed.seconds[name] = seconds
        if keep is not None:
            keep(computed)

    with remembering_scores(memory):
        for readers, seconds in read_together(model, windows, together, left_out):
            reading = sum(x.reader is not None for x in readers.values())
            for name, score in readers.items():
                start, part = time.perf_counter(), seconds / reading if score.reader else 0.0
                score.keep(memory, seconds)
                note(name, part + time.perf_counter() - start)
        for name in [name for name in asked if name in _ALONE]:
            start = time.perf_counter()
            try:
                _ALONE[name](model, windows, memory)
            except TypeError as error:  # the family has no such parts
                leave_out(name, error, left_out)
                continue
            note(name, time.perf_counter() - start)
    return computed


def score_to_directory(
    name: str,
    out: Path,
    data: CalibrationSettings,
    *,
    scores: Collection[str] = CHEAP,
    dtype: str = "auto",
    device: str = "auto",
    offload: bool = False,
    trust: bool = False,
    attn_implementation: str | None = None,
) -> Scores:
    """Score a model by name, write the scores to a new directory, and return them.

    Args:
        name: what `load` takes.
        out: new directory.
        data: what the model reads.
        scores: names of `SCORERS`.
        dtype: of the weights.
        device: where the model computes; auto takes a GPU if there is one.
        offload: keep it off the device, with one layer there at a time, even if it fits.
        trust: run Python code that comes with the model.
        attn_implementation: attention that it computes with; None: transformers chooses.

    Raises:
        FileExistsError: if the directory exists.
        ValueError, TypeError: if a name is unknown, or model and windows do not go together.
        OSError: if the scores cannot be written.
    """
    place = find_device(device)
    check_scorers(scores)
    unfinished = out.absolute().with_name(f".{out.name}.scores")
    with held_until_done(out, unfinished, "scores so far"):
        model, tokenizer = load(
            name, dtype=dtype, trust_remote_code=trust, attn_implementation=attn_implementation
        )
        windows = data.windows(model, tokenizer, place, offload=offload)
        computed = score_model(
            model,
            windows,
            scores=scores,
            device=place,
            offload=offload,
            earlier=_earlier(unfinished),
            keep=partial(_keep, model, unfinished),
        )
        write_scores(computed, model, out)
    return computed


def _keep(model: PreTrainedModel, place: Path, so_far: Scores) -> None:
    """Write all scores so far, in place of those before."""
    before = _numbered(place)
    write_scores(so_far, model, place / str(1 + max(before, default=0)))
    for directory in before.values():
        shutil.rmtree(directory, ignore_errors=True)


def _earlier(place: Path) -> Scores | None:
    """Return the scores that a killed process left; None if there are none that are whole."""
    left = _numbered(place)
    if not left:
        return None
    try:
        return read_scores(left[max(left)])
    except ValueError as error:
        log.warning("%s", error)
        return None


def _numbered(place: Path) -> dict[int, Path]:
    return {int(path.name): path for path in place.glob("*") if path.name.isdecimal()}
