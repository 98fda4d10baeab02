"""Remove decoder layers so that the rest still follows the family's pattern of layers.

Some families alternate kinds of layers: five with a sliding window and one without (Gemma 3), every
fourth without RoPE (SmolLM3). Some engines know this rule and ignore what the config lists. Such an
engine reads a shorter model right only if the layers that stay follow the rule for their number.
Kinds are any values that can be compared; nothing here knows a model or an engine.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence

from prunelight.planning.layer_choice import lowest_scores

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


def pattern_fits(kinds: Sequence[Hashable], pattern: Pattern, count: int) -> list[list[bool]]:
    """Return where a layer may stay so that the rest follows the pattern, for `lowest_scores`.

    Args:
        kinds: kind of each layer of the dense model.
        pattern: gives the kinds that an engine derives for a number of layers.
        count: how many layers go.

    Returns:
        [i][k]: whether layer i can stay when k layers below it go.
    """
    target = list(pattern(len(kinds) - count))
    return [
        [0 <= i - k < len(target) and kind == target[i - k] for k in range(count + 1)]
        for i, kind in enumerate(kinds)
    ]


def counts_that_keep_pattern(
    kinds: Sequence[Hashable], pattern: Pattern, protected: Collection[int] = ()
) -> list[int]:
    """Return how many layers can go so that the rest follows the pattern, ascending."""
    possible = []
    for count in range(len(kinds)):
        try:
            lowest_scores([0.0] * len(kinds), count, protected, pattern_fits(kinds, pattern, count))
        except ValueError:
            continue
        possible.append(count)
    return possible
