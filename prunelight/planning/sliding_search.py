"""The sliding loop of SLM (arXiv:2502.19159), and the search for a number of layers; no model here.

A window of decoder layers grows downwards while the merged model's similarity stays at or above a
threshold. Then the window is merged, and the next window starts where it stopped. The released loop
drops a window that still passes at the lowest layer, and measures each merged model twice. This
loop merges that window and measures once. It never takes a merge back: `swap_layers` does.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise, zip_longest
from typing import TypeAlias

log = logging.getLogger(__name__)

Groups: TypeAlias = tuple[tuple[int, int], ...]  # windows (lowest, highest), from the top down

_STEPS = 24  # of the bisection; more steps no longer separate two similarities


class BudgetExceededError(Exception):
    """The search has measured as many models as it may."""


@dataclass(frozen=True)
class SlidingPass:
    """One pass of the loop.

    Attributes:
        groups: windows to merge, from the top down.
        similarity: of the merged model to the dense model.
        margins: value that was compared with the threshold, for each accepted layer.
        refused: the largest value below the threshold; -inf if none was.
        trace: layer -> similarity when the window had grown down to this layer.
    """

    groups: Groups = ()
    similarity: float = 1.0
    margins: tuple[float, ...] = ()
    refused: float = -math.inf
    trace: dict[int, float] = field(default_factory=dict)

    @property
    def removed_layers(self) -> set[int]:
        """Return the layers that are merged into others."""
        return {layer for low, high in self.groups for layer in range(low, high)}


def slide(
    score: Callable[[Groups], float],
    num_layers: int,
    threshold: float,
    *,
    by_merge: bool = False,
    protected: Collection[int] = (),
    target: int | None = None,
) -> SlidingPass:
    """Pass once over the layers, from the top down.

    Args:
        score: returns the similarity to the dense model once these windows are merged.
        num_layers: number of decoder layers of the dense model.
        threshold: lowest similarity s that is accepted (the paper). With `by_merge`: lowest ratio
            of the similarities after and before one more layer is merged.
        by_merge: compare the threshold with s / s_before instead of s.
        protected: layers that no window may contain.
        target: stop once so many layers are removed, or can no longer be reached.
    """
    groups: Groups = ()
    accepted_similarity, refused = 1.0, -math.inf
    margins: list[float] = []
    trace: dict[int, float] = {}
    high, low = num_layers - 1, num_layers - 2  # the window is low .. high; low + 1 .. high passed
    while low >= 0 and len(margins) != target:
        if target is not None and low + 1 < target - len(margins):
            break  # the target is out of reach, and the lowest layers cost most to measure
        similarity = -math.inf
        if high not in protected and low not in protected:
            similarity = trace[low] = score((*groups, (low, high)))
        margin = similarity / max(accepted_similarity, 1e-6) if by_merge else similarity
        if margin >= threshold and similarity > -math.inf:
            margins.append(margin)
            accepted_similarity = similarity
            low -= 1
            continue
        refused = max(refused, margin)
        if low + 1 < high:
            groups = (*groups, (low + 1, high))
        high, low = low, low - 1
    if low + 1 < high:
        groups = (*groups, (low + 1, high))
    return SlidingPass(groups, accepted_similarity, tuple(margins), refused, trace)


def merge_windows(removed_layers: Collection[int]) -> Groups:
    """Return the windows, from the top down, whose merging removes these layers."""
    groups: list[tuple[int, int]] = []
    for layer in sorted(removed_layers, reverse=True):
        if groups and groups[-1][0] == layer + 1:
            groups[-1] = (layer, groups[-1][1])
        else:
            groups.append((layer, layer + 1))
    return tuple(groups)


def swap_layers(
    score: Callable[[Groups], float],
    start: SlidingPass,
    num_layers: int,
    protected: Collection[int] = (),
) -> SlidingPass:
    """Swap removed layers with kept ones; returns the more similar model, or `start` itself.

    Restores each removed layer once and removes each kept layer once, and measures these models.
    Then swaps the best pairs one after another, while the product of their two similarities
    promises a gain. Each model on the way is measured. For the arguments see `slide`; `score` may
    raise `BudgetExceededError`.
    """
    removed = start.removed_layers
    candidates = [
        layer
        for layer in range(num_layers - 2, -1, -1)
        if layer not in removed and not {layer, layer + 1} & {*protected}
    ]
    restored = {
        layer: score(merge_windows(removed - {layer})) for layer in sorted(removed, reverse=True)
    }
    merged = {layer: score(merge_windows(removed | {layer})) for layer in candidates}
    best = start
    for back, out in zip(
        sorted(restored, key=restored.__getitem__, reverse=True),
        sorted(merged, key=merged.__getitem__, reverse=True),
        strict=False,
    ):
        if merged[out] <= 0 or restored[back] * merged[out] <= start.similarity**2:
            break
        removed = (removed - {back}) | {out}
        similarity = score(merge_windows(removed))
        if similarity > best.similarity:
            best = replace(start, groups=merge_windows(removed), similarity=similarity)
    return best


def refine_by_swaps(
    score: Callable[[Groups], float],
    start: SlidingPass,
    out: Sequence[int],
    back: Sequence[int],
) -> list[SlidingPass]:
    """Swap few removed layers with few kept ones; returns each better model on the way, best last.

    Like `swap_layers`, but only the layers that are named are tried, and a search that may measure
    no more returns what it has.

    Args:
        score: as in `slide`; may raise `BudgetExceededError`.
        start: the removed layers to begin with, and their similarity.
        out: kept layers to remove instead, the most promising first.
        back: removed layers to restore, the most promising first.
    """
    removed, better = start.removed_layers, []
    restored: dict[int, float] = {}
    merged: dict[int, float] = {}
    try:
        # In turn, so that a spent budget leaves pairs.
        for one, other in zip_longest(back, out):
            if one is not None:
                restored[one] = score(merge_windows(removed - {one}))
            if other is not None:
                merged[other] = score(merge_windows(removed | {other}))
    except BudgetExceededError:
        log.debug(
            "%d and %d layers tried of %d and %d",
            len(restored),
            len(merged),
            *map(len, (back, out)),
        )
    best = start
    try:
        for one, other in zip(
            sorted(restored, key=restored.__getitem__, reverse=True),
            sorted(merged, key=merged.__getitem__, reverse=True),
            strict=False,
        ):
            if merged[other] <= 0 or restored[one] * merged[other] <= start.similarity**2:
                break
            trial = (removed - {one}) | {other}
            similarity = score(merge_windows(trial))
            if similarity > best.similarity:
                best = SlidingPass(merge_windows(trial), similarity)
                better.append(best)
                removed = trial
    except BudgetExceededError:
        log.debug("the budget is spent on swaps")
    return better


def max_removable_layers(num_layers: int, protected: Collection[int]) -> int:
    """Return how many layers the loop can remove at most: all but one of each unprotected run."""
    mergeable = [i not in protected for i in range(num_layers)]
    return sum(low and high for low, high in pairwise(mergeable))


def search_threshold(run: Callable[[float], SlidingPass], target: int) -> tuple[SlidingPass, float]:
    """Find the pass that removes exactly `target` layers and leaves the most similar model.

    The number of removed layers is not a monotone function of the threshold. So a pass stops once
    the target is reached: every threshold low enough reaches the target. Bisection looks for the
    highest such threshold. Of all passes that reach the target, the most similar model is returned.

    Args:
        run: makes one pass with a threshold, and stops at the target. Raises `BudgetExceededError`
            once it may measure no more, but not in the first pass.
        target: number of layers to remove; a threshold of -inf must reach it.

    Returns:
        The pass, and its threshold: the lowest margin that the pass accepted.

    Raises:
        ValueError: if similarities cannot be measured, so that no threshold reaches the target.
    """
    best = run(-math.inf)
    if len(best.removed_layers) < target:
        raise ValueError(
            f"{target} layers cannot be merged: what some of them leave has NaN states; load the "
            "model in bfloat16 or float32, or take merge='top'"
        )
    low, high = max(0.0, min(best.margins)), 1.0
    for _ in range(_STEPS):
        if high - low < 1e-4:
            break
        middle = (low + high) / 2
        try:
            trial = run(middle)
        except BudgetExceededError:
            break
        if len(trial.removed_layers) == target:
            low = max(middle, min(trial.margins))
            best = max(best, trial, key=lambda sliding_pass: sliding_pass.similarity)
        else:
            high = min(middle, max(trial.refused, low))
        log.debug("threshold in [%.4f, %.4f], similarity %.4f", low, high, best.similarity)
    return best, min(best.margins)
