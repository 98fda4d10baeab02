"""The config of a model with fewer decoder layers, and which of its fields depend on the layers.

A config may list a value for each layer, count layers from the first or the last one, or name
layers by their index. Lists of one value a layer are known by their length. The other fields are
found by trying: a rule is right if the layers of the shorter model, on the meta device, are then
those of the dense model.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from prunelight.models.families.config_fields import decoder_config
from prunelight.models.families.outline import Outline, difference, is_shape, outline

# Lists whose length may equal the number of layers by chance.
LISTS_NOT_PER_LAYER = re.compile(
    r".*token_ids?|time_step_limit|rope_.*|architectures|.*_range|biased_projections"
)

# Fields that count layers from the first one, though a list of one kind a layer may overrule them.
_COUNTING = ("max_window_layers", "first_k_dense_replace", "num_dense_layers")

# Fields of widths and counts of other things; they are not tried as counts of layers.
_NO_COUNTS = re.compile(
    r".*(size|dim|heads?|rank|token|expert|vocab|kernel|group|top_?k|position|seed|width|factor).*"
)


@dataclass(frozen=True)
class CutRules:
    """How fields of a config follow from the layers that are kept.

    Attributes:
        counts: fields that hold the number of layers.
        rules: field -> name of its rule in `RULES`.
    """

    counts: tuple[str, ...] = ("num_hidden_layers",)
    rules: dict[str, str] = field(default_factory=dict)


# Rule -> (value, kept layers, number of layers before) -> value of the shorter config.
RULES: dict[str, Callable[[Any, Sequence[int], int], Any]] = {
    "layers before": lambda value, kept, total: sum(i < value for i in kept),
    "last layer": lambda value, kept, total: sum(i <= value for i in kept) - 1,
    "layers at the end": lambda value, kept, total: sum(i >= total - value for i in kept),
    "layers": lambda value, kept, total: [new for new, i in enumerate(kept) if i in value],
    "layers from one": lambda value, kept, total: [
        new + 1 for new, i in enumerate(kept) if i + 1 in value
    ],
    "repeated": lambda value, kept, total: [value[i % len(value)] for i in kept],
    "one letter a layer": lambda value, kept, total: "".join(value[i] for i in kept),
}


def cut_config(
    config: PretrainedConfig, kept: Sequence[int], total: int, rules: CutRules | None = None
) -> None:
    """Cut every field of a config that depends on the layers, in place, to the kept layers.

    Args:
        config: of the model before layers are removed.
        kept: indices of the layers that stay, ascending.
        total: number of layers before.
        rules: of the model's family, see `ShorterModels`; None knows `num_hidden_layers` alone.
    """
    config, rules = decoder_config(config), rules or CutRules()
    values = config.to_dict()
    cut: dict[str, Any] = {
        name: [value[i] for i in kept] for name, value in _lists(config, values, total).items()
    }
    for name, rule in rules.rules.items():
        cut[name] = RULES[rule](values[name], kept, total)
    overrides = {int(layer): fields for layer, fields in values.get("per_layer_config", {}).items()}
    if overrides:  # transformers holds them against the number of layers when they are set
        config.per_layer_config = None
    for name in rules.counts:
        setattr(config, name, len(kept))
    for name, value in cut.items():
        setattr(config, name, value)
    if overrides:
        config.per_layer_config = {
            new: overrides[i] for new, i in enumerate(kept) if i in overrides
        }
    if "attention_types" in values:  # GPT-Neo derives from it attention_layers, which was cut above
        config.attention_types = [[[kind], 1] for kind in config.attention_layers]
    step, dense = values.get("decoder_sparse_step"), values.get("mlp_only_layers")
    if isinstance(step, int) and isinstance(dense, list):  # some layers have no experts
        config.decoder_sparse_step = 1
        config.mlp_only_layers = [
            new for new, i in enumerate(kept) if i in dense or (i + 1) % step != 0
        ]


def _lists(config: PretrainedConfig, values: dict[str, Any], total: int) -> dict[str, Any]:
    """Return the fields that list one value a layer."""
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, (list, tuple)) and len(value) == total
        if name != "mlp_only_layers"  # this one lists indices
        if not LISTS_NOT_PER_LAYER.fullmatch(name)
        if not isinstance(getattr(type(config), name, None), property)
    }


@dataclass(frozen=True)
class RestChanges:
    """What changes outside the decoder layers when some of them go.

    Attributes:
        tables: name of a weight that holds a part for each layer -> the dimension of the layers.
        values: "module.attribute" -> new plain value.
    """

    tables: dict[str, int]
    values: dict[str, Any]


def _is_parameter(value: Any) -> bool:
    return is_shape(value) and value[0] == "parameter"


def _table_dims(before: Any, after: Any, total: int, left: int) -> list[int]:
    """Return the dimensions of a weight that have a part for each layer; [] if it has no parts."""
    if not (_is_parameter(before) and _is_parameter(after)) or len(before[1]) != len(after[1]):
        return []
    pairs = enumerate(zip(before[1], after[1], strict=True))
    changed = [(dim, old, new) for dim, (old, new) in pairs if old != new]
    if any(old % total or new != old // total * left for _, old, new in changed):
        return []
    return [dim for dim, _, _ in changed]


def _with_count(name: str, rules: CutRules, *, alone: bool) -> CutRules:
    return replace(rules, counts=(name,) if alone else (*rules.counts, name))


def _with_rule(name: str, rule: str, rules: CutRules) -> CutRules:
    return replace(rules, rules={**rules.rules, name: rule})


class ShorterModels:
    """Outlines of a model with fewer layers.

    Attributes:
        dense: outline of the model with all layers.
        rules: how the config is cut.
    """

    def __init__(self, model: PreTrainedModel, layers_path: str) -> None:
        self._class, self._path = type(model), layers_path
        self._config = copy.deepcopy(model.config)
        self.dense = outline(self._class, self._config, layers_path)
        self.total = len(self.dense.layers)
        # The last outline, with its layers and rules: it is asked several questions in a row.
        self._last: tuple[list[int], CutRules, Outline] = ([], CutRules(), self.dense)
        fields = decoder_config(self._config).to_dict()
        counting = {n: "layers before" for n in _COUNTING if isinstance(fields.get(n), int)}
        self.rules = CutRules(rules=counting)
        self._learn()

    def kinds(self) -> list[Any]:
        """Return the kind of each layer by the config; one kind where it lists none."""
        config = decoder_config(self._config)
        lists = (getattr(config, name, None) for name in ("layer_types", "layers_block_type"))
        return next((list(kinds) for kinds in lists if kinds), ["all"] * self.total)

    def config(self, kept: Sequence[int]) -> PretrainedConfig:
        """Return the config of the model with the kept layers alone."""
        config = copy.deepcopy(self._config)
        cut_config(config, kept, self.total, self.rules)
        return config

    def config_without(self, removed: Sequence[int]) -> PretrainedConfig:
        """Return the config of the model without these layers."""
        return self.config([layer for layer in range(self.total) if layer not in removed])

    def outline(self, kept: Sequence[int]) -> Outline:
        """Return the outline of the model with the kept layers alone.

        Raises:
            ValueError: if no such model can be built; says why.
        """
        known, rules, shorter = self._last
        if known == list(kept) and rules is self.rules:
            return shorter
        try:
            shorter = outline(self._class, self.config(kept), self._path)
        except Exception as error:  # a config may be refused by any code of its model
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(
                f"no model has just these layers: {lines[-1].strip()[:160]}"
            ) from error
        if len(shorter.layers) != len(kept):
            raise ValueError(
                f"no field of the config sets the number of layers: it stays {len(shorter.layers)}"
            )
        self._last = (list(kept), self.rules, shorter)
        return shorter

    def differences(self, kept: Sequence[int]) -> list[str]:
        """Return for each kept layer why it cannot stand at its place; "" where it can.

        Raises:
            ValueError: if no such model can be built; says why.
        """
        shorter = self.outline(kept)
        return [
            difference(self.dense, index, shorter, place, kept) for place, index in enumerate(kept)
        ]

    def values(self, kept: Sequence[int]) -> list[dict[str, Any]]:
        """Return, for each kept layer, the plain values that it must take: {name: value}."""
        shorter = self.outline(kept)
        return [
            {
                name: value
                for name, value in shorter.layers[place].items()
                if value != self.dense.layers[index].get(name, value)
            }
            for place, index in enumerate(kept)
        ]

    def rest(self, kept: Sequence[int]) -> RestChanges:
        """Return what changes outside the decoder layers of the model with the kept layers alone.

        Raises:
            ValueError: if no such model can be built, or what changes is no table of the layers.
        """
        old, new = self.dense.rest, self.outline(kept).rest
        tables, values = {}, {}
        for name in [name for name in {**old, **new} if old.get(name) != new.get(name)]:
            before, after = old.get(name), new.get(name)
            if not any(_is_parameter(value) for value in (before, after)):
                if name in new and not name.endswith(".") and not is_shape(after):
                    values[name] = after
                continue
            dims = _table_dims(before, after, self.total, len(kept))
            if len(dims) != 1:
                raise ValueError(f"{name} outside the layers is {before} and would be {after}")
            tables[name] = dims[0]
        return RestChanges(tables, values)

    def _learn(self) -> None:
        """Find the fields that depend on the layers."""
        if self.total < 2:
            return
        faults = self._faults()
        for candidate in self._candidates():
            if not faults:
                return
            before, self.rules = self.rules, candidate(self.rules)
            remaining = self._faults()
            if remaining < faults:
                faults = remaining
            else:
                self.rules = before

    def _faults(self) -> int:
        """Return how many layers are wrong in models without one of the first or last two."""
        faults = 0
        for removed in {0, 1, self.total - 2, self.total - 1}:
            kept = [layer for layer in range(self.total) if layer != removed]
            try:
                faults += sum(map(bool, self.differences(kept)))
            except ValueError:
                faults += 2 * self.total
        return faults

    def _candidates(self) -> Iterator[Callable[[CutRules], CutRules]]:
        config = decoder_config(self._config)
        for name, value in config.to_dict().items():
            if isinstance(getattr(type(config), name, None), property):
                continue
            if type(value) is int and value == self.total and not _NO_COUNTS.fullmatch(name):
                yield partial(_with_count, name, alone=False)
                yield partial(_with_count, name, alone=True)
            for rule in self._possible_rules(name, value):
                yield partial(_with_rule, name, rule)

    def _possible_rules(self, name: str, value: Any) -> list[str]:
        if type(value) is int and 0 < value <= self.total and not _NO_COUNTS.fullmatch(name):
            return ["layers before", "last layer", "layers at the end"]
        if isinstance(value, str) and len(value) == self.total:
            return ["one letter a layer"]
        if not isinstance(value, (list, tuple)) or LISTS_NOT_PER_LAYER.fullmatch(name):
            return []
        if all(type(x) is int for x in value) and any(0 <= x <= self.total for x in value):
            return ["layers", "layers from one"] if len(set(value)) == len(value) else []
        words = all(isinstance(x, str) for x in value)
        return ["repeated"] if words and 0 < len(value) < self.total else []
