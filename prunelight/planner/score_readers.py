"""What scores read of the layers, and under which calls their results are kept.

One pass over the windows serves all of them. Where a method would ask for one of several results,
each is kept as if it had been asked for alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from prunelight.calibration.layer_readers import LayerReader, read_layers
from prunelight.calibration.windows import Windows
from prunelight.models.families.experts.layout import has_experts
from prunelight.models.families.layers import decoder_layers
from prunelight.scoring.angular_distance import AngularReader, angular_distances
from prunelight.scoring.block_influence import (
    BlockInfluenceReader,
    RelativeMagnitudeReader,
    SublayerInfluenceReader,
    block_influences,
    relative_magnitudes,
    sublayer_influences,
)
from prunelight.scoring.experts.expert_scores import SCORES as EXPERT_SCORES
from prunelight.scoring.experts.expert_scores import ExpertReader, expert_scores
from prunelight.scoring.remembered import Memory
from prunelight.scoring.weight_scores import WeightReader, weight_scores
from prunelight.scoring.width_scores import KINDS, WidthReader, standardised_scores, width_scores

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoreReader:
    """A reader, and what to do when it has read.

    Attributes:
        reader: that reads; None if there is nothing to read.
        keep: called with a memory, and the seconds of the pass; keeps the results.
    """

    reader: LayerReader | None
    keep: Callable[[Memory, float], None]


def _one_result(
    reader_class: type[BlockInfluenceReader | RelativeMagnitudeReader | SublayerInfluenceReader],
    function: Callable[..., Any],
    model: PreTrainedModel,
    windows: Windows,
) -> ScoreReader:
    """Keep the result of a reader as that of one scoring function."""
    reader = reader_class(model, windows)

    def keep(memory: Memory, seconds: float) -> None:
        memory.keep(function, reader.result(), seconds, model, windows)

    return ScoreReader(reader, keep)


def _angular(model: PreTrainedModel, windows: Windows) -> ScoreReader:
    """Keep the distances over every number of layers that may go."""
    reader = AngularReader(model, windows)

    def keep(memory: Memory, seconds: float) -> None:
        sizes = range(len(decoder_layers(model)))
        for size, scores in reader.result(sizes).items():
            memory.keep(angular_distances, scores, seconds, model, windows, size)

    return ScoreReader(reader, keep)


def _weights(model: PreTrainedModel, windows: Windows) -> ScoreReader:
    """Keep what DLP (paper and code) and OWL read, of decoder layers and of matrices."""
    reader = WeightReader(model, windows, ["median", "mean", "outlier_ratio"], [False, True])

    def keep(memory: Memory, seconds: float) -> None:
        for by_matrix, of_summary in reader.scores.items():
            for name, scores in of_summary.items():
                memory.keep(
                    weight_scores, scores, seconds, model, windows, name, by_matrix=by_matrix
                )

    return ScoreReader(reader, keep)


def _width(model: PreTrainedModel, windows: Windows) -> ScoreReader:
    """Keep the scores of groups and neurons by Wanda and by fluctuation (FLAP), both and each."""
    reader = WidthReader(model, windows)

    def keep(memory: Memory, seconds: float) -> None:
        by_score = {score: reader.result(score, KINDS) for score in ("wanda", "fluctuation")}
        standardised = reader.standardised(KINDS)
        for kinds in ([*KINDS], *([kind] for kind in KINDS)):
            for score, scores in by_score.items():
                some = {kind: scores[kind] for kind in kinds}
                memory.keep(width_scores, some, seconds, model, windows, score, kinds)
            some = {kind: standardised[kind] for kind in kinds}
            memory.keep(standardised_scores, some, seconds, model, windows, kinds)

    return ScoreReader(reader, keep)


def _experts(model: PreTrainedModel, windows: Windows) -> ScoreReader:
    """Keep both scores of experts; a model without routed experts has none to keep."""
    if not has_experts(model):
        return ScoreReader(None, lambda memory, seconds: None)
    reader = ExpertReader(model, windows)

    def keep(memory: Memory, seconds: float) -> None:
        for score in EXPERT_SCORES:
            memory.keep(expert_scores, reader.result(score), seconds, model, windows, score)

    return ScoreReader(reader, keep)


READERS: dict[str, Callable[[PreTrainedModel, Windows], ScoreReader]] = {
    "block_influence": partial(_one_result, BlockInfluenceReader, block_influences),
    "relative_magnitude": partial(_one_result, RelativeMagnitudeReader, relative_magnitudes),
    "sublayer_influence": partial(_one_result, SublayerInfluenceReader, sublayer_influences),
    "angular": _angular,
    "weights": _weights,
    "width": _width,
    "experts": _experts,
}


def read_together(
    model: PreTrainedModel, windows: Windows, names: Collection[str], left_out: dict[str, str]
) -> Iterator[tuple[dict[str, ScoreReader], float]]:
    """Read the windows for several scores in one pass; in several, where that fails.

    Args:
        model: unchanged.
        windows: calibration windows.
        names: of `READERS`.
        left_out: gets the scores that this model does not have, and why.

    Yields:
        The readers of a pass by name, and the seconds that it took.
    """
    readers = {}
    for name in names:
        try:
            readers[name] = READERS[name](model, windows)
        except TypeError as error:  # the family has no such parts
            leave_out(name, error, left_out)
    start = time.perf_counter()
    try:
        reading = [x.reader for x in readers.values() if x.reader is not None]
        read_layers(model, windows, reading, label="scores")
    except TypeError as error:
        if len(readers) == 1:
            leave_out(next(iter(readers)), error, left_out)
            return
        log.warning("the scores are read in several passes: %s", error)
        by_layer = [n for n, x in readers.items() if x.reader is not None and x.reader.by_layer]
        others = [name for name in readers if name not in by_layer]
        parts = [by_layer, others] if by_layer and others else [[name] for name in readers]
        for part in parts:
            yield from read_together(model, windows, part, left_out)
        return
    if readers:
        yield readers, time.perf_counter() - start


def leave_out(name: str, error: TypeError, left_out: dict[str, str]) -> None:
    """Note that a model does not have a score, and why; say so."""
    log.warning("%s is left out: %s", name, error)
    left_out[name] = str(error)
