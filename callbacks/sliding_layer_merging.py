"""SLM: merge neighbouring decoder layers in a window that slides from the top (arXiv:2502.19159).

The window grows downwards while the merged model stays similar enough to the dense one. A threshold
says how similar. With a target number of layers, the threshold is searched for. The released code
copies the whole model for each candidate, keeps only the highest layer's projections, and has no
target. sliding_search.py and merge_layers.py say what differs here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Literal

import torch
from transformers import PreTrainedModel

from prunelight.calibration.cka import CKA
from prunelight.calibration.windows import Windows, check_ignored
from prunelight.callbacks.base import Healing, PruningCallback
from prunelight.models.families.layers import decoder_layers
from prunelight.models.families.removable import removable_layers
from prunelight.planning.layer_choice import (
    check_depth_target,
    layers_left,
    layers_to_remove,
)
from prunelight.planning.plan import Plan
from prunelight.planning.sliding_search import (
    BudgetExceededError,
    SlidingPass,
    max_removable_layers,
    search_threshold,
    slide,
    swap_layers,
)
from prunelight.planning.steps import MergeLayers
from prunelight.pruning.merge_layers import check_mergeable, merged_layer
from prunelight.runtime.arguments import at_least, checked, within
from prunelight.runtime.finite import check_weights
from prunelight.scoring.bounded.search import BoundedSearch, part_windows
from prunelight.scoring.model_variants import MergedVariants, VariantReplay

log = logging.getLogger(__name__)


class SlidingLayerMerging(PruningCallback):
    """Merge windows of decoder layers, from the top down.

    Args:
        num_layers: how many layers to remove; give exactly one of the first three arguments.
        ratio: share of the decoder layers to remove, in [0, 1).
        threshold: lowest similarity to the dense model, at most 1 (see `criterion`).
        merge: "top" keeps a window's highest layer whole, "difference_sum" is the paper's sum of
            differences, "released" the merge of the released code, "mean" the mean of all weights.
            "lowest" keeps the lowest layer whole; the released code's ablation calls this "delete".
        criterion: similarity of two models: "cosine_flat" is the cosine of their final hidden
            states, each sequence flattened to one vector (the paper), "cosine" its mean over
            tokens. "cka" is that of the final hidden states, "kl" is exp(-KL) and "nll" the ratio
            of their perplexities.
        limit: what the threshold limits: "model" the similarity of the merged model (the paper),
            "merge" the ratio of the similarities after and before one more layer is merged. None
            takes "model" with a threshold and "merge" with a target. "merge" spreads the loss over
            the depth; "model" spends it on the highest layers, which are merged first. With
            "merge" and a target, removed layers are then swapped with others where that makes the
            model more similar; `search` says at what cost.
        ignore_first_tokens: tokens at the start of each window that do not count, for models with
            attention sinks there.
        protected: layers that no window may contain; None protects the last one, as the paper does.
        offload_activations: keep the hidden states on the CPU: num_samples * seq_len * hidden_size
            * (layers + 1) numbers.
        search: how a target is reached. "sliding" searches for the threshold of the paper's loop,
            in 30 to 70 forwards of the model. "swaps" takes at most 10 forwards; it starts from
            ShortGPT's layers or from the loop over cosines, and keeps ShortGPT's unless windows
            that the search has not seen say otherwise. None takes "swaps" with limit "merge".
        heal: "linear" then fits weights anew, in closed form, to the dense model's hidden states;
            "layer" trains whole layers to them too, one at a time. See docs/healing.md. Both need 2
            calibration windows or more.

    Raises:
        ValueError: if an argument is out of its range, or has no effect.
    """

    @checked(ratio=within(0, 1), num_layers=at_least(0), ignore_first_tokens=at_least(0))
    def __init__(
        self,
        num_layers: int | None = None,
        ratio: float | None = None,
        threshold: float | None = None,
        merge: Literal["top", "difference_sum", "released", "mean", "lowest"] = "top",
        criterion: Literal["cosine", "cka", "kl", "nll", "cosine_flat"] = "nll",
        limit: Literal["model", "merge"] | None = None,
        ignore_first_tokens: int = 0,
        protected: list[int] | None = None,
        offload_activations: bool = False,
        search: Literal["swaps", "sliding"] | None = None,
        heal: Healing = "none",
    ) -> None:
        if [num_layers, ratio, threshold].count(None) != 2:
            raise ValueError(
                f"num_layers={num_layers}, ratio={ratio}, threshold={threshold}: give exactly one "
                "of the three"
            )
        if threshold is None:
            check_depth_target(ratio, num_layers)
        elif not threshold <= 1:
            raise ValueError(f"threshold={threshold} must be at most 1, the dense model's own")
        self.num_layers, self.ratio, self.threshold = num_layers, ratio, threshold
        self.merge, self.criterion = merge, criterion
        self.limit = limit or ("merge" if threshold is None else "model")
        self.ignore_first_tokens = ignore_first_tokens
        self.protected = [-1] if protected is None else list(protected)
        self.offload_activations = offload_activations
        self.search, self.heal = search, heal
        swaps = threshold is None and self.limit == "merge"
        if search == "swaps" and not swaps:
            raise ValueError(
                f"search='swaps' has no effect with threshold={threshold}, limit={self.limit!r}; "
                "give num_layers or ratio with limit='merge', or leave it out"
            )
        self._swaps = swaps and search != "sliding"

    @property
    def version(self) -> int:  # type: ignore[override]
        """Return 2 where the layers are searched for in another way than before."""
        return 2 if self._swaps else 1

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError if the target is out of reach, TypeError if layers cannot be merged."""
        total = len(decoder_layers(model))
        protected = self._protected(model)
        most, target = max_removable_layers(total, protected), self._target(total)
        if target is not None and target > most:
            raise ValueError(
                f"{target} of {total} layers to remove, but windows that spare protected="
                f"{sorted(protected)} can remove at most {most}; remove fewer or protect fewer"
            )
        check_mergeable(model, self.merge)

    def layers_left(self, total: int) -> int:
        """Return how many decoder layers stay; raise ValueError if too few may be removed."""
        if self.threshold is not None:
            return total
        return layers_left(total, self.ratio, self.num_layers, self.protected)

    def check_calibration(self, model: PreTrainedModel, windows: Windows) -> None:
        """Raise ValueError if the model cannot read the windows, or no token of them counts."""
        super().check_calibration(model, windows)
        check_ignored(windows, self.ignore_first_tokens)

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
        protected = self._protected(model)
        if self._swaps and self._target(len(decoder_layers(model))):
            return self._plan_by_swaps(model, windows, protected)
        with self._replay(model, windows) as replay:
            cka = self._cka([replay])
            merge = partial(merged_layer, model, merge=self.merge)
            score, total = MergedVariants(replay, merge), len(replay.layers)
            searched, threshold = self._best_pass(score, total, protected)
            best = searched
            if self.threshold is None and self.limit == "merge" and searched.groups:
                best = self._swap_until_spent(score, searched, total, protected)
        if not best.groups and self.num_layers != 0:
            given = f"ratio={self.ratio}" if self.threshold is None else f"threshold={threshold}"
            log.warning("%s merges no layer of %d", given, total)
        measured = {i: s for i, s in best.trace.items() if math.isfinite(s)}
        return self.make_plan(
            model,
            windows,
            MergeLayers(tuple((*range(a, b + 1),) for a, b in best.groups), self.merge),
            scores={"similarity_when_reached": [measured.get(i) for i in range(total)]},
            found={
                "threshold": threshold,
                "limit": self.limit,
                "similarity": best.similarity,
                **_swapped_layers(searched, best),
                "variants_measured": replay.measurements,
                "layer_forwards": replay.layer_forwards,
                **cka,
            },
        )

    def _plan_by_swaps(
        self, model: PreTrainedModel, windows: Windows, protected: Collection[int]
    ) -> Plan:
        parts = [
            part for part in part_windows(windows, self.ignore_first_tokens) if part is not None
        ]
        with ExitStack() as stack:
            replays = [stack.enter_context(self._replay(model, part)) for part in parts]
            cka, total = self._cka(replays), len(replays[0].layers)
            merge = partial(merged_layer, model, merge=self.merge)
            target = self._target(total)
            assert target is not None
            found = BoundedSearch(replays, merge, protected).run(target)
        measurements = sum(replay.measurements for replay in replays)
        return self.make_plan(
            model,
            windows,
            MergeLayers(tuple((*range(a, b + 1),) for a, b in found.best.groups), self.merge),
            scores={"block_influence": found.influences},
            found={
                "limit": self.limit,
                "similarity": found.best.similarity,
                **found.facts,
                "variants_measured": measurements,
                **cka,
            },
        )

    def _replay(self, model: PreTrainedModel, windows: Windows) -> VariantReplay:
        return VariantReplay(
            model,
            windows,
            self.criterion,
            ignore_first_tokens=self.ignore_first_tokens,
            device=self.device,
            offload=self.offload_activations,
            expected_forwards=self._most_forwards(len(decoder_layers(model))),
        )

    def _most_forwards(self, total: int) -> int | None:
        """Return how many layer forwards the search may take; None if it has no budget."""
        target = self._target(total)
        if not target or self._swaps:
            return None
        merged = self.limit == "merge"
        return total + (total - 2) * (total - 1 if merged else total - target)

    def _target(self, total: int) -> int | None:
        if self.threshold is not None:
            return None
        return layers_to_remove(self.ratio, self.num_layers, total)

    def _protected(self, model: PreTrainedModel) -> set[int]:
        """Return the layers that no window may contain; see `RemovableLayers.outside_windows`."""
        return removable_layers(model).outside_windows(self.protected)

    def _best_pass(
        self, score: MergedVariants, total: int, protected: Collection[int]
    ) -> tuple[SlidingPass, float]:
        """Return the best pass of the sliding loop, and its threshold."""
        target = self._target(total)

        def run(threshold: float) -> SlidingPass:
            by_merge = self.limit == "merge"
            sliding_pass = slide(
                score, total, threshold, by_merge=by_merge, protected=protected, target=target
            )
            score.budget = budget  # set after the first pass, which must reach the target
            return sliding_pass

        if self.threshold is not None:
            budget = math.inf
            return run(self.threshold), self.threshold
        if target == 0:
            return SlidingPass(), 1.0
        assert target is not None
        # The least cost of a loop that runs the whole model for each window.
        budget = (total - 2) * (total - target)
        if self.limit == "merge":
            # Minus one round of swaps. The sum of the removed layers lowers both costs and cancels.
            budget = (total - 1) * (total / 2 - 2) - total - target
        return search_threshold(run, target)

    def _swap_until_spent(
        self, score: MergedVariants, best: SlidingPass, total: int, protected: Collection[int]
    ) -> SlidingPass:
        """Swap removed layers with kept ones until nothing improves or the budget is spent."""
        # The cost of a loop that runs the whole model for each window, up to these merges.
        score.budget = total + (total - 2) * (total - 1) - sum(best.removed_layers)
        try:
            while True:
                score.rebase(best.groups)
                better = swap_layers(score, best, total, protected)
                if better is best:
                    return best
                best = better
        except BudgetExceededError:
            return best

    def _cka(self, replays: Sequence[VariantReplay]) -> dict[str, list[list[float]]]:
        """Return {"cka": matrix of all L + 1 hidden states} for the picture, {} if CKA fails.

        The first token is left out: where it is an attention sink, it dominates the linear kernel.
        """
        cka = CKA(len(replays[0].inputs))
        for replay in replays:
            positions = replay.walk.positions(max(1, self.ignore_first_tokens))
            for batch, where in enumerate(positions):
                cka.update(
                    states[batch][where.to(states[batch].device)] for states in replay.inputs
                )
        cka.pool(replays[0].walk.group)
        try:
            return {"cka": [[round(x, 4) for x in row] for row in cka.result().tolist()]}
        except ValueError as error:
            log.warning("no CKA map: %s", error)
            return {}


def _swapped_layers(before: SlidingPass, after: SlidingPass) -> dict[str, list[int]]:
    """Return which layers were swapped, as facts of the plan; {} if none were."""
    old, new = before.removed_layers, after.removed_layers
    if old == new:
        return {}
    return {"restored": sorted(old - new), "merged_instead": sorted(new - old)}
