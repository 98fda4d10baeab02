"""Remove decoder layers so that the rest still follows the family's pattern of layers.

Some families alternate kinds of layers: five with a sliding window and one without (Gemma 3), every
fourth without RoPE (SmolLM3). Some engines know this rule and ignore what the config lists. Such an
engine reads a shorter model right only if the layers that stay follow the rule for their number.
Kinds are any values that can be compared; nothing here knows a model or an engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Sequence
from fractions import Fraction

from prunelight.planning.layer_choice import resolve_indices

# Number of layers -> the kind of each layer of a model of that depth.
Pattern = Callable[[int], Sequence[Hashable]]


def keeps_pattern(kinds: Sequence[Hashable], removed: Collection[int], pattern: Pattern) -> bool:
    """Return whether the layers that stay follow the pattern for their number.

    Args:
        kinds: kind of each layer of the dense model.
        removed: indices of the layers that go.
        pattern: gives the kinds that an engine derives for a number of layers.
    """
    stay = [kind for i, kind in enumerate(kinds) if i not in removed]
    return stay == list(pattern(len(stay)))


def counts_that_keep_pattern(
    kinds: Sequence[Hashable], pattern: Pattern, protected: Collection[int] = ()
) -> list[int]:
    """Return how many layers can go so that the rest follows the pattern, ascending."""
    protected = resolve_indices(protected, len(kinds))
    costs = [None if i in protected else Fraction(0) for i in range(len(kinds))]
    return [
        count
        for count in range(len(kinds))
        if _cheapest(costs, kinds, list(pattern(len(kinds) - count))) is not None
    ]


def lowest_keeping_pattern(
    scores: Sequence[float],
    count: int,
    kinds: Sequence[Hashable],
    pattern: Pattern,
    protected: Collection[int] = (),
) -> list[int]:
    """Return the layers with the lowest sum of scores whose removal keeps the pattern, ascending.

    Of equal sums the choice with the lower indices is taken. Where all kinds are equal this is
    `layer_choice.lowest_scores`. The cost is `len(scores) ** 2` small sums.

    Args:
        scores: one per layer; low means dispensable.
        count: how many layers to remove.
        kinds: kind of each layer of the dense model.
        pattern: gives the kinds that an engine derives for a number of layers.
        protected: layers that stay; their scores are not read.

    Raises:
        ValueError: if a score is not finite, a protected index does not exist, or no set of so many
            layers keeps the pattern; names the counts that can.
    """
    protected = resolve_indices(protected, len(scores))
    infinite = [i for i, x in enumerate(scores) if i not in protected and not math.isfinite(x)]
    if infinite:
        raise ValueError(
            f"scores[{infinite[0]}]={scores[infinite[0]]} must be finite to compare sets of layers;"
            f" protect layer {infinite[0]}"
        )
    # Fractions add without rounding: equal sums are equal, whatever the order.
    costs = [None if i in protected else Fraction(x) for i, x in enumerate(scores)]
    removed = None
    if 0 <= count < len(scores):
        removed = _cheapest(costs, kinds, list(pattern(len(scores) - count)))
    if removed is None:
        possible = counts_that_keep_pattern(kinds, pattern, protected)
        besides = f" beside protected={sorted(protected)}" if protected else ""
        raise ValueError(
            f"no {count} of {len(scores)} layers can go{besides} so that the rest follows the "
            f"family's pattern of layers; counts that can: {', '.join(map(str, possible))}. "
            "Remove so many, or do not keep the pattern"
        )
    return removed


def _cheapest(
    costs: Sequence[Fraction | None], kinds: Sequence[Hashable], target: Sequence[Hashable]
) -> list[int] | None:
    """Return the cheapest layers to remove so that `target` stays; None if there are none.

    Args:
        costs: of removing each layer; None for a layer that must stay.
        kinds: kind of each layer.
        target: kinds of the layers that stay, in order.
    """
    total, size = len(kinds), len(target)
    # rest[i][k]: cheapest way from layer i on, where target[:k] stands already; None if no way.
    rest: list[list[Fraction | None]] = [[None] * (size + 1) for _ in range(total + 1)]
    rest[total][size] = Fraction(0)

    def choices(layer: int, place: int) -> tuple[Fraction | None, Fraction | None]:
        """Cost from `layer` on if it goes, and if it stays."""
        cost, after = costs[layer], rest[layer + 1][place]
        goes = None if cost is None or after is None else cost + after
        fits = place < size and kinds[layer] == target[place]
        return goes, rest[layer + 1][place + 1] if fits else None

    for layer in reversed(range(total)):
        for place in range(size + 1):
            ways = [way for way in choices(layer, place) if way is not None]
            rest[layer][place] = min(ways, default=None)
    if rest[0][0] is None:
        return None
    removed: list[int] = []
    for layer in range(total):
        goes, stays = choices(layer, layer - len(removed))
        if goes is not None and (stays is None or goes <= stays):
            removed.append(layer)
    return removed
