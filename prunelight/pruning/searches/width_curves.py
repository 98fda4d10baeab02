"""What it costs in KL to take neurons from each layer's MLP alone, and how to spend a budget on it.

Each decoder layer is narrowed to a few widths, its output projection fitted to what it gave before,
and the KL to the dense model is measured with all other layers whole. Between the widths KL is
taken to be linear. KL of several layers is taken to add up, which holds for small changes alone: so
what is chosen here is measured as a whole before it is taken.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise

import torch
from transformers import PreTrainedModel

from prunelight.calibration.windows import Windows
from prunelight.planning.steps import PruneWidth
from prunelight.pruning.prune_width import narrowed_layers
from prunelight.pruning.searches.costs import LayerCosts
from prunelight.scoring.model_variants import VariantLayer, VariantReplay
from prunelight.scoring.similarity import divergence_of

LEVELS = (0.75, 0.5, 0.25, 0.125)  # shares of its neurons that a layer keeps

Curve = Sequence[tuple[int, float]]  # (neurons that go, KL), from (0, 0) on


@torch.no_grad()
def width_curves(
    model: PreTrainedModel,
    fitted: Windows,
    judges: VariantReplay,
    order: Sequence[Sequence[int]],
    multiple: int,
    *,
    device: torch.device | None = None,
    offload: bool = False,
) -> list[Curve]:
    """Return the curve of each decoder layer; the model is unchanged.

    Args:
        model: the dense model.
        fitted: windows that the output projections are fitted on.
        judges: replay of the model over windows that judge, by "kl", not changed so far.
        order: neurons of each layer, the best first.
        multiple: what numbers of neurons that stay are multiples of.
        device: where the layers compute.
        offload: keep the states on the CPU.
    """
    widths = [
        [
            min(len(best), max(multiple, round(len(best) * share / multiple) * multiple))
            for best in order
        ]
        for share in LEVELS
    ]
    steps = [neurons_kept(order, dict(enumerate(counts))) for counts in widths]
    curves: list[Curve] = []
    narrow = narrowed_layers(model, steps, fitted, device=device, offload=offload)
    for layer, variants in enumerate(narrow):
        points = {0: 0.0}
        for counts, variant in zip(widths, variants, strict=True):
            gone = len(order[layer]) - counts[layer]
            if gone in points:  # a multiple leaves few numbers to a small layer
                continue
            rest = judges.layers[layer + 1 :]
            similarity = judges.score(layer, [VariantLayer(variant, layer), *rest])
            points[gone] = max(0.0, divergence_of(similarity))
        curves.append(sorted((gone, kl) for gone, kl in points.items() if math.isfinite(kl)))
    return curves


def neurons_kept(order: Sequence[Sequence[int]], kept: Mapping[int, int]) -> PruneWidth:
    """Return the step that keeps the best neurons of layers, their output projections fitted.

    Args:
        order: neurons of each layer, the best first.
        kept: layer -> how many it keeps.
    """
    best = {str(layer): tuple(sorted(order[layer][:count])) for layer, count in kept.items()}
    return PruneWidth({}, best, correction=True)


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
        needed = math.ceil(excess / costs.neuron[layer] / multiple) * multiple
        taken = min(gone, needed)
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
