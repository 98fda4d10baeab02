"""LaCo: collapse windows of decoder layers into their lowest layer (arXiv:2402.11187).

The differences of the upper layers of a window from its lowest layer are added to it (Reserving
Differences while Seeking Common). A window of a fixed number of layers slides down from the top,
and is merged where the final hidden states stay similar. The released code adds differences to a
running copy, which leaves the highest layer; here the sum is the paper's. The paper's next window
may hold a layer that is merged already; here it ends below that layer.
"""

from __future__ import annotations

import logging
import math
from functools import partial

import torch
from transformers import PreTrainedModel

from prunelight.calibration.windows import Windows
from prunelight.callbacks.base import Healing, PruningCallback
from prunelight.models.families.layers import decoder_layers
from prunelight.models.families.removable import removable_layers
from prunelight.planning.fixed_windows import most_removed, slide_fixed
from prunelight.planning.layer_choice import (
    check_depth_target,
    layers_left,
    layers_to_remove,
)
from prunelight.planning.plan import Plan
from prunelight.planning.sliding_search import SlidingPass, search_threshold
from prunelight.planning.steps import MergeLayers
from prunelight.pruning.merge_layers import check_mergeable, merged_layer
from prunelight.runtime.arguments import at_least, checked, within
from prunelight.runtime.finite import check_weights
from prunelight.scoring.model_variants import MergedVariants, VariantReplay

log = logging.getLogger(__name__)

MERGE = "difference_sum"


class LaCo(PruningCallback):
    """Collapse windows of a fixed number of decoder layers, from the top down.

    Args:
        threshold: lowest similarity to the dense model, at most 1: the mean cosine of the final
            hidden states over the calibration tokens. Give exactly one of the first three.
        num_layers: how many layers to remove, with the highest threshold that removes so many.
        ratio: share of the decoder layers to remove, in [0, 1).
        window: layers that become one, at least 2 (C of the paper, which takes 3 to 7).
        protected: layers that no window may contain; negative indices count from the end.
        offload_activations: keep the hidden states on the CPU: num_samples * seq_len * hidden_size
            * (layers + 1) numbers.
        heal: "linear" then fits weights anew, in closed form, to the dense model's hidden states;
            "layer" trains whole layers to them too, one at a time. See docs/healing.md. Both need 2
            calibration windows or more.

    Raises:
        ValueError: if an argument is out of its range.
    """

    @checked(ratio=within(0, 1), num_layers=at_least(0), window=at_least(2))
    def __init__(
        self,
        threshold: float | None = None,
        num_layers: int | None = None,
        ratio: float | None = None,
        window: int = 4,
        protected: list[int] | None = None,
        offload_activations: bool = False,
        heal: Healing = "none",
    ) -> None:
        if [threshold, num_layers, ratio].count(None) != 2:
            raise ValueError(
                f"threshold={threshold}, num_layers={num_layers}, ratio={ratio}: give exactly one "
                "of the three"
            )
        if threshold is None:
            check_depth_target(ratio, num_layers)
        elif not threshold <= 1:
            raise ValueError(f"threshold={threshold} must be at most 1, the dense model's own")
        self.threshold, self.num_layers, self.ratio = threshold, num_layers, ratio
        self.window, self.protected = window, list(protected or [])
        self.offload_activations, self.heal = offload_activations, heal

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError if the target is out of reach, TypeError if layers cannot be merged."""
        total, protected = len(decoder_layers(model)), self._protected(model)
        if self.window > total:
            raise ValueError(
                f"window={self.window} must be at most {total}, the decoder layers of the model"
            )
        target, most = self._target(total), most_removed(total, self.window, protected)
        if target is not None and target > most:
            raise ValueError(
                f"{target} of {total} layers to remove, but windows of {self.window} layers that "
                f"spare {sorted(protected)} remove at most {most}; remove fewer, or raise window"
            )
        check_mergeable(model, MERGE)

    def layers_left(self, total: int) -> int:
        """Return how many decoder layers stay; raise ValueError if too few may be removed."""
        if self.threshold is not None:
            return total
        return layers_left(total, self.ratio, self.num_layers, self.protected)

    @torch.no_grad()
    def plan(self, model: PreTrainedModel, windows: Windows) -> Plan:
        """Choose the windows to merge; the model is unchanged.

        Raises:
            ValueError: if the arguments or the windows do not fit the model.
            TypeError: if the model's layers cannot be merged, or run one by one.
        """
        check_weights(model)
        self.check(model)
        self.check_calibration(model, windows)
        total = len(decoder_layers(model))
        with VariantReplay(
            model, windows, "cosine", device=self.device, offload=self.offload_activations
        ) as replay:
            score = MergedVariants(replay, partial(merged_layer, model, merge=MERGE))
            best, threshold = self._best_pass(score, total, self._protected(model))
        if not best.groups and self.num_layers != 0:
            log.warning("threshold=%s merges no layer of %d", threshold, total)
        measured = {i: s for i, s in best.trace.items() if math.isfinite(s)}
        return self.make_plan(
            model,
            windows,
            MergeLayers(tuple((*range(a, b + 1),) for a, b in best.groups), MERGE),
            scores={"similarity_when_reached": [measured.get(i) for i in range(total)]},
            found={
                "threshold": threshold,
                "similarity": best.similarity,
                "variants_measured": replay.measurements,
                "layer_forwards": replay.layer_forwards,
            },
        )

    def _best_pass(
        self, score: MergedVariants, total: int, protected: set[int]
    ) -> tuple[SlidingPass, float]:
        """Return the pass to carry out, and its threshold."""
        target = self._target(total)
        budget = math.inf

        def run(threshold: float) -> SlidingPass:
            found = slide_fixed(
                score, total, threshold, self.window, protected=protected, target=target
            )
            score.budget = budget  # set after the first pass, which must reach the target
            return found

        if self.threshold is not None:
            return run(self.threshold), self.threshold
        if not target:
            return SlidingPass(), 1.0
        budget = (total - 2) * (total - target)  # as for `SlidingLayerMerging`
        return search_threshold(run, target)

    def _target(self, total: int) -> int | None:
        if self.threshold is not None:
            return None
        return layers_to_remove(self.ratio, self.num_layers, total)

    def _protected(self, model: PreTrainedModel) -> set[int]:
        """Return the layers that no window may contain; see `RemovableLayers.outside_windows`."""
        return removable_layers(model).outside_windows(self.protected)
