"""Similarities of merged models, each set of windows measured once, for the search of SLM.

A variant runs from the first layer that differs from the model that `Replay` holds at present.
"""

from __future__ import annotations

import math

from transformers import PreTrainedModel

from prunelight.merging import merged_layer
from prunelight.replay import Replay, Unit
from prunelight.sliding import Groups, SpentError


class MergedVariants:
    """Similarity of the model with some windows merged; call it with the windows, top down.

    Attributes:
        budget: layer forwards of the replay that may not be exceeded.

    Args:
        model: the dense model, unchanged.
        replay: over the model, entered.
        merge: the rule, see `merging.merged_weights`.

    Raises:
        SpentError: on a call, if the variant would exceed the budget.
    """

    def __init__(self, model: PreTrainedModel, replay: Replay, merge: str) -> None:
        self.budget = math.inf
        self._model, self._replay, self._merge = model, replay, merge
        self._dense = list(replay.units)
        self._known: dict[Groups, float] = {(): 1.0}
        self._base: Groups = ()
        self._made: dict[tuple[int, int], Unit] = {}

    def __call__(self, groups: Groups) -> float:
        """Return the similarity once these windows are merged."""
        if groups not in self._known:
            place, units = self._variant(groups)
            self._known[groups] = self._replay.score(place, units)
        return self._known[groups]

    def go_on(self, groups: Groups) -> None:
        """Let the replay hold the model with these windows merged: what is close to it is cheap."""
        place, units = self._variant(groups)
        self._replay.replace(place, units)
        self._base = groups

    def _variant(self, groups: Groups) -> tuple[int, list[Unit]]:
        """Return the first place that differs from the replay's model, and the layers from there.

        There are no more copies of layers than windows of that model and of this variant.
        """
        for window in {*self._made} - {*groups} - {*self._base}:
            del self._made[window]
        for low, high in groups:
            if (low, high) not in self._made:
                layer = merged_layer(self._model, range(low, high + 1), self._merge)
                self._made[low, high] = Unit(layer, high)
        units = list(self._dense)
        for low, high in groups:  # from the top down: the places below stay what they are
            units[low : high + 1] = [self._made[low, high]]
        pairs = zip(units, self._replay.units, strict=False)
        place = next(i for i, (one, other) in enumerate(pairs) if one.layer is not other.layer)
        if self._replay.layer_forwards + len(units) - place > self.budget:
            raise SpentError
        return place, units[place:]
