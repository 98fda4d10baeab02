"""Comparing many variants of a model that share its first layers, without running those again.

The input of every decoder layer is kept once, (L + 1) N T D numbers; a variant then runs only its
own layers and those above them. No copy of the model, and no head unless the criterion needs it.
"""

# N windows, T tokens, D hidden, L layers

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from prunelight.calibration.layer_walk import LayerWalk
from prunelight.calibration.statistics import check_finite
from prunelight.calibration.windows import Windows
from prunelight.models.families.layers import decoder_layers
from prunelight.planning.sliding_search import BudgetExceededError, Groups
from prunelight.scoring.similarity import Similarity, similarity_to


@dataclass(frozen=True, eq=False)
class VariantLayer:
    """A layer of a variant, and the decoder layer of the model as which it is called."""

    layer: nn.Module
    index: int


class Replay:
    """Similarities of variants to a model, which is unchanged; a context manager.

    For the arguments see `LayerWalk` and `similarity.similarity_to`.

    Attributes:
        walk: over the model.
        units: layers of the present variant, at first those of the model.
        inputs: what each of them gets, and at the end what the last puts out: one list of
            micro-batches (B, T, D) each.
        layer_forwards: how often the calibration windows have gone through a layer so far.
        measurements: how often two models have been compared.

    Raises:
        ValueError: on entry, if the criterion is unknown, no token counts, or a hidden state of the
            model is NaN or Inf (names the layer).
        TypeError: on entry, if the layers cannot be run one by one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Windows,
        criterion: str,
        *,
        ignore_first_tokens: int = 0,
        device: torch.device | None = None,
        offload: bool = False,
    ) -> None:
        self.walk = LayerWalk(model, windows, device=device, offload=offload)
        self.criterion, self.ignore_first_tokens = criterion, ignore_first_tokens
        self.units = [VariantLayer(layer, i) for i, layer in enumerate(decoder_layers(model))]
        self.inputs: list[list[Tensor]] = []
        self.layer_forwards, self.measurements = 0, 0
        self._stack = ExitStack()

    def __enter__(self) -> Replay:
        """Run the model once, layer by layer, and keep what each layer gets."""
        with ExitStack() as stack:
            stack.enter_context(self.walk)
            self.inputs = [list(self.walk.states)]
            self._embeddings, self._first = self.inputs[0], self.units[0].layer
            self._extend()
            ignored = self.ignore_first_tokens
            self._similarity: Similarity = similarity_to(
                self.walk, self.inputs[-1], self.criterion, ignore_first_tokens=ignored
            )
            quiet = self.walk.group.rank > 0 or None
            bar = tqdm(desc=self.criterion, unit=" variants", disable=quiet, leave=False)
            self._bar = stack.enter_context(bar)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        """Restore the model, on errors too."""
        self._stack.close()
        self.inputs.clear()

    def score(self, start: int, units: Sequence[VariantLayer]) -> float:
        """Return the similarity of the variant whose layers from place `start` on are `units`.

        -inf if it cannot be measured: the variant's states are NaN, say.
        """
        states = self._entering(start, units)
        for unit in units:
            states = self._run(unit, states)
        self.measurements += 1
        self._bar.update()
        similarity = self._similarity(states)
        return -math.inf if math.isnan(similarity) else similarity

    def replace(self, start: int, units: Sequence[VariantLayer]) -> None:
        """Go on with the variant whose layers from place `start` on are `units`."""
        del self.inputs[start + 1 :]
        self.inputs[start] = self._entering(start, units)
        self.units[start:] = units
        self._extend()

    def _entering(self, start: int, units: Sequence[VariantLayer]) -> list[Tensor]:
        """Return what the layer at a place gets; an RWKV's first block has a norm that moves on."""
        norm = getattr(self._first, "pre_ln", None)
        if start or norm is None:
            return self.inputs[start]
        if not units or units[0].layer is self._first:
            return self._embeddings
        return [norm(state.to(self.walk.model.device)) for state in self._embeddings]

    def _extend(self) -> None:
        for unit in self.units[len(self.inputs) - 1 :]:
            states = self._run(unit, self.inputs[-1])
            for state in states:
                check_finite(unit.index, state.abs().max().item(), state)
            self.inputs.append([state.to(self.walk.store) for state in states])

    def _run(self, unit: VariantLayer, states: Sequence[Tensor]) -> list[Tensor]:
        self.layer_forwards += 1
        with self.walk.placed(unit.layer):
            return [
                self.walk.call(unit.layer, unit.index, batch, state)
                for batch, state in enumerate(states)
            ]


class MergedVariants:
    """Similarity of the model with some windows merged; call it with the windows, top down.

    Attributes:
        budget: layer forwards of the replay that may not be exceeded.

    Args:
        replay: over the dense model, entered.
        merged_layer: returns the layer that stands for a window of decoder layers.

    Raises:
        SpentError: on a call, if the variant would exceed the budget.
    """

    def __init__(self, replay: Replay, merged_layer: Callable[[Sequence[int]], nn.Module]) -> None:
        self.budget = math.inf
        self._replay, self._merged_layer = replay, merged_layer
        self._dense = list(replay.units)
        self._known: dict[Groups, float] = {(): 1.0}
        self._base: Groups = ()
        self._made: dict[tuple[int, int], VariantLayer] = {}

    def __call__(self, groups: Groups) -> float:
        """Return the similarity once these windows are merged."""
        if groups not in self._known:
            place, units = self._variant(groups)
            self._known[groups] = self._replay.score(place, units)
        return self._known[groups]

    def rebase(self, groups: Groups) -> None:
        """Let the replay hold the model with these windows merged: what is close to it is cheap."""
        place, units = self._variant(groups)
        self._replay.replace(place, units)
        self._base = groups

    def _variant(self, groups: Groups) -> tuple[int, list[VariantLayer]]:
        """Return the first place that differs from the replay's model, and the layers from there.

        There are no more copies of layers than windows of that model and of this variant.
        """
        for window in {*self._made} - {*groups} - {*self._base}:
            del self._made[window]
        for low, high in groups:
            if (low, high) not in self._made:
                layer = self._merged_layer(range(low, high + 1))
                self._made[low, high] = VariantLayer(layer, high)
        units = list(self._dense)
        for low, high in groups:  # from the top down: the places below stay what they are
            units[low : high + 1] = [self._made[low, high]]
        pairs = zip(units, self._replay.units, strict=False)
        place = next(i for i, (one, other) in enumerate(pairs) if one.layer is not other.layer)
        if self._replay.layer_forwards + len(units) - place > self.budget:
            raise BudgetExceededError
        return place, units[place:]
