"""A search for the layers to merge that costs at most a given number of forwards.

The calibration windows are parted: every second window searches, the others judge. Two sets of
layers cost no forward beyond the model's own: those of lowest Block Influence, as ShortGPT removes
them, and what the sliding loop finds where a window's similarity is the cosine of the model's
states before its lowest and its highest layer. The better one is refined by swaps on the windows
that search. On the windows that judge, what was found must beat ShortGPT's set by more than chance,
else that set is taken. So the result can hardly lose to ShortGPT on other text.
"""

# N windows, T tokens, L layers

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunelight.calibration.shared_windows import SharedWindows
from prunelight.calibration.statistics import MeanCosine
from prunelight.calibration.windows import Windows, counted_positions, split_windows
from prunelight.models.families.layers import decoder_layers
from prunelight.planning.sliding_search import (
    BudgetExceededError,
    Groups,
    SlidingPass,
    merge_windows,
    refine_by_swaps,
    search_threshold,
    slide,
)
from prunelight.scoring.model_variants import MergedVariants, VariantReplay

log = logging.getLogger(__name__)

# Of the model over all calibration windows, head included, as layers count. Losses and smaller
# batches take a tenth more by the clock, which makes 10. With 8.5, searches for nine layers of
# SmolLM2 end at ShortGPT's.
MOST_FORWARDS = 9
_JUDGED = 3  # sets that are compared on the windows that judge
_SPARE = 4  # kept layers that a round of swaps tries beyond the number of removed ones
_FEWEST_TOKENS = 8  # that a part of the windows must predict
# Nats by which losses of two sets differ at a token, standard deviation: 1.2 to 2.7 on SmolLM2.
# Over n tokens that is a standard error of 1.5 / sqrt(n), and a set must be better by more.
_DEVIATION = 1.5
# How often a criterion has run the head, or as much, before the first variant is measured.
_DENSE_HEADS = {"nll": 1, "kl": 3}


def part_windows(windows: Windows, ignore_first_tokens: int) -> tuple[Windows, Windows | None]:
    """Return the windows that search and those that judge: the even and the odd rows.

    The second is None, and the first all windows, where a part would hold fewer than 8 tokens that
    count or fewer windows than there are processes.
    """
    ids, mask = split_windows(windows)
    counted = counted_positions(mask, ids.shape, ignore_first_tokens)
    counted = torch.ones_like(ids, dtype=torch.bool) if counted is None else counted
    predicted = (counted[:, :-1] & counted[:, 1:]).sum(1)
    processes = windows.group.size if isinstance(windows, SharedWindows) else 1
    parts = [_rows(windows, slice(start, None, 2)) for start in (0, 1)]
    if (
        len(ids) < 2 * processes
        or min(int(predicted[start::2].sum()) for start in (0, 1)) < _FEWEST_TOKENS
    ):
        return windows, None
    return (
        (SharedWindows(parts[0], windows.group), SharedWindows(parts[1], windows.group))
        if isinstance(windows, SharedWindows)
        else (parts[0], parts[1])
    )


def _rows(windows: Windows, rows: slice) -> Tensor | dict[str, Tensor]:
    if isinstance(windows, Tensor):
        return windows[rows]
    return {name: value[rows] for name, value in windows.items()}


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        best: the windows to merge, and the similarity over all calibration windows.
        influences: Block Influence of each layer; None for those that cannot be merged.
        facts: of the plan: where the set comes from, and what the search cost.
    """

    best: SlidingPass
    influences: list[float | None]
    facts: dict[str, Any]


class BoundedSearch:
    """The search; for the arguments see `VariantReplay` and `MergedVariants`.

    Args:
        replays: entered, over the windows that search and, if there are any, those that judge.
        merged_layer: returns the layer that replaces the decoder layers of a group.
        protected: layers that no group may contain.
    """

    def __init__(
        self,
        replays: Sequence[VariantReplay],
        merged_layer: Callable[[Sequence[int]], nn.Module],
        protected: Collection[int],
    ) -> None:
        self._replays, self._protected = replays, {*protected}
        model = replays[0].walk.model
        self._total = len(replays[0].layers)
        heads = _DENSE_HEADS.get(replays[0].criterion, 0)
        self._head_cost = _head_in_layers(model) if heads else 0.0
        costs = (self._head_cost, heads * self._head_cost)
        self._score = [MergedVariants(replay, merged_layer, *costs) for replay in replays]
        sizes = [split_windows(r.walk.windows)[0].numel() for r in replays]
        self._shares = [size / sum(sizes) for size in sizes]
        self._cosines: dict[tuple[int, int], float] = {}
        for layer in self._mergeable():  # while the replays still hold the dense model's states
            self._cosine(layer, layer + 1)

    @property
    def forwards(self) -> float:
        """Return the cost so far, in forwards of the model over all calibration windows."""
        spent = sum(s * score.spent for s, score in zip(self._shares, self._score, strict=True))
        return spent / (self._total + self._head_cost)

    def run(self, target: int) -> Found:
        """Return the best set of `target` layers.

        Raises:
            ValueError: if that many layers cannot be merged, because states become NaN.
        """
        search = self._score[0]
        lowest = merge_windows(self._lowest(target))
        slid = self._slid(target)
        self._allow(MOST_FORWARDS - self._cost_of_judging(target))
        starts = {"block_influence": lowest} | ({} if slid == lowest else {"sliding": slid})
        origins = {groups: name for name, groups in starts.items()}
        passes = [SlidingPass(groups, search(groups)) for groups in starts.values()]
        start = max(passes, key=lambda one: one.similarity)
        if start.similarity == -math.inf:
            search.budget = math.inf  # what can be merged at all must be found out
            protected = self._protected
            start, _ = search_threshold(
                lambda t: slide(search, self._total, t, protected=protected, target=target), target
            )
        found = self._refined(start, target)
        best = self._judged(passes[0], [start, *found])
        facts = {
            "chosen": origins.get(best.groups, "swaps"),
            "block_influence_layers": sorted(passes[0].removed_layers),
            "forwards": round(self.forwards, 2),
            "windows_that_judge": len(self._replays) > 1,
        }
        mergeable = {*self._mergeable()}
        influences = [
            1 - self._cosine(layer, layer + 1) if layer in mergeable else None
            for layer in range(self._total)
        ]
        return Found(best, influences, facts)

    def _allow(self, forwards: float) -> None:
        """Let the windows that search spend so many forwards, less what the others have."""
        of_others = sum(
            s * score.spent for s, score in zip(self._shares[1:], self._score[1:], strict=True)
        )
        whole = forwards * (self._total + self._head_cost)
        self._score[0].budget = (whole - of_others) / self._shares[0]

    def _cost_of_judging(self, target: int) -> float:
        if len(self._replays) == 1:
            return 0.0
        left = self._total - target
        return (
            _JUDGED * self._shares[1] * (left + self._head_cost) / (self._total + self._head_cost)
        )

    def _mergeable(self) -> list[int]:
        """Return the layers that can be merged into the next, in order."""
        return [i for i in range(self._total - 1) if not {i, i + 1} & self._protected]

    def _lowest(self, target: int) -> set[int]:
        """Return the layers of lowest Block Influence."""
        return {*self._by_influence(self._mergeable())[:target]}

    def _by_influence(self, layers: Iterable[int]) -> list[int]:
        """Return layers by Block Influence, the lowest first."""
        return sorted(layers, key=lambda layer: -self._cosine(layer, layer + 1))

    def _cosine(self, low: int, high: int) -> float:
        """Return the mean cosine of the dense model's states before these two layers.

        Each is asked for before a replay gets another present variant.
        """
        if (low, high) not in self._cosines:
            mean = MeanCosine()
            for replay in self._replays:
                masks = replay.walk.positions(replay.ignore_first_tokens)
                states = (replay.inputs[low], replay.inputs[high])
                for x, y, mask in zip(*states, masks, strict=True):
                    mean.update(x, y, mask.to(x.device), None)
            self._cosines[low, high] = mean.pool(self._replays[0].walk.group).result()
        return self._cosines[low, high]

    def _slid(self, target: int) -> Groups:
        """Return what the sliding loop finds where cosines of the dense model's states score."""

        def score(groups: Groups) -> float:
            return math.prod(max(self._cosine(low, high), 0.0) for low, high in groups)

        found, _ = search_threshold(
            lambda threshold: slide(
                score,
                self._total,
                threshold,
                by_merge=True,
                protected=self._protected,
                target=target,
            ),
            target,
        )
        return found.groups

    def _refined(self, start: SlidingPass, target: int) -> list[SlidingPass]:
        """Return better and better sets, by rounds of swaps until nothing improves or can."""
        search = self._score[0]
        found: list[SlidingPass] = []
        best = start
        while True:
            try:
                search.rebase(best.groups)
            except BudgetExceededError:
                return found
            removed = best.removed_layers
            out = self._by_influence(i for i in self._mergeable() if i not in removed)
            back = self._by_influence(removed)[::-1]
            better = refine_by_swaps(search, best, out[: target + _SPARE], back)
            if not better:
                return found
            found += better
            best = better[-1]

    def _judged(self, plain: SlidingPass, found: Sequence[SlidingPass]) -> SlidingPass:
        """Return the best on the windows that judge: of ShortGPT's set and the last ones found."""
        last = sorted(found, key=lambda one: one.similarity)[-(_JUDGED - 1) :]
        sets = {one.groups: one for one in (plain, *last) if one.similarity > -math.inf}
        if len(self._replays) == 1:
            return max(sets.values(), key=lambda one: one.similarity)
        judge = self._score[1]
        judged = {groups: judge(groups) for groups in sets}
        best = max(judged, key=judged.__getitem__)
        if plain.groups in judged and judged[best] <= judged[plain.groups] * self._chance():
            best = plain.groups
        both = (sets[best].similarity, judged[best])
        return replace(sets[best], similarity=self._over_all(both))

    def _chance(self) -> float:
        """Return how many times better than another a set can be by chance where windows judge."""
        judge = self._replays[1]
        if judge.criterion not in _DENSE_HEADS:
            return 1.0
        tokens = _weight(judge.walk.windows, judge.criterion, judge.ignore_first_tokens)
        return math.exp(_DEVIATION / math.sqrt(tokens))

    def _over_all(self, similarities: Sequence[float]) -> float:
        """Return the similarity over all windows, of those over each part."""
        replay = self._replays[0]
        weights = [
            _weight(r.walk.windows, r.criterion, r.ignore_first_tokens) for r in self._replays
        ]
        if replay.criterion not in _DENSE_HEADS:
            pairs = zip(weights, similarities, strict=True)
            return sum(w * s for w, s in pairs) / sum(weights)
        if min(similarities) <= 0:
            return 0.0
        pairs = zip(weights, map(math.log, similarities), strict=True)
        return math.exp(sum(w * s for w, s in pairs) / sum(weights))


def _weight(windows: Windows, criterion: str, ignore_first_tokens: int) -> int:
    """Return over how many tokens, or for "cosine_flat" windows, a criterion takes its mean."""
    ids, mask = split_windows(windows)
    counted = counted_positions(mask, ids.shape, ignore_first_tokens)
    counted = torch.ones_like(ids, dtype=torch.bool) if counted is None else counted
    if criterion == "cosine_flat":
        return int(counted.any(1).sum())
    if criterion == "nll":
        counted = counted[:, :-1] & counted[:, 1:]
    return int(counted.sum())


def _head_in_layers(model: PreTrainedModel) -> float:
    """Return what the head costs, in forwards of a mean decoder layer, by their parameters."""
    head: Any = model.get_output_embeddings()
    layers = decoder_layers(model)
    of_layers = sum(p.numel() for layer in layers for p in layer.parameters())
    return sum(p.numel() for p in head.parameters()) * len(layers) / max(1, of_layers)
