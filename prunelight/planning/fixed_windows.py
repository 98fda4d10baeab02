"""LaCo's loop over windows of a fixed number of decoder layers (arXiv:2402.11187); no model here.

A window slides down from the highest layers. It is merged where the merged model stays similar to
the dense one; otherwise it moves down by a layer. The next window ends below a merged one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

from prunelight.planning.sliding_search import Groups, SlidingPass


def slide_fixed(
    score: Callable[[Groups], float],
    num_layers: int,
    threshold: float,
    size: int,
    *,
    protected: Collection[int] = (),
    target: int | None = None,
) -> SlidingPass:
    """Make one pass over windows of `size` layers, from the top down.

    Args:
        score: similarity of the model with some groups merged.
        num_layers: of the model.
        threshold: lowest similarity of the merged model to the dense one.
        size: layers of a window, at least 2.
        protected: layers that no window may contain.
        target: stop when so many layers are removed. The last window is then as small as need be.

    Returns:
        The pass; its trace has the lowest layer of each window that was measured.
    """
    groups: Groups = ()
    margins: list[float] = []
    refused, similarity, removed, high = -math.inf, 1.0, 0, num_layers - 1
    trace: dict[int, float] = {}
    while target is None or removed < target:
        length = size if target is None else min(size, target - removed + 1, high + 1)
        low = high - length + 1
        if low < 0 or length < 2:
            break
        if blocked := [layer for layer in range(low, high + 1) if layer in protected]:
            high = max(blocked) - 1
            continue
        trace[low] = found = score((*groups, (low, high)))
        if found >= threshold:
            groups, similarity = (*groups, (low, high)), found
            margins.append(found)
            removed, high = removed + length - 1, low - 1
        else:
            refused, high = max(refused, found), high - 1
    return SlidingPass(groups, similarity, tuple(margins), refused, trace)


def most_removed(num_layers: int, size: int, protected: Collection[int]) -> int:
    """Return the most layers that windows of `size` layers and one smaller window can remove."""
    reached = 0
    for target in range(1, num_layers):
        found = slide_fixed(
            lambda groups: 1.0, num_layers, 0.0, size, protected=protected, target=target
        )
        reached = max(reached, len(found.removed_layers))
    return reached
