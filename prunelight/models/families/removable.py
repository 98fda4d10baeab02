"""Which decoder layers of a model can be removed, known before any forward.

A layer that is left moves down by the number of removed layers below it. It must be, at its new
place, what the shorter model has there: `shorter_config.py` builds that model from its config on
the meta device, and `outline.py` compares. Families differ: mostly any layers can go; in some a few
layers must stay; where layers depend on their place, only sets that keep the pattern can go.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn
from transformers import PreTrainedModel

from prunelight.models.families.architectures import is_sliced
from prunelight.models.families.config_fields import check_reloadable, counts_tokens
from prunelight.models.families.layers import (
    HANDS_ON,
    carried_arguments,
    decoder_layers,
    layers_path,
)
from prunelight.models.families.shorter_config import ShorterModels
from prunelight.planning.layer_choice import lowest_scores, lowest_window, resolve_indices
from prunelight.planning.layer_pattern import (
    Pattern,
    counts_that_keep_pattern,
    keeps_pattern,
    pattern_fits,
)

log = logging.getLogger(__name__)

# Config fields by which layers compute with their index in their forward, where no outline sees it.
INDEX_IN_FORWARD = ("scale_attn_by_inverse_layer_idx",)


@dataclass
class RemovableLayers:
    """Which decoder layers of a model can go.

    Attributes:
        name: model type, for errors.
        models: outlines of shorter models.
        sources: layer -> the earlier layer whose result it reads beside the hidden states.
    """

    name: str
    models: ShorterModels
    sources: dict[int, int] = field(default_factory=dict)
    _faults: dict[tuple[int, ...], str] = field(default_factory=dict)
    _fits_of: dict[int, list[list[bool]]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Return the number of decoder layers."""
        return self.models.total

    @cached_property
    def fixed(self) -> dict[int, str]:
        """Return the layers that cannot be removed alone, each with the reason."""
        layers = range(self.total)
        if self._all_can_go(layers):
            return {}
        alone = {layer: self.fault([layer]) for layer in layers}
        return {layer: fault for layer, fault in alone.items() if fault}

    @cached_property
    def free(self) -> bool:
        """Return whether all layers but the fixed ones can be removed in any combination.

        Where most layers are fixed, the others can mostly go in one order alone.
        """
        others = [layer for layer in range(self.total) if layer not in self.fixed]
        return 2 * len(others) > self.total and self._all_can_go(others)

    def _all_can_go(self, layers: Sequence[int]) -> bool:
        """Return whether every second layer, the others, and each half of these layers can go."""
        half = len(layers) // 2
        samples = (layers[::2], layers[1::2], layers[:half], layers[half:])
        return not any(self._place_fault(x) for x in samples if len(x) < self.total)

    @cached_property
    def needed(self) -> dict[int, str]:
        """Return, of each kind of layer that the model needs one of, the last layer, with why."""
        kinds = self.models.kinds()
        needed = {}
        for kind in dict.fromkeys(kinds):
            group = [layer for layer, other in enumerate(kinds) if other == kind]
            if len(group) < self.total and (fault := self._whole_fault(group)):
                needed[group[-1]] = fault
        return needed

    def fault(self, removed: Collection[int]) -> str:
        """Return why these layers cannot be removed together; "" if they can."""
        key = tuple(sorted(set(removed)))
        if key not in self._faults:
            self._faults[key] = self._fault(key) if key else ""
        return self._faults[key]

    def _fault(self, removed: tuple[int, ...]) -> str:
        return self._place_fault(removed) or self._whole_fault(removed)

    def _place_fault(self, removed: Collection[int]) -> str:
        """Return why a layer that is left cannot stand at its new place."""
        kept = self._kept(removed)
        if not kept:
            return "no layer would be left"
        for reader, source in self.sources.items():
            if reader in kept and source in removed:
                return f"layer {reader} reads what layer {source} computes beside its hidden states"
        try:
            differences = self.models.differences(kept)
        except ValueError as error:
            return str(error)
        place = next((place for place, text in enumerate(differences) if text), None)
        if place is None:
            return ""
        return f"layer {kept[place]} would be layer {place}, where {differences[place]}"

    def _whole_fault(self, removed: Collection[int]) -> str:
        """Return what the model would lack as a whole, outside its layers or in its cache."""
        kept = self._kept(removed)
        try:
            self.models.rest(kept)
        except ValueError as error:
            return str(error)
        if self._dense_counts_tokens and not counts_tokens(self.models.config(kept)):
            return "no layer would be left that counts the tokens"
        return ""

    @cached_property
    def _dense_counts_tokens(self) -> bool:
        return counts_tokens(self.models.config(range(self.total)))

    def _kept(self, removed: Collection[int]) -> list[int]:
        return [layer for layer in range(self.total) if layer not in removed]

    def check(self, removed: Collection[int]) -> None:
        """Check that these layers can be removed together.

        Raises:
            ValueError: if they cannot; says why, and which layers can.
        """
        if fault := self.fault(removed):
            raise ValueError(
                f"layers {sorted(removed)} of {self.name} cannot be removed: {fault}; "
                f"{self.what_can_go()}"
            )

    def choose(
        self,
        scores: Sequence[float],
        count: int,
        protected: Collection[int] = (),
        patterns: Sequence[tuple[Sequence[Hashable], Pattern]] = (),
    ) -> list[int]:
        """Return the layers of the lowest sum of scores among those that can be removed together.

        Args:
            scores: one a layer.
            count: how many layers to remove.
            protected: layers that must stay; negative ones count from the end.
            patterns: kinds of the layers, and the rule that they must follow afterwards.

        Raises:
            ValueError: if no such layers can be removed; says how many can go, and why not more.
        """
        chosen = lowest_scores(scores, count, protected)
        if not self.fault(chosen) and all(keeps_pattern(k, chosen, rule) for k, rule in patterns):
            return chosen
        fits = self._fits(count)
        for kinds, rule in patterns:
            rows = zip(fits, pattern_fits(kinds, rule, count), strict=True)
            fits = [[a and b for a, b in zip(x, y, strict=True)] for x, y in rows]
        chosen = self._lowest(scores, count, protected, fits)
        if chosen and (fault := self.fault(chosen)):
            # What the whole model needs, such as one attention, only the whole set shows.
            kept = [{*protected, layer} for layer in chosen] + [{*protected, *self.fixed}]
            others = [self._lowest(scores, count, more, fits) for more in kept]
            if not patterns and not resolve_indices(protected, self.total) & {*self._last(count)}:
                others.append(self._last(count))
            valid = [other for other in others if other and not self.fault(other)]
            chosen = min(valid, key=lambda c: sum(scores[i] for i in c), default=[])
            log.info("%s", fault)
        if not chosen:
            stay = sorted(resolve_indices(protected, self.total))
            counts = [counts_that_keep_pattern(k, rule, protected) for k, rule in patterns]
            text = f"; counts that keep the pattern of its layers: {counts[0]}" if counts else ""
            raise ValueError(
                f"{count} layers of {self.name} cannot be removed (protected={stay}): "
                f"{self.what_can_go(protected)}{text}"
            )
        return chosen

    def _last(self, count: int) -> list[int]:
        """Return the last layers, which go most easily: no layer moves."""
        return [*range(self.total - count, self.total)]

    def _lowest(
        self,
        scores: Sequence[float],
        count: int,
        protected: Collection[int],
        fits: Sequence[Sequence[bool]],
    ) -> list[int]:
        try:
            return lowest_scores(scores, count, protected, fits)
        except ValueError:
            return []

    def choose_window(
        self, scores: Sequence[float], size: int, protected: Collection[int] = ()
    ) -> list[int]:
        """Return the layers of the contiguous window with the lowest score among those that can go.

        Args:
            scores: score of the window that starts at layer i, for i = 0 .. total - size.
            size: how many layers to remove.
            protected: layers that must stay; negative ones count from the end.

        Raises:
            ValueError: if no such window can be removed; says how many layers can go.
        """
        chosen = lowest_window(scores, size, protected)
        if not self.fault(chosen):
            return chosen
        allowed = [
            math.inf if self.fault(range(start, start + size)) else score
            for start, score in enumerate(scores)
        ]
        chosen = lowest_window(allowed, size, protected)
        if self.fault(chosen):
            raise ValueError(
                f"no window of {size} neighbouring layers of {self.name} can be removed: "
                f"{self.what_can_go(protected)}"
            )
        return chosen

    def can_go(self, removed: Collection[int], count: int, protected: Collection[int]) -> bool:
        """Return whether `count` layers can go with these among them."""
        if self.free:
            return not (set(removed) & set(self.fixed) or self._whole_fault(removed))
        scores = [-1.0 * (layer in removed) for layer in range(self.total)]
        try:
            return set(removed) <= set(self.choose(scores, count, protected))
        except ValueError:
            return False

    def _fits(self, count: int) -> list[list[bool]]:
        """Return whether layer i can stand k places lower, for k up to `count`: [i][k]."""
        if count not in self._fits_of:
            self._fits_of[count] = self._compared(count)
        return self._fits_of[count]

    def _compared(self, count: int) -> list[list[bool]]:
        fits = [[False] * (count + 1) for _ in range(self.total)]
        left = self.total - count
        for shift in range(count + 1):
            kept = range(shift, shift + left)
            try:
                differences = self.models.differences(kept)
            except ValueError:
                continue
            for layer, text in zip(kept, differences, strict=True):
                fits[layer][shift] = not text
        return fits

    def outside_windows(self, protected: Collection[int]) -> set[int]:
        """Return the layers that no merged window may contain: `protected`, and those that stay.

        Raises:
            ValueError: if only sets of layers can go that keep a pattern: no window knows it.
        """
        if not self.free:
            raise ValueError(
                f"windows of {self.name} cannot be merged: {self.what_can_go()}; "
                "ShortGPT chooses among the layers that can go"
            )
        return resolve_indices(protected, self.total) | {*self.fixed, *self.needed}

    def what_can_go(self, protected: Collection[int] = ()) -> str:
        """Return in one line how many layers can be removed, which must stay, and why."""
        stay = {*self.fixed, *resolve_indices(protected, self.total)}
        if self.free:
            stay |= set(self.needed)
            most = self.total - len(stay) - (not stay)
            but = f", all but {sorted(stay)}" if stay else ""
            return f"{most} of {self.total} layers can go{but}{self._reasons()}"
        zeros = [0.0] * self.total
        counts = range(self.total - 1, 0, -1)
        most = next((n for n in counts if self._valid(zeros, n, protected)), 0)
        if most == 0:
            return f"none of its layers can go{self._reasons()}"
        return f"its layers depend on their place: at most {most} can go{self._reasons()}"

    def _valid(self, scores: Sequence[float], count: int, protected: Collection[int]) -> list[int]:
        chosen = self._lowest(scores, count, protected, self._fits(count))
        return [] if chosen and self.fault(chosen) else chosen

    def _reasons(self) -> str:
        """Return why the first layer that must stay must, and how many others there are."""
        reasons = {**self.needed, **self.fixed}
        if not reasons:
            return ""
        layer = next(iter(self.fixed or reasons))
        more = f" ({len(self.fixed)} layers cannot go alone)" if len(self.fixed) > 1 else ""
        return f"; without layer {layer}, {reasons[layer]}{more}"


def removable_layers(model: PreTrainedModel) -> RemovableLayers:
    """Return which decoder layers of a model can be removed; no forward, no copy of its weights.

    Raises:
        ValueError: if none can: the model is sliced, or its layers compute with their index.
        TypeError: if the decoder layers cannot be found.
    """
    name = model.config.model_type
    check_reloadable(model)
    if is_sliced(model):
        raise ValueError(
            "this model is sliced: each decoder layer hands on a width and a basis of its own; "
            "remove or merge layers first, then slice"
        )
    for config_field in INDEX_IN_FORWARD:
        if getattr(model.config, config_field, None):
            raise ValueError(
                f"{config_field}={getattr(model.config, config_field)} of {name} makes layers "
                "depend on their index; removing layers would change the others"
            )
    return RemovableLayers(name, ShorterModels(model, layers_path(model)), _sources(model))


def _sources(model: PreTrainedModel) -> dict[int, int]:
    """Return which layer reads what an earlier one computes beside the hidden states."""
    sources: dict[int, int] = {}
    source = 0
    for index, layer in enumerate(decoder_layers(model)):
        names = carried_arguments(layer)
        if not names:
            continue
        computes = all(_computes(layer, HANDS_ON.get(name)) for name in names)
        if index and not (computes and all(name in HANDS_ON for name in names)):
            sources[index] = source
        source = index if computes else source
    return sources


def _computes(layer: nn.Module, skips: str | None) -> bool:
    """Return whether a layer computes what it hands on anew; "path.attribute" is True if not."""
    if skips is None:
        return True
    path, _, attribute = skips.rpartition(".")
    return not getattr(layer.get_submodule(path), attribute, False)
