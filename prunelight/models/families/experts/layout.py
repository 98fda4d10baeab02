"""Where the experts of a model stand, read off its config on the meta device.

A config with one expert fewer is built beside the real one. Each tensor of a decoder layer that
loses one entry of one dimension has an entry for each expert there: stacks of experts, their
biases, the rows of the router, its bias or correction. The config field that does this holds the
number of experts. No list of families or names is needed. Shared experts keep their shapes, so they
stay; layers without experts do not change either.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from prunelight.models.families.config_fields import decoder_config
from prunelight.models.families.layers import decoder_layers, layers_path
from prunelight.models.families.outline import Outline, is_shape, outline

# How many experts a token takes: an attribute of a router, or a field of a config, named so.
_TOP_K = re.compile(r"(moe_)?top_?k(_experts)?|(num_|n_)?experts_per_tok(en)?")
# An attribute of a router with such a name divides the experts into groups, picked first.
_GROUPS = re.compile(r"(n|num)(_expert)?_groups?")
_PER_GROUP = 2  # DeepSeek's routers judge a group by its two best experts


@dataclass(frozen=True)
class Experts:
    """The experts of a model.

    Attributes:
        name: model type, for errors.
        count: experts of each layer that has some, shared ones left out.
        config_field: field of the decoder's config that holds their number.
        top_k: experts that a token takes.
        groups: groups of neighbouring experts of equal size; 1 without groups.
        tensors: decoder layer that has experts -> tensor in it -> the dimension of the experts.
        holders: decoder layer -> path in it of the module that holds the stacked weights.
        fault: why no expert can be removed; "" if some can.
    """

    name: str
    count: int
    config_field: str
    top_k: int
    groups: int
    tensors: dict[int, dict[str, int]]
    holders: dict[int, str]
    fault: str = ""

    @property
    def layers(self) -> list[int]:
        """Return the decoder layers that have experts, ascending."""
        return sorted(self.tensors)

    @property
    def per_group(self) -> int:
        """Return the number of experts in each group."""
        return self.count // self.groups

    @property
    def fewest(self) -> int:
        """Return how many experts a layer must keep at least, in multiples of the groups."""
        if self.groups == 1:
            return self.top_k
        return self.groups * max(_PER_GROUP, -(-self.top_k // self.groups))

    def check_count(self, removed: int, name: str = "num_experts") -> None:
        """Check that so many experts of each layer can go.

        Raises:
            ValueError: if fewer are left than a token takes, or groups would lose unequal numbers.
        """
        if self.fault and removed:
            raise ValueError(f"experts of {self.name} cannot be removed: {self.fault}")
        most = max(0, self.count - self.fewest)
        if not 0 <= removed <= most:
            why = f"a token takes {self.top_k} of {self.count} experts"
            why += f" in {self.groups} groups" if self.groups > 1 else ""
            raise ValueError(
                f"{name}={removed} must lie in [0, {most}] for {self.name}: {why}, which must be "
                "left; remove fewer"
            )
        if removed % self.groups:
            raise ValueError(
                f"{name}={removed} must be a multiple of {self.groups} for {self.name}: its "
                f"{self.groups} groups of experts must stay equally large; remove "
                f"{removed - removed % self.groups}"
            )

    def check_removed(self, layer: int, removed: Sequence[int]) -> None:
        """Check that these experts of one layer can go.

        Raises:
            ValueError: if one does not exist or too few are left, see `check_count`, or groups
                lose unequal numbers.
        """
        outside = [expert for expert in removed if not 0 <= expert < self.count]
        if outside:
            raise ValueError(
                f"experts={outside} of layer {layer} must lie in [0, {self.count - 1}]: "
                f"{self.name} has {self.count} experts a layer"
            )
        self.check_count(len(removed), f"number of experts removed from layer {layer}")
        lost = [sum(e // self.per_group == group for e in removed) for group in range(self.groups)]
        if len(set(lost)) > 1:
            raise ValueError(
                f"experts={list(removed)} of layer {layer} take {lost} from the {self.groups} "
                f"groups of {self.name}, which must stay equally large; remove as many of each "
                f"{self.per_group} neighbours"
            )


def experts_of(model: PreTrainedModel) -> Experts:
    """Return the experts of a model; no weight is read.

    Raises:
        TypeError: if the model has no stacked experts, its config does not say how many, or a
            weight that depends on their number is no stack of them.
    """
    name, path = model.config.model_type, layers_path(model)
    dense = outline(type(model), model.config, path)
    counts = {value[1][0] for _, value in _stacks(dense)}
    if not counts:
        raise TypeError(
            f"{name} has no experts whose weights are stacked in its decoder layers; prune layers, "
            "heads or neurons instead"
        )
    faults: list[str] = []
    for config_field, count in _candidates(model.config, counts):
        try:
            fewer = outline(type(model), config_with(model.config, config_field, count - 1), path)
            tensors = _expert_tensors(dense, fewer, count)
        except Exception as error:  # a config may be refused by any code of its model
            lines = str(error).strip().splitlines() or [type(error).__name__]
            faults.append(f"{config_field}: {lines[-1].strip()[:160]}")
            continue
        if tensors:
            return _described(model, dense, config_field, count, tensors)
    of_experts = [fault for fault in faults if "expert" in fault.partition(":")[0]]
    why = f" ({'; '.join(of_experts)})" if of_experts else ""
    raise TypeError(
        f"{name} has no experts that can be removed: no field of its config sets the number of "
        f"stacked experts alone{why}; prune layers, heads or neurons instead"
    )


def has_experts(model: PreTrainedModel) -> bool:
    """Return whether a model has experts that can be told apart, see `experts_of`."""
    try:
        experts_of(model)
    except TypeError:
        return False
    return True


def config_with(config: PretrainedConfig, config_field: str, count: int) -> PretrainedConfig:
    """Return a copy of a model's config whose decoder has so many experts a layer."""
    config = copy.deepcopy(config)
    setattr(decoder_config(config), config_field, count)
    return config


def _candidates(config: PretrainedConfig, counts: set[int]) -> Iterator[tuple[str, int]]:
    """Yield the fields of the decoder's config that may hold the number of experts."""
    config = decoder_config(config)
    for name, value in config.to_dict().items():
        derived = isinstance(getattr(type(config), name, None), property)
        if type(value) is int and value > 1 and value in counts and not derived:
            yield name, value


def _stacks(model: Outline) -> Iterator[tuple[str, Any]]:
    """Yield the weights of three dimensions, which may be stacks of experts, with their shapes."""
    for facts in model.layers:
        for name, value in facts.items():
            if is_shape(value) and value[0] == "parameter" and len(value[1]) == 3:
                yield name, value


def _expert_tensors(dense: Outline, fewer: Outline, count: int) -> dict[int, dict[str, int]]:
    """Return layer -> tensor -> dimension of the experts; {} if the field changes no stack.

    Raises:
        ValueError: if another shape changes too, so that the field is no number of experts alone.
    """
    if len(dense.layers) != len(fewer.layers):
        raise ValueError("the number of layers changes with it")
    for name, value in dense.rest.items():
        if is_shape(value) and fewer.rest.get(name) != value:
            raise ValueError(f"{name} outside the layers changes with it")
    tensors: dict[int, dict[str, int]] = {}
    for layer, (old, new) in enumerate(zip(dense.layers, fewer.layers, strict=True)):
        if old.keys() != new.keys():
            raise ValueError(f"modules of layer {layer} change with it: no stack holds them")
        for name, value in old.items():
            if is_shape(value) and new[name] != value:
                dim = _dimension(name, value[1], new[name], count)
                tensors.setdefault(layer, {})[name.strip(".")] = dim
    stacked = [
        any(len(dense.layers[layer][name][1]) == 3 and dim == 0 for name, dim in found.items())
        for layer, found in tensors.items()
    ]
    return tensors if stacked and all(stacked) else {}


def _dimension(name: str, old: tuple[int, ...], new: Any, count: int) -> int:
    """Return the dimension of a tensor that has an entry for each expert."""
    if is_shape(new) and len(new[1]) == len(old):
        pairs = enumerate(zip(old, new[1], strict=True))
        changed = [(dim, before, after) for dim, (before, after) in pairs if before != after]
        if len(changed) == 1 and changed[0][1:] == (count, count - 1):
            return changed[0][0]
    raise ValueError(f"{name} is {old}, which is no stack of {count} experts")


def _described(
    model: PreTrainedModel,
    dense: Outline,
    config_field: str,
    count: int,
    tensors: dict[int, dict[str, int]],
) -> Experts:
    """Return the experts, once it is known which tensors are theirs."""
    name = model.config.model_type
    holders = {
        layer: _holder(name, layer, found, dense.layers[layer]) for layer, found in tensors.items()
    }
    blocks = {layer: path.rpartition(".")[0] for layer, path in holders.items()}
    facts = {layer: _within(dense.layers[layer], block) for layer, block in blocks.items()}
    top_k = _numbers(facts, _TOP_K)
    if not top_k:
        known = {n: {v} for n, v in _fields(model) if _TOP_K.fullmatch(n)}
        top_k = {value for values in known.values() for value in values}
    if not top_k:
        raise TypeError(f"how many experts a token takes cannot be found in {name}; prune layers")
    groups = _numbers(facts, _GROUPS) or {1}
    if len(groups) > 1 or count % max(groups):
        raise TypeError(f"{name} has {count} experts in {sorted(groups)} groups of unequal size")
    layers = decoder_layers(model)
    fault = ""
    for layer, found in tensors.items():
        _check_stored(name, layers[layer], found, dense.layers[layer])
        fault = fault or _names_experts(layers[layer].get_submodule(blocks[layer]), layer)
    return Experts(name, count, config_field, max(top_k), max(groups), tensors, holders, fault)


def _holder(name: str, layer: int, tensors: Mapping[str, int], facts: Mapping[str, Any]) -> str:
    """Return the path of the module that holds the stacks of a layer."""
    stacks = [tensor for tensor in tensors if len(facts[_key(facts, tensor)][1]) == 3]
    holders = {stack.rpartition(".")[0] for stack in stacks}
    if len(holders) > 1:
        raise TypeError(
            f"layer {layer} of {name} has several sets of experts ({', '.join(sorted(holders))}), "
            "which share one number; prune layers or heads instead"
        )
    (holder,) = holders
    if all(tensor.rpartition(".")[0] == holder for tensor in tensors):
        raise TypeError(f"layer {layer} of {name} has experts, and no router beside them is known")
    return holder


def _key(facts: Mapping[str, Any], tensor: str) -> str:
    """Return the name of a tensor in an outline, which a module without path begins with a dot."""
    return tensor if tensor in facts else f".{tensor}"


def _within(facts: Mapping[str, Any], block: str) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if name.startswith(f"{block}.")}


def _numbers(facts: Mapping[int, Mapping[str, Any]], names: re.Pattern[str]) -> set[int]:
    """Return the whole numbers above 0 that modules keep under such names."""
    return {
        value
        for of_layer in facts.values()
        for name, value in of_layer.items()
        if type(value) is int and value > 0 and names.fullmatch(name.rpartition(".")[2])
    }


def _fields(model: PreTrainedModel) -> Iterator[tuple[str, int]]:
    for name, value in decoder_config(model.config).to_dict().items():
        if type(value) is int and value > 0:
            yield name, value


def _check_stored(
    name: str, layer: nn.Module, tensors: Mapping[str, int], facts: Mapping[str, Any]
) -> None:
    """Check that the weights lie in memory as the config says: not packed, not in another form.

    Raises:
        TypeError: if one does not; names it.
    """
    for tensor in tensors:
        path, _, own = tensor.rpartition(".")
        stored: Any = getattr(layer.get_submodule(path), own, None)
        expected = facts[_key(facts, tensor)][1]
        plain = isinstance(stored, Tensor) and tuple(stored.shape) == expected
        if not plain or not stored.is_floating_point() or stored.element_size() == 1:
            raise TypeError(
                f"{tensor} of {name} is quantized or stored in another form than (experts, ...): "
                "prune first, save, and quantize the result"
            )


def _names_experts(block: nn.Module, layer: int) -> str:
    """Return why a table of whole numbers forbids to renumber the experts; "" without one."""
    for path, buffer in (*block.named_parameters(), *block.named_buffers()):
        if not buffer.is_floating_point() and buffer.ndim:
            return f"{path} of layer {layer} names experts by their number"
    return ""
