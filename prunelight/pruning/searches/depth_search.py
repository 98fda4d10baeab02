"""Which decoder layers to remove when the layer before each gap is healed: a greedy search.

One layer goes at a time: the one without which the healed model is nearest to the dense one, by KL
on windows that no fit sees. Layers below a gap do not change, so a candidate costs one fit of one
layer and the layers above it on a few windows. After the first round only the candidates that were
best so far are tried. In the end each removed layer is put back once, and another goes in its place
where that is better.
"""

# L layers, N windows, T tokens, D hidden

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunelight.calibration.layer_walk import LayerWalk
from prunelight.calibration.shared_windows import group_of, share_windows
from prunelight.calibration.windows import Windows, split_windows
from prunelight.models.families.layers import decoder_layers
from prunelight.models.placement import on_device
from prunelight.planning.steps import RemoveLayers
from prunelight.pruning.healing.ends import dense_ends
from prunelight.pruning.healing.error_sums import ErrorSums
from prunelight.pruning.healing.writers import Writer, writer_of
from prunelight.runtime.devices import float64_device
from prunelight.scoring.model_variants import VariantLayer, VariantReplay
from prunelight.scoring.similarity import divergence_of

log = logging.getLogger(__name__)

_RIDGE = 1.0  # held-out windows chose 0.1 to 1 for gaps of SmolLM2
_POOL = 14  # candidates that are tried after the first round
_FEWEST_JUDGES, _JUDGED_SHARE = 2, 16  # windows that judge: one of 16, 2 at least
_FITTED_PER_JUDGE = 3


@dataclass(frozen=True)
class DepthSearch:
    """What the search found.

    Attributes:
        removed: the layers to remove, in the order in which they were chosen.
        divergence: KL to the dense model of the healed model on the windows that judged, in nats.
        path: the layers as they went one by one, before any exchange, each with the KL then.
        first_round: KL without each layer alone, healed; None where it cannot go.
        exchanges: (layer that was put back, layer that went instead).
        forwards: what the search cost, in forwards of the dense model over all calibration
            windows; solves and the head are left out.
    """

    removed: list[int]
    divergence: float
    path: list[tuple[int, float]]
    first_round: list[float | None]
    exchanges: list[tuple[int, int]]
    forwards: float


def search_windows(windows: Windows) -> tuple[Windows, Windows]:
    """Return the windows to fit on, and those that judge: spread evenly over all.

    One window of 16 judges, 2 at least; three times as many are fitted on.

    Raises:
        ValueError: if there are fewer than 3 windows, or fewer of one kind than processes.
    """
    ids, mask = split_windows(windows)
    group = group_of(windows)
    judges = max(_FEWEST_JUDGES, len(ids) // _JUDGED_SHARE, group.size)
    if len(ids) <= judges:
        raise ValueError(
            f"{len(ids)} windows: {judges} of them judge the search and the others are fitted on; "
            f"calibrate on {judges + 1} or more, better on 32"
        )
    count = min(len(ids), judges * (1 + _FITTED_PER_JUDGE))
    spread = [i * len(ids) // count for i in range(count)]
    judging = {spread[i * count // judges + count // judges - 1] for i in range(judges)}

    def chosen(rows: Sequence[int]) -> Windows:
        named = {"input_ids": ids[rows]}
        if mask is not None:
            named["attention_mask"] = mask[rows]
        return share_windows(named, group)

    return chosen([i for i in spread if i not in judging]), chosen(sorted(judging))


@torch.no_grad()
def search_depth(
    model: PreTrainedModel,
    windows: Windows,
    count: int,
    *,
    may_go: Callable[[Sequence[int]], bool],
    heals: bool = True,
    look_back: bool = True,
    device: torch.device | None = None,
    offload: bool = False,
) -> DepthSearch:
    """Choose `count` decoder layers to remove; the model is unchanged afterwards.

    Args:
        model: whose layers are chosen.
        windows: calibration windows (N, T).
        count: how many layers go.
        may_go: tells whether these layers can be among those that go.
        heals: heal the layer before each gap, by `heal_step`'s rule with a fixed ridge.
        look_back: exchange removed layers in the end where that is better.
        device: where the layers compute; None takes the model's own.
        offload: keep the states on the CPU.

    Raises:
        ValueError: if there are too few windows, or every choice leaves NaN states.
        TypeError: if the layers cannot be run one by one.
    """
    total = len(decoder_layers(model))
    if not count:
        return DepthSearch([], 0.0, [], [None] * total, [], 0.0)
    fitted, judging = search_windows(windows)
    with _Variants(model, fitted, judging, heals=heals, device=device, offload=offload) as variants:
        last_known: dict[int, float] = {}
        first_round: dict[int, float] = {}

        def candidates() -> list[int]:
            """Return the layers that may go next: the best so far after the first round."""
            free = [i for i in range(total) if i not in variants.removed]
            free = [i for i in free if may_go([*variants.removed, i])]
            free.sort(key=lambda i: last_known.get(i, math.inf))
            return free[:_POOL] if first_round else free

        def best() -> int:
            scores = {layer: variants.divergence_without(layer) for layer in candidates()}
            last_known.update(scores)
            chosen = min(scores, key=lambda layer: scores[layer], default=None)
            if chosen is None or not math.isfinite(scores[chosen]):
                raise ValueError(
                    f"no {len(variants.removed) + 1}. layer can be removed: every choice leaves "
                    "NaN states; load the model in bfloat16 or float32"
                )
            return chosen

        path = []
        for _ in range(count):
            layer = best()
            first_round = first_round or dict(last_known)
            variants.remove(layer)
            path.append((layer, variants.divergence))
            log.info("removed layer %d: KL %.4f", layer, variants.divergence)
        exchanges = []
        for layer in list(variants.removed) if look_back and count > 1 else ():
            before, kept = variants.divergence, list(variants.removed)
            variants.restore([other for other in kept if other != layer])
            other = best()
            variants.remove(other)
            if variants.divergence < before:
                exchanges.append((layer, other))
                log.info("layer %d went instead of %d: KL %.4f", other, layer, variants.divergence)
            else:
                variants.restore(kept)
        whole = len(split_windows(windows)[0])
        return DepthSearch(
            list(variants.removed),
            variants.divergence,
            path,
            [first_round.get(i) for i in range(total)],
            exchanges,
            variants.window_forwards / whole,
        )


class _Variants:
    """The model without some layers, healed; a context manager that leaves the model as it was.

    Healed weights stand in the model itself meanwhile.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        fitted: Windows,
        judging: Windows,
        *,
        heals: bool,
        device: torch.device | None,
        offload: bool,
    ) -> None:
        self.removed: list[int] = []
        self.divergence = 0.0
        self._heals = heals
        self._layers = decoder_layers(model)
        self._walk = LayerWalk(model, fitted, device=device, offload=offload)
        self._judges = VariantReplay(model, judging, "kl", device=device, offload=offload)
        self._sizes = [len(split_windows(each)[0]) for each in (fitted, judging)]
        self._forwards = 0  # over the windows that are fitted on
        self._dense: list[list[Tensor]] = []  # states before each layer, and after the last
        self._inputs: dict[int, list[Tensor]] = {}  # of each layer left, in the present variant
        self._writers: dict[int, Writer] = {}
        self._old: dict[int, Tensor] = {}  # weights of writers in the dense model
        self._stack = ExitStack()

    def __enter__(self) -> _Variants:
        """Run the dense model on all windows of the search, and find the writers."""
        with ExitStack() as stack:
            stack.callback(self._put_back)
            stack.enter_context(self._judges)
            stack.enter_context(self._walk)
            for index, _ in self._walk.layers():
                self._dense.append(list(self._walk.states))
                if self._heals and (writer := writer_of(self._walk, index)) is not None:
                    self._writers[index] = writer
                    self._old[index] = writer.matrix.parameter.data
                self._walk.advance()
            self._forwards += len(self._layers)
            self._dense.append(list(self._walk.states))
            self._inputs = dict(enumerate(self._dense[:-1]))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        """Restore the weights of the model, on errors too."""
        self._stack.close()

    @property
    def window_forwards(self) -> float:
        """Return how many windows went through the whole dense model's depth, in forwards."""
        fitted, judging = self._sizes
        spent = self._forwards * fitted + self._judges.layer_forwards * judging
        return spent / len(self._layers)

    def divergence_without(self, layer: int) -> float:
        """Return the KL without one more layer, the layer before it healed; inf for NaN states."""
        left = [i for i in self._left(self.removed) if i != layer]
        before = max((i for i in left if i < layer), default=None)
        if before is None:
            return self._score(*self._from(left, 0))
        ends = dense_ends([RemoveLayers((*self.removed, layer))], len(self._layers))
        with self._healed(before, ends[before]):
            return self._score(*self._from(left, before))

    def remove(self, layer: int) -> None:
        """Remove one more layer, and heal anew before this gap and all gaps above it."""
        self.restore([*self.removed, layer])

    def restore(self, removed: Sequence[int]) -> None:
        """Make the model without these layers, healed, the present variant."""
        changed = {*self.removed} ^ {*removed}
        self.removed = list(removed)
        left = self._left(removed)
        if not changed:
            return
        lowest = max((i for i in left if i < min(changed)), default=0)
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
    def _healed(self, layer: int, end: int) -> Iterator[None]:
        """Heal one layer inside, for another end; its present weights return on exit."""
        if layer not in self._writers:
            yield
            return
        present = self._writers[layer].matrix.parameter.data
        self._set_for(layer, end)
        try:
            yield
        finally:
            self._set(layer, present)

    def _set_for(self, layer: int, end: int) -> None:
        """Give a layer the weights with which it stands for the dense layers up to `end`."""
        self._set(layer, self._old[layer])
        if end > layer:
            self._writers[layer].put(self._fit(layer, end))

    def _fit(self, layer: int, end: int) -> Tensor:
        """Return the weight (O, I) that makes a layer give the dense states after layer `end`."""
        writer = self._writers[layer]
        place = float64_device(self._walk.device)
        features, inputs = writer.weight.shape
        sums = ErrorSums.empty(features, (inputs,), place)
        positions = self._walk.positions()
        module = self._layers[layer]
        self._forwards += 1
        with on_device(module.modules(), self._walk.device):
            for batch, state in enumerate(self._inputs[layer]):
                run = partial(self._walk.call, module, layer, batch, state)
                tokens = writer.observe(run, self._dense[end + 1][batch])
                x, missing, weights = (value[positions[batch]] for value in tokens)
                sums.update(x, missing, weights)
        sums.pool(self._walk.group)
        return writer.weight.to(place).double() + sums.fit(_RIDGE)

    def _run(self, layer: int, states: Sequence[Tensor]) -> list[Tensor]:
        self._forwards += 1
        module = self._layers[layer]
        with on_device(module.modules(), self._walk.device):
            outputs = [self._walk.call(module, layer, i, state) for i, state in enumerate(states)]
        return [output.to(self._walk.store) for output in outputs]

    def _set(self, layer: int, stored: Tensor) -> None:
        """Give a writer numbers that it had before, in their stored shape."""
        parameter = self._writers[layer].matrix.parameter
        parameter.data = stored.to(parameter.device)

    def _put_back(self) -> None:
        for layer, stored in self._old.items():
            self._set(layer, stored)
