"""A model without some layers, and with fewer neurons in others, healed: what a search compares.

Layers below a change stay as they are. So a variant costs one fit of the lowest layer that changes,
and the layers above it on a few windows.
"""

# L layers, N windows, T tokens, D hidden, O out_features, I in_features

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunelight.calibration.layer_walk import LayerWalk
from prunelight.calibration.windows import Windows
from prunelight.models.families.layers import decoder_layers
from prunelight.models.placement import on_device
from prunelight.planning.steps import RemoveLayers
from prunelight.pruning.healing.ends import dense_ends
from prunelight.pruning.healing.error_sums import ErrorSums
from prunelight.pruning.healing.writers import Writer, kept_zeros, writer_of
from prunelight.runtime.devices import float64_device
from prunelight.scoring.model_variants import VariantLayer, VariantReplay
from prunelight.scoring.similarity import divergence_of
from prunelight.scoring.width_scores import projection_parts, widths_of

_RIDGE = 1.0  # held-out windows chose 0.1 to 1 for gaps of SmolLM2


class HealedVariants:
    """The variants of a model; a context manager that leaves the model as it was.

    Weights that were fitted stand in the model itself meanwhile. A neuron that goes has zeros in
    its column of the output projection.

    Attributes:
        removed: layers that are gone, in the order in which they went.
        kept: layer -> neurons that it keeps, the best first; others keep all.
        divergence: KL to the dense model on the windows that judge, in nats.
        layer_forwards: how often the windows that are fitted on have gone through a layer.

    Args:
        model: the dense model.
        fitted: windows that weights are fitted on.
        judges: replay of the model over the windows that judge, by "kl", entered.
        heals: layers aim at the dense states; else those that lost neurons at what they gave.
        order: neurons of each layer, the best first; empty where none go.
        device: where the layers compute; None takes the model's own.
        offload: keep the states on the CPU.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        fitted: Windows,
        judges: VariantReplay,
        *,
        heals: bool,
        order: Sequence[Sequence[int]] = (),
        device: torch.device | None = None,
        offload: bool = False,
    ) -> None:
        self.removed: list[int] = []
        self.kept: dict[int, int] = {}
        self.divergence = 0.0
        self.layer_forwards = 0
        self._model, self._heals, self._order, self._judges = model, heals, order, judges
        self._layers = decoder_layers(model)
        self._walk = LayerWalk(model, fitted, device=device, offload=offload)
        self._dense: list[list[Tensor]] = []  # states before each layer, and after the last
        self._inputs: dict[int, list[Tensor]] = {}  # of each layer left, in the present variant
        self._writers: dict[int, Writer] = {}  # of the matrix that is fitted
        self._aims: set[int] = set()  # layers whose matrix aims at the dense states
        self._old: dict[int, Tensor] = {}  # weights of these matrices in the dense model
        self._stack = ExitStack()

    def __enter__(self) -> HealedVariants:
        """Run the dense model on the windows that are fitted on, and find the matrices to fit."""
        with ExitStack() as stack:
            stack.callback(self._put_back)
            stack.enter_context(self._walk)
            for index, _ in self._walk.layers():
                self._dense.append(list(self._walk.states))
                self._find_matrix(index)
                self._walk.advance()
            self.layer_forwards += len(self._layers)
            self._dense.append(list(self._walk.states))
            self._inputs = dict(enumerate(self._dense[:-1]))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        """Restore the weights of the model, on errors too."""
        self._stack.close()

    @property
    def heals_neurons(self) -> bool:
        """Return whether what is healed of each layer is the output projection of its neurons."""
        return bool(self._aims) and len(self._aims) == len(self._layers)

    def divergence_without(self, layer: int) -> float:
        """Return the KL without one more layer, the layer before it healed; inf for NaN states."""
        left = [i for i in self._left(self.removed) if i != layer]
        before = max((i for i in left if i < layer), default=None)
        if before is None:
            return self._score(*self._from(left, 0))
        ends = dense_ends([RemoveLayers((*self.removed, layer))], len(self._layers))
        with self._present_weights(before):
            self._set_for(before, ends[before])
            return self._score(*self._from(left, before))

    def divergences_with(self, layer: int, counts: Sequence[int]) -> list[float]:
        """Return the KL when one layer keeps other numbers of neurons, fitted for each of them.

        All other layers are as in the present variant; inf for NaN states.
        """
        left = self._left(self.removed)
        end = dense_ends([RemoveLayers(tuple(self.removed))], len(self._layers))[layer]
        divergences = []
        with self._present_weights(layer):
            self._set(layer, self._old[layer])
            for weight in self._fits(layer, end, counts):
                self._writers[layer].put(weight)
                divergences.append(self._score(*self._from(left, layer)))
        return divergences

    def remove(self, layer: int) -> None:
        """Remove one more layer, and heal anew before this gap and all gaps above it."""
        self.restore([*self.removed, layer], self.kept)

    def restore(self, removed: Sequence[int], kept: Mapping[int, int] | None = None) -> None:
        """Make the model without these layers and neurons, healed, the present variant."""
        left = self._left(removed)
        kept = {i: n for i, n in (kept or {}).items() if i in left and n < len(self._order[i])}
        gone = {*self.removed} ^ {*removed}
        narrowed = {layer for layer, _ in {*self.kept.items()} ^ {*kept.items()}}
        self.removed, self.kept = list(removed), kept
        if not gone and not narrowed:
            return
        befores = [max((i for i in left if i < layer), default=0) for layer in gone]
        lowest = min([*befores, *(narrowed & {*left})])
        again = [i for i in left if i >= lowest]
        ends = dense_ends([RemoveLayers(tuple(removed))], len(self._layers))
        states = self._dense[0] if again == left else self._inputs[lowest]
        for layer in again if self._writers else ():
            self._inputs[layer] = states
            if layer in self._writers:
                self._set_for(layer, ends[layer])
            states = self._run(layer, states)
        self._judges.replace(*self._from(left, lowest))
        self.divergence = self._score(len(self._judges.layers), [])

    def _find_matrix(self, index: int) -> None:
        """Find the matrix of the walk's current layer that is fitted, if there is one."""
        writer = writer_of(self._walk, index) if self._heals else None
        if self._order:
            widths = widths_of(self._model)[index]
            output = projection_parts(self._model, index, widths)["neurons"][-1].matrix
            if writer is None or writer.matrix.name != output.name:
                self._writers[index] = Writer(output, 1.0)
                writer = None
        if writer is not None:
            self._writers[index] = writer
            self._aims.add(index)
        if index in self._writers:
            self._old[index] = self._writers[index].matrix.parameter.data

    def _left(self, removed: Sequence[int]) -> list[int]:
        return [i for i in range(len(self._layers)) if i not in {*removed}]

    def _from(self, left: Sequence[int], lowest: int) -> tuple[int, list[VariantLayer]]:
        """Return these layers from layer `lowest` on, and their place in what the judges know."""
        start = sum(layer.index < lowest for layer in self._judges.layers)
        return start, [VariantLayer(self._layers[i], i) for i in left if i >= lowest]

    def _score(self, start: int, layers: Sequence[VariantLayer]) -> float:
        """Return the KL of what the judges know with its layers from a place on replaced."""
        return divergence_of(self._judges.score(start, layers))

    @contextmanager
    def _present_weights(self, layer: int) -> Iterator[None]:
        """Give a layer its present weights back on exit."""
        present = None
        if layer in self._writers:
            present = self._writers[layer].matrix.parameter.data
        try:
            yield
        finally:
            if present is not None:
                self._set(layer, present)

    def _set_for(self, layer: int, end: int) -> None:
        """Give a layer the weights with which it stands for the dense layers up to `end`."""
        if layer not in self._writers:
            return
        self._set(layer, self._old[layer])
        if (end > layer and layer in self._aims) or layer in self.kept:
            count = self.kept.get(layer)
            (weight,) = self._fits(layer, end, [count])
            self._writers[layer].put(weight)

    def _fits(self, layer: int, end: int, counts: Sequence[int | None]) -> Iterator[Tensor]:
        """Yield the weight (O, I) for each number of neurons; None for all.

        With it the layer hands on the dense states after layer `end`, or what it gave.
        """
        writer = self._writers[layer]
        place = float64_device(self._walk.device)
        old = writer.weight.to(place).double()
        sums = ErrorSums.empty(len(old), (old.shape[1],), place)
        positions = self._walk.positions()
        module = self._layers[layer]
        self.layer_forwards += 1
        with on_device(module.modules(), self._walk.device):
            for batch, state in enumerate(self._inputs[layer]):
                run = partial(self._walk.call, module, layer, batch, state)
                tokens = writer.observe(run, self._dense[end + 1][batch])
                x, missing, weights = (value[positions[batch]] for value in tokens)
                sums.update(x, missing if layer in self._aims else 0 * missing, weights)
        sums.pool(self._walk.group)
        # A fit around zeros takes minutes a matrix: here what would fill them is left out.
        stays = torch.ones_like(old) if kept_zeros(old) is None else (old != 0).double()
        for count in counts:
            if count is None or count == old.shape[1]:
                changes = layer in self._aims and end > layer
                yield old + stays * sums.fit(_RIDGE) if changes else old
                continue
            kept = torch.tensor(sorted(self._order[layer][:count]), device=place)
            weight = torch.zeros_like(old)
            fit = sums.of_inputs(kept, old).fit(_RIDGE)
            weight[:, kept] = old[:, kept] + stays[:, kept] * fit
            yield weight

    def _run(self, layer: int, states: Sequence[Tensor]) -> list[Tensor]:
        self.layer_forwards += 1
        module = self._layers[layer]
        with on_device(module.modules(), self._walk.device):
            outputs = [self._walk.call(module, layer, i, state) for i, state in enumerate(states)]
        return [output.to(self._walk.store) for output in outputs]

    def _set(self, layer: int, stored: Tensor) -> None:
        """Give a matrix numbers that it had before, in their stored shape."""
        parameter = self._writers[layer].matrix.parameter
        parameter.data = stored.to(parameter.device)

    def _put_back(self) -> None:
        for layer, stored in self._old.items():
            self._set(layer, stored)
