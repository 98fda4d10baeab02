"""Comparing many variants of a model with it, without running again the layers that they share.

The input of every decoder layer is kept, (L + 1) N T D numbers in all. A variant then runs only
from its first changed layer on. No copy of the model is made, and the head runs only if the
criterion needs it.
"""

# N windows, T tokens, D hidden, L layers

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunelight.calibration.layer_walk import LayerWalk
from prunelight.calibration.statistics import check_finite
from prunelight.calibration.windows import Windows
from prunelight.models.families.layers import decoder_layers
from prunelight.models.placement import on_device
from prunelight.planning.sliding_search import BudgetExceededError, Groups
from prunelight.runtime.progress import Bar
from prunelight.scoring.remembered import remembered
from prunelight.scoring.similarity import Similarity, similarity_to


@dataclass(frozen=True, eq=False)
class VariantLayer:
    """A layer of a variant.

    Attributes:
        layer: the layer.
        index: index of the model's decoder layer whose positions and masks the layer gets.
    """

    layer: nn.Module
    index: int


class VariantReplay:
    """Similarity of variants to a model, which is unchanged; a context manager.

    `LayerWalk` and `similarity_to` describe the arguments; `expected_forwards` is the number of
    layer forwards that the caller expects at most, for the progress bar.

    Attributes:
        walk: the walk over the model.
        layers: layers of the present variant; at first the model's layers.
        inputs: hidden states (B, T, D) of each micro-batch: one list for the input of each layer
            of the present variant, and a last list for the output of its last layer.
        layer_forwards: how often the calibration windows have gone through a layer so far.
        measurements: how often a variant was compared with the model.

    Raises:
        ValueError: on entry, if the criterion is unknown, no token counts, or a hidden state of the
            model is NaN or Inf (the layer is named).
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
        expected_forwards: int | None = None,
    ) -> None:
        self.walk = LayerWalk(model, windows, device=device, offload=offload)
        self.expected_forwards = expected_forwards
        self.criterion, self.ignore_first_tokens = criterion, ignore_first_tokens
        self.layers = [VariantLayer(layer, i) for i, layer in enumerate(decoder_layers(model))]
        self.inputs: list[list[Tensor]] = []
        self.layer_forwards, self.measurements = 0, 0
        self._stack = ExitStack()

    def __enter__(self) -> VariantReplay:
        """Run the model once, layer by layer, and keep the input of each layer."""
        with ExitStack() as stack:
            stack.enter_context(self.walk)
            total, quiet = self.expected_forwards, self.walk.group.rank > 0
            bar = Bar(f"variants by {self.criterion}", total, unit="layer forwards", quiet=quiet)
            self._bar = stack.enter_context(bar)
            self.inputs = [list(self.walk.states)]
            self._embeddings, self._first = self.inputs[0], self.layers[0].layer
            self._extend()
            ignored = self.ignore_first_tokens
            self._similarity: Similarity = similarity_to(
                self.walk, self.inputs[-1], self.criterion, ignore_first_tokens=ignored
            )
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        """Restore the model, on errors too."""
        self._stack.close()
        self.inputs.clear()

    def score(self, start: int, layers: Sequence[VariantLayer]) -> float:
        """Return the similarity of the present variant with its layers from `start` on replaced.

        The similarity is -inf if it cannot be measured, such as for states that are NaN.

        Args:
            start: position of the first replaced layer in the present variant.
            layers: the layers from that position on.
        """
        states = self._inputs_at(start, layers)
        for layer in layers:
            states = self._run(layer, states)
        return self.similarity_of(states)

    def similarity_of(self, states: Sequence[Tensor]) -> float:
        """Return the similarity of states after the last layer, (B, T, D) for each micro-batch."""
        self.measurements += 1
        similarity = self._similarity(states)
        return -math.inf if math.isnan(similarity) else similarity

    def replace(self, start: int, layers: Sequence[VariantLayer]) -> None:
        """Replace the present variant's layers from position `start` on by `layers`."""
        del self.inputs[start + 1 :]
        self.inputs[start] = self._inputs_at(start, layers)
        self.layers[start:] = layers
        self._extend()

    def _inputs_at(self, start: int, layers: Sequence[VariantLayer]) -> list[Tensor]:
        """Return the inputs of the layer at position `start`, when `layers` follow from there.

        RWKV's first block holds the norm of the embeddings. Without that block, the norm is applied
        here.
        """
        norm = getattr(self._first, "pre_ln", None)
        if start or norm is None:
            return self.inputs[start]
        if not layers or layers[0].layer is self._first:
            return self._embeddings
        return [norm(state.to(self.walk.device)) for state in self._embeddings]

    def _extend(self) -> None:
        """Run the present variant's layers from the last known input on, and keep their outputs."""
        for layer in self.layers[len(self.inputs) - 1 :]:
            states = self._run(layer, self.inputs[-1])
            for state in states:
                check_finite(layer.index, state.abs().max().item(), state)
            self.inputs.append([state.to(self.walk.store) for state in states])

    def _run(self, variant_layer: VariantLayer, states: Sequence[Tensor]) -> list[Tensor]:
        self.layer_forwards += 1
        self._bar.update()
        layer, index = variant_layer.layer, variant_layer.index
        with on_device(layer.modules(), self.walk.device):
            return [
                self.walk.call(layer, index, batch, state) for batch, state in enumerate(states)
            ]


@remembered
def similarities_without(
    model: PreTrainedModel,
    windows: Windows,
    criterion: str,
    removed: Sequence[int],
    candidates: Sequence[int],
    *,
    replay: LazyReplay,
) -> dict[int, float]:
    """Return the similarity to the model without some layers and each of some others, by layer.

    Args:
        model: the dense model.
        windows: calibration windows.
        criterion: of similarity, see `similarity_to`.
        removed: layers that are gone.
        candidates: layers of which each is left out alone beside them.
        replay: of this model, these windows and this criterion.
    """
    variants = replay.without(removed)
    positions = {layer.index: i for i, layer in enumerate(variants.layers)}
    return {
        layer: variants.score(positions[layer], variants.layers[positions[layer] + 1 :])
        for layer in candidates
    }


class LazyReplay:
    """A `VariantReplay` that runs the model when it is first asked; a context manager.

    A method whose scores are all remembered then runs no layer.

    Args:
        replay: not entered.
    """

    def __init__(self, replay: VariantReplay) -> None:
        self._replay, self._stack = replay, ExitStack()
        self._entered = False

    def __enter__(self) -> LazyReplay:
        """Run nothing yet."""
        return self

    def __exit__(self, *error: object) -> None:
        """Restore the model, on errors too."""
        self._stack.close()

    @property
    def layer_forwards(self) -> int:
        """Return how often the calibration windows have gone through a layer so far."""
        return self._replay.layer_forwards

    def without(self, removed: Sequence[int]) -> VariantReplay:
        """Return the replay with these layers removed from its present variant."""
        if not self._entered:
            self._stack.enter_context(self._replay)
            self._entered = True
        layers = self._replay.layers
        first = next((i for i, layer in enumerate(layers) if layer.index in {*removed}), None)
        if first is not None:
            left = [layer for layer in layers[first:] if layer.index not in {*removed}]
            self._replay.replace(first, left)
        return self._replay


class MergedVariants:
    """Similarity of the model with some groups of layers merged; a function of the groups.

    A group is (lowest, highest) layer index, both included. Groups are given from the top down.

    Attributes:
        budget: the most that `replay` may have spent, in layer forwards.

    Args:
        replay: entered, over the dense model.
        merged_layer: returns the layer that replaces the decoder layers of a group.
        measurement_cost: what a measurement costs beside its layers, in layer forwards.
        dense_cost: what the replay has cost beside layers when it is entered, likewise.

    Raises:
        BudgetExceededError: on a call, if the variant would exceed the budget.
    """

    def __init__(
        self,
        replay: VariantReplay,
        merged_layer: Callable[[Sequence[int]], nn.Module],
        measurement_cost: float = 0.0,
        dense_cost: float = 0.0,
    ) -> None:
        self.budget = math.inf
        self._measurement_cost, self._dense_cost = measurement_cost, dense_cost
        self._replay, self._merged_layer = replay, merged_layer
        self._dense = list(replay.layers)
        self._known: dict[Groups, float] = {(): 1.0}
        self._base: Groups = ()  # groups of the replay's present variant
        self._merged: dict[tuple[int, int], VariantLayer] = {}

    @property
    def spent(self) -> float:
        """Return what the replay has cost so far, in layer forwards; the dense model counts."""
        replay = self._replay
        further = self._dense_cost + replay.measurements * self._measurement_cost
        return replay.layer_forwards + further

    def __call__(self, groups: Groups) -> float:
        """Return the similarity of the model with these groups merged."""
        if groups not in self._known:
            start, layers = self._changed_layers(groups, self._measurement_cost)
            self._known[groups] = self._replay.score(start, layers)
        return self._known[groups]

    def rebase(self, groups: Groups) -> None:
        """Make the model with these groups merged the replay's present variant.

        Variants that differ from the present variant in few upper layers cost least.
        """
        start, layers = self._changed_layers(groups)
        self._replay.replace(start, layers)
        self._base = groups

    def _changed_layers(
        self, groups: Groups, further_cost: float = 0.0
    ) -> tuple[int, list[VariantLayer]]:
        """Return the first position that differs from the present variant, and the layers from it.

        Only the merged layers of these groups and of the present variant are kept in memory.
        """
        for group in {*self._merged} - {*groups} - {*self._base}:
            del self._merged[group]
        for low, high in groups:
            if (low, high) not in self._merged:
                layer = self._merged_layer(range(low, high + 1))
                self._merged[low, high] = VariantLayer(layer, high)
        layers = list(self._dense)
        for low, high in groups:  # from the top down: positions below a group do not move
            layers[low : high + 1] = [self._merged[low, high]]
        pairs = zip(layers, self._replay.layers, strict=False)
        same = min(len(layers), len(self._replay.layers))
        start = next((i for i, (new, old) in enumerate(pairs) if new.layer is not old.layer), same)
        if self.spent + len(layers) - start + further_cost > self.budget:
            raise BudgetExceededError
        return start, layers[start:]
