"""The weights of decoder layers: which matrices can be sparsified, and which stay dense and why.

A matrix is every weight that multiplies hidden states: projections of attention, mixer and MLP,
shared experts, and stacks of experts. What picks experts or mixes streams stays dense: a module
beside experts that gives no hidden states back is a router, and a matrix with fewer outputs than
one attention head is a gate. Convolutions, tables and states are no matrices. All of them count as
weights of the layer.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prunelight.models.families.architectures import is_sliced, names_apart, stacks_of
from prunelight.models.families.config_fields import decoder_config, narrowest_head
from prunelight.models.families.layers import decoder_layers, layers_path
from prunelight.models.families.own_classes.sliced import SHORTCUTS
from prunelight.models.packed.grids import is_on_grid

PICKS_EXPERTS, GATE = "picks experts", "gate, with fewer values than an attention head"
_ENCODER_STATES = "encoder_hidden_states is not None"
_IDLE = "runs only beside an encoder"
_LEFT_OUT = "not among the projections of the family's entry"
_CONVOLUTION, _TABLE, _OTHER = "convolution", "table", "no known product with hidden states"

# A router knows at most so many choices for each expert: some experts compute nothing.
_CHOICES = 2


@dataclass(frozen=True, eq=False)
class Matrix:
    """A weight of a decoder layer that can be sparsified, of `Linear`, `Conv1D` or fused experts.

    Attributes:
        name: dotted path of the module, or of the parameter for fused experts.
        owner: the module whose forward gets the input; for fused experts the experts module.
        parameter_name: name of the weight inside `owner`.
        transposed: whether the weight is stored (in, out), as in a `Conv1D`.
        experts: number of experts whose weights are stacked; None for one matrix.
        read_directly: the module around it reads the weight itself, so that nothing that replaces
            the forward of the owner, such as an adapter, would act.
    """

    name: str
    owner: nn.Module
    parameter_name: str = "weight"
    transposed: bool = False
    experts: int | None = None
    read_directly: bool = False

    @property
    def parameter(self) -> Tensor:
        """Return the weight in its stored shape."""
        parameter: Tensor = getattr(self.owner, self.parameter_name)
        return parameter

    @property
    def fused(self) -> bool:
        """Return whether the weight is a stack of experts' weights."""
        return self.experts is not None

    def views(self, stored: Tensor | None = None) -> list[Tensor]:
        """Return views (out, in) of the weight: one view, or one view an expert.

        Args:
            stored: a tensor of the weight's stored shape, to view instead of the weight.
        """
        data = self.parameter.detach() if stored is None else stored
        parts = [data] if self.experts is None else list(data.unflatten(0, (self.experts, -1)))
        if data.ndim == 3:
            parts = list(data)
        return [part.T for part in parts] if self.transposed else parts

    @property
    def in_features(self) -> int:
        """Return the number of input features."""
        return int(self.views()[0].shape[-1])


@contextmanager
def naming_matrices(*matrices: Matrix) -> Iterator[None]:
    """Put the names of matrices into a ValueError that is raised inside."""
    try:
        yield
    except ValueError as error:
        names = ", ".join(matrix.name for matrix in matrices)
        raise ValueError(f"{names}: {error}") from error


@dataclass
class LayerWeights:
    """The weights of one decoder layer.

    Attributes:
        matrices: those that can be sparsified, in the order of the modules.
        dense: name of each other weight of two dimensions or more -> why it stays dense.
    """

    matrices: list[Matrix] = field(default_factory=list)
    dense: dict[str, str] = field(default_factory=dict)


def layer_weights(model: PreTrainedModel, index: int, *, packed: bool = False) -> LayerWeights:
    """Return the weights of one decoder layer, sorted by what can be done with them.

    Args:
        model: whose layers are looked at.
        index: of the decoder layer.
        packed: take quantized projections too, which can be adapted but not sparsified.

    Raises:
        TypeError: if a projection is quantized: packed weights cannot be set to zero one by one.
    """
    layers, prefix = decoder_layers(model), f"{layers_path(model)}.{index}"
    layer, shared = layers[index], {id(p) for other in layers[:index] for p in other.parameters()}
    stacks = {path: _stacks(model, path, module) for path, module in layer.named_modules()}
    routers = _routers(layer, stacks, _hidden_size(model))
    layer_class: Any = type(layer)
    beside_encoder = _parts_beside_encoder(layer_class)
    narrow = min(narrowest_head(model.config, index), max(2, _hidden_size(model) // 4))
    weights = LayerWeights()
    for path, module in layer.named_modules():
        full = f"{prefix}.{path}".strip(".")
        router, idle = _is_under(path, routers), _is_under(path, beside_encoder)
        linear = isinstance(module, (nn.Linear, Conv1D))
        if linear and not packed:
            _check_unpacked(full, module)
        for name in _own_matrices(module) if linear else _own_weights(module):
            if id(module._parameters[name]) in shared:
                continue  # the weights of an earlier layer
            if router or idle:
                weights.dense[f"{full}.{name}"] = PICKS_EXPERTS if router else _IDLE
            elif name in stacks[path]:
                experts, transposed = stacks[path][name]
                direct = _read_directly(layer, path, name)
                matrix = Matrix(f"{full}.{name}", module, name, transposed, experts, direct)
                weights.matrices.append(matrix)
            elif reason := _why_dense(module, narrow):
                weights.dense[f"{full}.{name}"] = reason
            else:
                left_out, no_lora = names_apart(model, path)
                if left_out:
                    weights.dense[f"{full}.{name}"] = _LEFT_OUT
                    continue
                direct, conv1d = _read_directly(layer, path, name), isinstance(module, Conv1D)
                matrix = Matrix(full, module, name, conv1d, None, direct or no_lora)
                weights.matrices.append(matrix)
    return weights


def layer_matrices(model: PreTrainedModel, index: int) -> list[Matrix]:
    """Return the weights of one decoder layer that can be sparsified, in the order of its modules.

    Raises:
        TypeError: see `layer_weights`.
    """
    return layer_weights(model, index).matrices


def matrices(model: PreTrainedModel) -> dict[str, Matrix]:
    """Return all weights of the decoder layers that can be sparsified, by name."""
    layers = range(len(decoder_layers(model)))
    return {m.name: m for index in layers for m in layer_matrices(model, index)}


def dense_weights(model: PreTrainedModel) -> dict[str, str]:
    """Return all weights of the decoder layers that stay dense: name -> why."""
    layers = range(len(decoder_layers(model)))
    return {n: why for index in layers for n, why in layer_weights(model, index).dense.items()}


def dense_places(model: PreTrainedModel) -> dict[str, list[str]]:
    """Return which weights of the decoder layers stay dense: why -> their names inside a layer."""
    places: dict[str, dict[str, None]] = {}  # the names as keys, so that each comes once
    prefix = f"{layers_path(model)}."
    for name, reason in dense_weights(model).items():
        place = name.removeprefix(prefix).partition(".")[2]
        places.setdefault(reason, {})[place] = None
    return {reason: [*names] for reason, names in places.items()}


def share_of_matrices(model: PreTrainedModel) -> float:
    """Return the share of the decoder layers' weights that can be sparsified, in [0, 1]."""
    weights = {id(weight): weight.numel() for weight in decoder_weights(model)}
    sparsified = sum(matrix.parameter.numel() for matrix in matrices(model).values())
    return sparsified / sum(weights.values()) if weights else 0.0


def decoder_weights(model: PreTrainedModel) -> list[Tensor]:
    """Return all weights of the decoder layers, those that stay dense too; vectors are left out.

    Raises:
        TypeError: if a projection is quantized.
    """
    weights, prefix = [], layers_path(model)
    for path, module in decoder_layers(model).named_modules():
        linear = isinstance(module, (nn.Linear, Conv1D))
        if linear:
            _check_unpacked(f"{prefix}.{path}", module)
        names = _own_matrices(module) if linear else _own_weights(module)
        weights += [getattr(module, name) for name in names]
    return weights


def lora_targets(model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """Return what LoRA adapts: (names of linear modules, paths of fused expert parameters).

    A name is as short as it can be: no other module of the model ends in it.
    """
    check_apart(model)
    prefix = re.escape(layers_path(model)) + r"\.\d+\."
    layers = range(len(decoder_layers(model)))
    known = (m for index in layers for m in layer_weights(model, index, packed=True).matrices)
    chosen = [matrix for matrix in known if not matrix.read_directly]
    paths = {matrix.name for matrix in chosen if not matrix.fused}
    stacks = {re.sub(f"^{prefix}", "", matrix.name): None for matrix in chosen if matrix.fused}
    others = [f".{name}" for name, _ in model.named_modules() if name not in paths]
    names: dict[str, None] = {}
    for path in sorted({re.sub(f"^{prefix}", "", path) for path in paths}):
        parts = path.split(".")
        suffixes = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        fitting = (s for s in suffixes if not any(name.endswith(f".{s}") for name in others))
        names[next(fitting, path)] = None
    return [*names, *(SHORTCUTS if is_sliced(model) else ())], [*stacks]


def check_apart(model: PreTrainedModel) -> None:
    """Check that no two modules of the decoder layers hold one weight, as adapters would not know.

    Raises:
        TypeError: if two do; names the weight.
    """
    holders: dict[int, nn.Module] = {}
    for path, module in decoder_layers(model).named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and holders.setdefault(id(parameter), module) is not module:
                raise TypeError(
                    f"decoder layers of {model.config.model_type} share {path}.{name}: an adapter "
                    "of one module would change the others; take recovery=full"
                )


def _own_weights(module: nn.Module) -> Iterator[str]:
    """Yield the names of a module's own weights, without vectors and biases."""
    for name, parameter in module._parameters.items():
        if parameter is None or parameter.ndim < 2 or name.endswith("bias"):
            continue
        if parameter.numel() > max(parameter.shape):
            yield name


def _check_unpacked(name: str, linear: nn.Module) -> None:
    weight: Any = linear.weight
    if is_on_grid(linear):
        raise TypeError(
            f"{name} is a quantized {type(linear).__name__} (GPTQ): prune first, save, and "
            "quantize the result (prunelight export DIR --to gptq)"
        )
    if not weight.is_floating_point() or weight.element_size() == 1 or weight.shape[-1] == 1:
        raise TypeError(
            f"{name} is a quantized {type(linear).__name__} ({weight.dtype}): prune first, save, "
            "and load the result in 4 or 8 bits"
        )


def _stacks(model: PreTrainedModel, path: str, module: nn.Module) -> dict[str, tuple[int, bool]]:
    """Return the stacks of experts that a module holds: name -> (experts, whether transposed).

    transformers marks the modules of fused experts; the table of families says what it does not.
    """
    known = stacks_of(model, path)
    stacks = {}
    for name in _own_weights(module):
        parameter = module._parameters[name]
        assert parameter is not None
        marked = isinstance(getattr(module, "is_transposed", None), bool)
        if name in known:
            experts = len(parameter) if parameter.ndim == 3 else _num_experts(module)
            stacks[name] = (experts, known[name])
        elif marked and parameter.ndim == 3:
            stacks[name] = (len(parameter), bool(module.is_transposed))
    return stacks


def _num_experts(module: nn.Module) -> int:
    """Return of how many experts a module holds weights as one matrix."""
    names = (name for name in vars(module) if name.endswith("num_experts"))
    return int(getattr(module, next(names)))


def _routers(
    layer: nn.Module, stacks: dict[str, dict[str, tuple[int, bool]]], hidden_size: int
) -> set[str]:
    """Return the paths of the modules that pick experts or weigh them.

    They stand beside experts, hold weights, and give no hidden states back: none of their weights
    has as many outputs as hidden states are wide, and the last has few.
    """
    holders = {path: max(n for n, _ in found.values()) for path, found in stacks.items() if found}
    for path, module in layer.named_modules():
        if isinstance(module, nn.ModuleList) and _are_experts(module):
            holders[path] = len(module)
    routers: set[str] = set()
    for path, experts in holders.items():
        while path:
            block, _, _ = path.rpartition(".")
            beside = {
                f"{block}.{name}".strip("."): child
                for name, child in layer.get_submodule(block).named_children()
            }
            found = {
                root
                for root, child in beside.items()
                if not any(holder == root or holder.startswith(f"{root}.") for holder in holders)
                if _picks(child, hidden_size, experts)
            }
            routers |= found
            if found:
                break
            path = block
    return routers


def _are_experts(modules: nn.ModuleList) -> bool:
    """Return whether a list holds several modules of one class that each hold several matrices."""
    linears = [sum(isinstance(x, nn.Linear) for x in module.modules()) for module in modules]
    return len({type(module) for module in modules}) == 1 < len(modules) and min(linears) > 1


def _picks(module: nn.Module, hidden_size: int, experts: int) -> bool:
    outputs = [
        getattr(module_part, name).shape[1 if isinstance(module_part, Conv1D) else 0]
        for module_part in module.modules()
        if not isinstance(module_part, (nn.Conv1d, nn.Embedding))
        for name in _own_matrices(module_part)
    ]
    return bool(outputs) and hidden_size not in outputs and outputs[-1] <= _CHOICES * experts


def _own_matrices(module: nn.Module) -> Iterator[str]:
    """Yield the names of a module's own 2-D weights; a gate of one output is one of them."""
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.ndim == 2 and not name.endswith("bias"):
            yield name


def _hidden_size(model: PreTrainedModel) -> int:
    embeddings: Any = model.get_input_embeddings()
    width = getattr(decoder_config(model.config), "hidden_size", None)
    return int(width or embeddings.weight.shape[1])


def _why_dense(module: nn.Module, narrow: int) -> str:
    """Return why the weights of a module stay dense; "" for a linear one that can be sparsified."""
    if reason := getattr(module, "stays_dense", ""):
        return str(reason)
    if isinstance(module, (nn.Linear, Conv1D)):
        if min(_widths(module)) < narrow:
            return GATE
        return "" if _is_plain(module) else _OTHER
    if isinstance(module, nn.Embedding):
        return _TABLE
    return _CONVOLUTION if "Conv" in type(module).__name__ else _OTHER


def _widths(linear: Any) -> tuple[int, ...]:
    """Return the numbers of inputs and outputs, which packed weights do not show."""
    if isinstance(linear, nn.Linear):
        return linear.in_features, linear.out_features
    return tuple(linear.weight.shape)


@torch.no_grad()
def _is_plain(linear: Any) -> bool:
    """Return whether a linear module maps (..., in) to (..., out), whatever its class."""
    if type(linear).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    weight: Tensor = linear.weight
    if weight.shape != _widths(linear)[::-1]:
        return True  # packed, by a library whose classes stand for linear ones
    try:
        output = linear(weight.new_zeros(1, 1, weight.shape[1]))
    except (RuntimeError, TypeError):
        return False
    return isinstance(output, Tensor) and output.shape == (1, 1, weight.shape[0])


def _is_under(path: str, roots: Collection[str]) -> bool:
    return any(path == root or path.startswith(f"{root}.") for root in roots)


@cache
def _parts_beside_encoder(layer_class: Any) -> frozenset[str]:
    """Return the parts that a layer's code calls only where there are states of an encoder."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(layer_class.forward)))
    except (OSError, TypeError):  # a class that was made without a file
        return frozenset()
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and _ENCODER_STATES in ast.unparse(node.test):
            calls = (x for part in node.body for x in ast.walk(part) if isinstance(x, ast.Call))
            names |= {ast.unparse(call.func) for call in calls}
    return frozenset(name.removeprefix("self.") for name in names if name.startswith("self."))


def _read_directly(layer: nn.Module, path: str, weight: str) -> bool:
    """Return whether the module around another one reads its weight in code of its own."""
    around, _, name = path.rpartition(".")
    around_class: Any = type(layer.get_submodule(around))
    return (name, weight) in _attributes_read_by(around_class)


@cache
def _attributes_read_by(module_class: Any) -> frozenset[tuple[str, str]]:
    """Return which attributes of its parts the code of a class reads: (part, attribute)."""
    try:
        source = inspect.getsource(module_class)
    except (OSError, TypeError):  # a class that was made without a file
        return frozenset()
    facts_only = r"(?!\.(?:dtype|device|shape|size|ndim|numel))"
    return frozenset(re.findall(rf"self\.(\w+)\.(\w+)\b{facts_only}", source))
