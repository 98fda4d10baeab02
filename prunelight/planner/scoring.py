"""Scores a model once, in few forwards, for all plans that are made of these scores.

Each entry of `SCORERS` calls scoring functions as the methods do. Where one forward gives several
scores, their results are kept as if each had been asked for alone.
"""

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
from prunelight.models.families.experts.layout import has_experts
from prunelight.models.families.layers import decoder_layers
from prunelight.models.loading import load
from prunelight.models.placement import how_computed, move_if_it_fits
from prunelight.planner.applying import held_until_done
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
from prunelight.scoring.angular_distance import angular_distances, angular_distances_by_size
from prunelight.scoring.block_influence import (
    block_influences,
    relative_magnitudes,
    sublayer_influences,
)
from prunelight.scoring.experts.expert_scores import SCORES as EXPERT_SCORES
from prunelight.scoring.experts.expert_scores import expert_scores
from prunelight.scoring.importance import taylor_scores
from prunelight.scoring.remembered import Memory, remembering_scores
from prunelight.scoring.weight_scores import WeightScore, weight_scores, weight_summaries
from prunelight.scoring.width_scores import KINDS, standardised_scores, width_scores

log = logging.getLogger(__name__)


def _block_influence(model: PreTrainedModel, windows: Windows, memory: Memory) -> None:
    block_influences(model, windows)


def _relative_magnitude(model: PreTrainedModel, windows: Windows, memory: Memory) -> None:
    relative_magnitudes(model, windows)


def _sublayer_influence(model: PreTrainedModel, windows: Windows, memory: Memory) -> None:
    sublayer_influences(model, windows)


def _angular(model: PreTrainedModel, windows: Windows, memory: Memory) -> None:
    """Keep the distances over every number of layers that may go."""
    sizes, start = range(len(decoder_layers(model))), time.perf_counter()
    distances = angular_distances_by_size(model, windows, sizes)
    each = (time.perf_counter() - start) / len(sizes)
    for size, scores in distances.items():
        memory.keep(angular_distances, scores, each, model, windows, size)


def _weights(model: PreTrainedModel, windows: Windows, memory: Memory) -> None:
    """Keep what DLP (paper and code) and OWL read, of decoder layers and of matrices."""
    summaries: list[WeightScore] = ["median", "mean", "outlier_ratio"]
    for by_matrix in (False, True):
        start = time.perf_counter()
        by_summary = weight_summaries(model, windows, summaries, by_matrix=by_matrix)
        each = (time.perf_counter() - start) / len(by_summary)
        for name, scores in by_summary.items():
            memory.keep(weight_scores, scores, each, model, windows, name, by_matrix=by_matrix)


def _width(model: PreTrainedModel, windows: Windows, memory: Memory) -> None:
    """Keep the scores of groups and neurons by Wanda and by fluctuation (FLAP)."""
    for score in ("wanda", "fluctuation"):
        _keep_width(model, windows, memory, score)
    start = time.perf_counter()
    standardised = standardised_scores(model, windows, [*KINDS])
    seconds = time.perf_counter() - start
    for kind, scores in standardised.items():
        memory.keep(standardised_scores, {kind: scores}, seconds, model, windows, [kind])


def _experts(model: PreTrainedModel, windows: Windows, memory: Memory) -> None:
    """Keep both scores of experts; a model without routed experts has none to keep."""
    if has_experts(model):
        for score in EXPERT_SCORES:
            expert_scores(model, windows, score)


def _healing(model: PreTrainedModel, windows: Windows, memory: Memory) -> None:
    """Keep what of this model's layers is healed in closed form, if anything is."""
    first_writer(model, windows)


def _taylor(model: PreTrainedModel, windows: Windows, memory: Memory) -> None:
    """Keep first-order terms of layers, groups and neurons; needs gradients."""
    taylor_scores(model, windows)
    _keep_width(model, windows, memory, "taylor")


def _keep_width(model: PreTrainedModel, windows: Windows, memory: Memory, score: str) -> None:
    """Keep a score of groups and neurons together, and of each alone."""
    start = time.perf_counter()
    both = width_scores(model, windows, score, [*KINDS])
    seconds = time.perf_counter() - start
    for kind, scores in both.items():
        memory.keep(width_scores, {kind: scores}, seconds, model, windows, score, [kind])


SCORERS: dict[str, Callable[[PreTrainedModel, Windows, Memory], None]] = {
    "block_influence": _block_influence,
    "relative_magnitude": _relative_magnitude,
    "sublayer_influence": _sublayer_influence,
    "angular": _angular,
    "weights": _weights,
    "width": _width,
    "experts": _experts,
    "healing": _healing,
    "taylor": _taylor,
}
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
    left_out, seconds = computed.left_out, computed.seconds
    if earlier is not None and earlier.are_of(computed):
        computed.memory.scores |= earlier.memory.scores
        computed.memory.calls |= earlier.memory.calls
        seconds |= earlier.seconds
        log.info("%s was scored before: %s", model.config._name_or_path, ", ".join(seconds))
    with remembering_scores(computed.memory) as memory:
        for name in dict.fromkeys(scores):
            if name in seconds:
                continue
            start = time.perf_counter()
            try:
                SCORERS[name](model, windows, memory)
            except TypeError as error:  # the family has no such parts
                log.warning("%s is left out: %s", name, error)
                left_out[name] = str(error)
                continue
            seconds[name] = time.perf_counter() - start
            if keep is not None:
                keep(computed)
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
