"""The sliding loop of SLM (arXiv:2502.19159), and the search for a number of layers; no model here.

A window of decoder layers grows downwards while the similarity that is left stays at or above a
threshold, then is merged, and the next one starts where it stopped. The released loop loses a
window that still passes at the bottom and measures each merged model a second time; this one
commits the first and spares the second. The loop never takes a merge back: `swap_layers` does.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TypeAlias

log = logging.getLogger(__name__)

Groups: TypeAlias = tuple[tuple[int, int], ...]  # windows (lowest, highest), from the top down

_STEPS = 24  # of a bisection; more no longer part similarities


class BudgetExceededError(Exception):
    """The search may measure no more."""


@dataclass(frozen=True)
class SlidingPass:
    """One pass of the loop.

    Attributes:
        groups: windows to merge, from the top down.
        similarity: of the merged model.
        margins: what was held against the threshold for each layer that was accepted.
        refused: the largest that was refused; -inf if none was.
        trace: layer -> similarity when the window had grown down to it.
    """

    groups: Groups = ()
    similarity: float = 1.0
    margins: tuple[float, ...] = ()
    refused: float = -math.inf
    trace: dict[int, float] = field(default_factory=dict)

    @property
    def gone(self) -> set[int]:
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
        score: similarity to the dense model once these windows are merged.
        num_layers: of the dense model.
        threshold: lowest similarity that is accepted (the paper); with `by_merge` the lowest share
            of its similarity that one more layer may leave the model.
        by_merge: hold the threshold against s / s_before instead of s.
        protected: layers that no window may contain.
        target: stop as soon as so many layers are gone, or can no longer be.
    """
    groups: Groups = ()
    before, refused = 1.0, -math.inf
    margins: list[float] = []
    trace: dict[int, float] = {}
    high, low = num_layers - 1, num_layers - 2  # the window is low .. high; low + 1 .. high passed
    while low >= 0 and len(margins) != target:
        if target is not None and low + 1 < target - len(margins):
            break  # the lowest layers cost most to measure
        similarity = -math.inf
        if high not in protected and low not in protected:
            similarity = trace[low] = score((*groups, (low, high)))
        margin = similarity / max(before, 1e-6) if by_merge else similarity
        if margin >= threshold and similarity > -math.inf:
            margins.append(margin)
            before = similarity
            low -= 1
            continue
        refused = max(refused, margin)
        if low + 1 < high:
            groups = (*groups, (low + 1, high))
        high, low = low, low - 1
    if low + 1 < high:
        groups = (*groups, (low + 1, high))
    return SlidingPass(groups, before, tuple(margins), refused, trace)


def windows_of(gone: Collection[int]) -> Groups:
    """Return the windows, from the top down, whose merging takes these layers out of the model."""
    groups: list[tuple[int, int]] = []
    for layer in sorted(gone, reverse=True):
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
    """Let merged layers change places with others; returns the better model, or `start` itself.

    Each merged layer is restored once, each other one merged once. Pairs then change places, best
    first, as long as the product of what both leave promises a gain; each such model is measured.
    For the arguments see `slide`; `score` may raise `BudgetExceededError`.
    """
    gone = start.gone
    others = [
        layer
        for layer in range(num_layers - 2, -1, -1)
        if layer not in gone and not {layer, layer + 1} & {*protected}
    ]
    restored = {layer: score(windows_of(gone - {layer})) for layer in sorted(gone, reverse=True)}
    merged = {layer: score(windows_of(gone | {layer})) for layer in others}
    best = start
    for back, out in zip(
        sorted(restored, key=restored.__getitem__, reverse=True),
        sorted(merged, key=merged.__getitem__, reverse=True),
        strict=False,
    ):
        if merged[out] <= 0 or restored[back] * merged[out] <= start.similarity**2:
            break
        gone = (gone - {back}) | {out}
        similarity = score(windows_of(gone))
        if similarity > best.similarity:
            best = replace(start, groups=windows_of(gone), similarity=similarity)
    return best


def most_removable(num_layers: int, protected: Collection[int]) -> int:
    """Return how many layers the loop can remove at most: all but one of each unprotected run."""
    free = [i not in protected for i in range(num_layers)]
    return sum(low and high for low, high in pairwise(free))


def search_threshold(run: Callable[[float], SlidingPass], target: int) -> tuple[SlidingPass, float]:
    """Find the pass that removes exactly `target` layers and leaves the most similar model.

    How many layers a threshold removes is no monotone function of it. So a pass stops once the
    target is reached: every threshold low enough leads to it, and the lowest always does. Bisection
    goes for the highest such threshold; of all passes that reached the target the best one counts.

    Args:
        run: makes one pass with a threshold, and stops at the target. Except in the first pass it
            raises `BudgetExceededError` once no more may be measured.
        target: layers to remove; the lowest threshold must reach it.

    Returns:
        The pass, and its threshold: the lowest margin that it accepted.

    Raises:
        ValueError: if similarities cannot be measured, so that the lowest threshold falls short.
    """
    best = run(-math.inf)
    if len(best.gone) < target:
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
            found = run(middle)
        except BudgetExceededError:
            break
        if len(found.gone) == target:
            low = max(middle, min(found.margins))
            best = max(best, found, key=lambda slide: slide.similarity)
        else:
            high = min(middle, max(found.refused, low))
        log.debug("threshold in [%.4f, %.4f], similarity %.4f", low, high, best.similarity)
    return best, min(best.margins)
