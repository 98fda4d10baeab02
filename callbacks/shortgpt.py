"""ShortGPT: remove the decoder layers that change the hidden states least (arXiv:2403.03853).

One shot: score every layer once, remove the lowest. `score="angular"` is the variant of Gromov et
al. (arXiv:2403.17887), which removes one contiguous window of layers. The released codes score the
last layer after the final norm, count padding and rank sums in float16; see prunelight.scoring.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from prunelight.allocation import (
    check_depth_target,
    layers_to_remove,
    lowest,
    lowest_window,
)
from prunelight.architecture import decoder_layers
from prunelight.calibration import Windows, check_windows, split_windows
from prunelight.callbacks.base import PruningCallback
from prunelight.plan import Plan, describe_model, describe_windows
from prunelight.scoring import angular_distances, block_influences
from prunelight.steps import RemoveLayers
from prunelight.surgery import check_removable

log = logging.getLogger(__name__)

SCORES = ("block_influence", "angular")


class ShortGPT(PruningCallback):
    """Remove whole decoder layers by Block Influence, or a window of them by angular distance.

    Args:
        ratio: share of the decoder layers to remove, in [0, 1), rounded to whole layers. The share
            of all parameters is smaller (embeddings stay); the report gives both.
        num_layers: how many layers to remove; exactly one of the two.
        score: "block_influence" removes the lowest layers one by one, "angular" the contiguous
            window whose input and output differ least at the last token.
        ignore_first_tokens: tokens at the start of each window that do not count, for models with
            attention sinks there; block_influence only. The paper counts all (0).
        protected: layers never to remove; negative indices count from the end.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(
        self,
        ratio: float | None = None,
        num_layers: int | None = None,
        score: Literal["block_influence", "angular"] = "block_influence",
        ignore_first_tokens: int = 0,
        protected: list[int] | None = None,
    ) -> None:
        check_depth_target(ratio, num_layers)
        if score not in SCORES:
            raise ValueError(f"score={score!r} must be one of {', '.join(SCORES)}")
        if ignore_first_tokens < 0:
            raise ValueError(f"ignore_first_tokens={ignore_first_tokens} must be at least 0")
        if ignore_first_tokens and score == "angular":
            raise ValueError(
                f"ignore_first_tokens={ignore_first_tokens} has no effect with score='angular', "
                "which looks at the last token only; leave it out"
            )
        self.ratio = ratio
        self.num_layers = num_layers
        self.score = score
        self.ignore_first_tokens = ignore_first_tokens
        self.protected = list(protected or [])

    def arguments(self) -> dict[str, Any]:
        """Return the constructor's arguments as JSON values."""
        return {
            "ratio": self.ratio,
            "num_layers": self.num_layers,
            "score": self.score,
            "ignore_first_tokens": self.ignore_first_tokens,
            "protected": self.protected,
        }

    def check(self, model: PreTrainedModel) -> None:
        """Check that the model has enough layers that may be removed.

        Raises:
            ValueError: if it has not, or its layers depend on each other.
        """
        total = len(decoder_layers(model))
        count = layers_to_remove(self.ratio, self.num_layers, total)
        if count > 0:
            check_removable(model)
        elif self.ratio:
            log.warning("ratio=%s removes none of %d decoder layers", self.ratio, total)
        self._choose([0.0] * self._num_scores(total, count), count)

    @torch.no_grad()
    def plan(self, model: PreTrainedModel, windows: Windows) -> Plan:
        """Score the decoder layers and choose which to remove; the model is unchanged.

        Args:
            model: the dense model.
            windows: calibration windows, token ids (N, T), or a mapping with attention_mask.

        Raises:
            ValueError: if the arguments or the windows do not fit the model, or a hidden state is
                NaN or Inf.
        """
        self.check(model)
        check_windows(model, windows)
        count = layers_to_remove(self.ratio, self.num_layers, len(decoder_layers(model)))
        if self.score == "angular":
            ranking = angular_distances(model, windows, count)
            scores = {"angular_distance": ranking}
        else:
            influence = block_influences(
                model, windows, ignore_first_tokens=self.ignore_first_tokens
            )
            ranking = influence.mean
            scores = {
                "block_influence": ranking,
                "block_influence_first_token": influence.first_token,
            }
        return Plan(
            method=type(self).__name__,
            arguments=self.arguments(),
            model=describe_model(model),
            calibration=describe_windows(*split_windows(windows)),
            scores=scores,
            steps=(RemoveLayers(tuple(self._choose(ranking, count))),),
        )

    def _num_scores(self, total: int, count: int) -> int:
        return total - count + 1 if self.score == "angular" else total

    def _choose(self, scores: list[float], count: int) -> list[int]:
        choose = lowest_window if self.score == "angular" else lowest
        return choose(scores, count, self.protected)
