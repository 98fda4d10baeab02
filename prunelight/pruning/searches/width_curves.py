"""What it costs in KL to take neurons from each layer's MLP alone, and how to spend a budget on it.

Each decoder layer is narrowed to a few widths, its output projection fitted anew, and the KL to the
dense model is measured with all other layers whole. Between the widths KL is
taken to be linear. KL of several layers is taken to add up, which holds for small changes alone: so
what is chosen here is measured as a whole before it is taken.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise

import torch

from prunelight.planning.steps import PruneWidth
from prunelight.pruning.searches.costs import LayerCosts
from prunelight.pruning.searches.healed_variants import HealedVariants

LEVELS = (0.75, 0.5, 0.25, 0.125)  # shares of its neurons that a layer keeps

Curve = Sequence[tuple[int, float]]  # (neurons that go, KL), from (0, 0) on


@torch.no_grad()
def width_curves(variants: HealedVariants, neurons: Sequence[int], multiple: int) -> list[Curve]:
    """Return the curve of each decoder layer.

    Args:
        variants: of the dense model, of which nothing is gone.
        neurons: of each layer.
        multiple: what numbers of neurons that stay are multiples of.
    """
    curves: list[Curve] = []
    for layer, total in enumerate(neurons):
        rounded = (max(multiple, round(total * share / multiple) * multiple) for share in LEVELS)
        counts = [count for count in dict.fromkeys(rounded) if count < total]
        divergences = variants.divergences_with(layer, counts)
        points = [
            (total - count, max(0.0, kl)) for count, kl in zip(counts, divergences, strict=True)
        ]
        curves.append([(0, 0.0), *((gone, kl) for gone, kl in points if math.isfinite(kl))])
    return curves


def neurons_kept(
    order: Sequence[Sequence[int]], kept: Mapping[int, int], *, correction: bool
) -> PruneWidth:
    """Return the step that keeps the best neurons of layers.

    Args:
        order: neurons of each layer, the best first.
        kept: layer -> how many it keeps.
        correction: fit the output projections to what they gave.
    """
    best = {str(layer): tuple(sorted(order[layer][:count])) for layer, count in kept.items()}
    return PruneWidth({}, best, correction=correction)


def equal_widths(
    costs: LayerCosts, removed: Collection[int], budget: float, multiple: int
) -> dict[int, int] | None:
    """Return how many neurons each layer that is left keeps, equally many, to meet a budget.

    Returns:
        layer -> the largest number that meets the budget, a multiple; None if none does.
    """
    left = [layer for layer in range(len(costs.layers)) if layer not in removed]
    fewest = min(costs.neurons[layer] for layer in left)
    for count in range(fewest // multiple * multiple, 0, -multiple):
        kept = dict.fromkeys(left, count)
        if costs.total(removed, kept) <= budget:
            return kept
    return None


def best_widths(
    costs: LayerCosts,
    curves: Sequence[Curve],
    removed: Collection[int],
    budget: float,
    multiple: int,
) -> dict[int, int] | None:
    """Return how many neurons each layer that is left keeps, for the least sum of KL in a budget.

    Where marginal costs rise, taking the cheapest cut first is optimal; so each curve is replaced
    by the lower hull of its points.

    Returns:
        layer -> a multiple; None where the curves do not reach the budget.
    """
    left = [layer for layer in range(len(costs.layers)) if layer not in removed]
    cuts = [
        (rise / (gone * costs.neuron[layer]), layer, gone)
        for layer in left
        for gone, rise in _hull(curves[layer])
    ]
    gone_of = dict.fromkeys(left, 0)
    excess = costs.total(removed) - budget
    for _, layer, gone in sorted(cuts):
        if excess <= 0:
            break
        needed = math.ceil(excess / costs.neuron[layer])
        before = costs.neurons[layer] - gone_of[layer]
        after = (before - min(gone, needed)) // multiple * multiple
        taken = before - max(after, min(multiple, before))
        gone_of[layer] += taken
        excess -= taken * costs.neuron[layer]
    if excess > 0:
        return None
    return {layer: costs.neurons[layer] - gone for layer, gone in gone_of.items()}


def predicted(curves: Sequence[Curve], costs: LayerCosts, kept: Mapping[int, int]) -> float:
    """Return the sum of the KL of layers that keep so many neurons, read off their curves."""
    return sum(_read(curves[layer], costs.neurons[layer] - count) for layer, count in kept.items())


def _hull(curve: Curve) -> list[tuple[int, float]]:
    """Return the pieces of a curve's lower convex hull: (neurons more that go, KL more)."""
    hull: list[tuple[int, float]] = []
    for point in curve:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(hull)]


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def _read(curve: Curve, gone: int) -> float:
    """Return the KL where so many neurons go; beyond the curve its last piece goes on."""
    pieces = [*pairwise(curve)]
    for a, b in pieces:
        if gone <= b[0] or (a, b) == pieces[-1]:
            return a[1] + (gone - a[0]) * _slope(a, b)
    return 0.0
