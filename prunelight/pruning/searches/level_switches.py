"""Improves how many neurons each layer keeps: some layers get neurons that others give up.

What a layer loses by fewer neurons was measured with all other layers whole. In a model that has
lost more, it is another number. So it is measured again there: the KL with one layer wider or
narrower, fitted for that, all others as they are. Only the layers that lost least so far are tried
narrower. Layers are paired then, the one that gains most by being wider with the one that loses
least by being narrower; where the budget has room, a layer gets neurons that no other gives up. All
pairs that promise a gain are switched at once; where that does not help, the better half of them,
and so on. EvoPress (arXiv:2410.14649) switches levels at random; the pairs here follow from what
was measured.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch

from prunelight.pruning.searches.costs import LayerCosts
from prunelight.pruning.searches.healed_variants import HealedVariants
from prunelight.pruning.searches.width_curves import Curve, predicted

log = logging.getLogger(__name__)

STRIDES = (4, 8, 16)  # parts of its neurons that a layer gives or gets, one after the other
_ROUNDS = 6  # in which layers are measured anew, at most
_POOL = 10  # layers that are tried narrower in a round, beside those that are narrow


@torch.no_grad()
def switched_widths(
    variants: HealedVariants,
    kept: Mapping[int, int],
    curves: Sequence[Curve],
    costs: LayerCosts,
    budget: float,
    multiple: int,
) -> dict[int, int]:
    """Return how many neurons layers keep after switches that lower the KL, within a budget.

    Args:
        variants: of the dense model, with the layers removed that are to go.
        kept: layer -> neurons, of each layer that is left.
        curves: what each layer loses alone, see `width_curves`.
        costs: of the dense model's parts.
        budget: the most that the result may cost.
        multiple: what numbers of neurons are multiples of.
    """
    removed, kept = list(variants.removed), dict(kept)
    variants.restore(removed, kept)
    strides = list(STRIDES)
    for _ in range(_ROUNDS):
        before = variants.divergence
        narrower, wider = _changes(variants, kept, curves, costs, multiple, strides[0])
        pairs = _pairs(narrower, wider, kept, costs, removed, budget)
        while pairs:
            proposal = {**kept, **{layer: n for pair in pairs for layer, n in pair.items()}}
            variants.restore(removed, proposal)
            log.info(
                "%d switches of 1/%d: KL %.4f -> %.4f",
                len(pairs),
                strides[0],
                before,
                variants.divergence,
            )
            if variants.divergence < before:
                kept = proposal
                break
            pairs = pairs[: len(pairs) // 2]
        if not pairs:
            variants.restore(removed, kept)
            del strides[0]
            if not strides:
                break
    return kept


# What a change of one layer adds to the KL, the layer, and the neurons that it then keeps.
_Change: TypeAlias = tuple[float, int, int]


def _changes(
    variants: HealedVariants,
    kept: Mapping[int, int],
    curves: Sequence[Curve],
    costs: LayerCosts,
    multiple: int,
    parts: int,
) -> tuple[list[_Change], list[_Change]]:
    """Return the layers narrower, and the layers wider, by a part of their neurons; best first."""
    now = variants.divergence
    steps: dict[int, tuple[int, int]] = {}
    for layer, count in kept.items():
        total = costs.neurons[layer]
        stride = max(multiple, round(total / parts / multiple) * multiple)
        fewer = max(min(multiple, total), (count - stride) // multiple * multiple)
        steps[layer] = (min(fewer, count), min(total, count + stride))

    def loss(layer: int) -> float:
        counts = ({layer: count} for count in (steps[layer][0], kept[layer]))
        after, before = (predicted(curves, costs, each) for each in counts)
        return after - before

    narrow = {layer for layer, count in kept.items() if count < costs.neurons[layer]}
    whole = sorted({*kept} - narrow, key=loss)
    narrower: list[_Change] = []
    wider: list[_Change] = []
    for layer in (*narrow, *whole[:_POOL]):
        counts = [count for count in steps[layer] if count != kept[layer]]
        for count, kl in zip(counts, variants.divergences_with(layer, counts), strict=True):
            (wider if count > kept[layer] else narrower).append((kl - now, layer, count))
    return sorted(narrower), sorted(wider)


def _pairs(
    narrower: Sequence[_Change],
    wider: Sequence[_Change],
    kept: Mapping[int, int],
    costs: LayerCosts,
    removed: Sequence[int],
    budget: float,
) -> list[dict[int, int]]:
    """Return what the two layers of each pair keep, the most promising pair first.

    A layer for whose neurons the budget has room anyway is a pair of its own. All pairs together
    keep to the budget, and so does each first part of them.
    """
    pairs: list[tuple[float, dict[int, int]]] = []
    taken: set[int] = set()
    with_room = dict(kept)
    for gain, layer, more in wider:
        if gain < 0 and costs.total(removed, {**with_room, layer: more}) <= budget:
            with_room[layer] = more
            pairs.append((gain, {layer: more}))
            taken.add(layer)
            continue
        for loss, other, fewer in narrower:
            pair = {layer: more, other: fewer}
            if gain + loss >= 0 or not math.isfinite(gain + loss):
                break
            if not {*pair} & taken and costs.total(removed, {**kept, **pair}) <= budget:
                pairs.append((gain + loss, pair))
                taken |= {*pair}
                break
    after, within = dict(kept), []
    for _, pair in sorted(pairs, key=lambda each: each[0]):
        if costs.total(removed, {**after, **pair}) <= budget:
            after |= pair
            within.append(pair)
    return within
