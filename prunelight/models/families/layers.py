"""The decoder layers of a model, and their weight matrices, which can be sparsified."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prunelight.models.families.architectures import architecture_of
from prunelight.models.families.config_fields import decoder_config


@dataclass(frozen=True, eq=False)
class Matrix:
    """A weight of a decoder layer that can be sparsified, of `Linear`, `Conv1D` or fused experts.

    Attributes:
        name: dotted path of the module, or of the parameter for fused experts.
        owner: the module whose forward gets the input; for fused experts the experts module.
        parameter_name: name of the weight inside `owner`.
        transposed: whether the weight is stored (in, out), as in a `Conv1D`.
    """

    name: str
    owner: nn.Module
    parameter_name: str = "weight"
    transposed: bool = False

    @property
    def parameter(self) -> Tensor:
        """Return the weight in its stored shape."""
        parameter: Tensor = getattr(self.owner, self.parameter_name)
        return parameter

    @property
    def fused(self) -> bool:
        """Return whether the weight is a stack of experts' weights, (experts, out, in)."""
        return self.parameter.ndim == 3

    def views(self, stored: Tensor | None = None) -> list[Tensor]:
        """Return views (out, in) of the weight: one view, or one view an expert.

        Args:
            stored: a tensor of the weight's stored shape, to view instead of the weight.
        """
        data = self.parameter.data if stored is None else stored
        if data.ndim == 3:
            return list(data)
        return [data.T if self.transposed else data]

    @property
    def in_features(self) -> int:
        """Return the number of input features."""
        return int(self.parameter.shape[0 if self.transposed else -1])


def layers_path(model: PreTrainedModel) -> str:
    """Return the dotted path of the `ModuleList` of decoder layers.

    Raises:
        TypeError: if the family is unknown, and not exactly one `ModuleList` has a member a layer.
    """
    architecture = architecture_of(model)
    if architecture is not None:
        return architecture.layers
    paths = _stacks(model)
    if len(paths) != 1:
        named = f" ({', '.join(paths)})" if paths else ""
        raise TypeError(
            f"the decoder layers of {model.config.model_type} cannot be found: exactly one "
            f"ModuleList must hold them, and {len(paths)} may{named}. Add the family to "
            "prunelight/models/families/architectures.py, as docs/add-a-family.md says"
        )
    return paths[0]


def _stacks(model: PreTrainedModel) -> list[str]:
    """Return the paths of the module lists that may hold the decoder layers; one if it is clear.

    A list inside another list belongs to a layer. Lists with a member for each hidden layer of the
    text decoder come first, then those nearest to the model: encoders of images lie deeper.
    """
    count = getattr(decoder_config(model.config), "num_hidden_layers", None)
    lists: dict[str, int] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(outer + ".") for outer in lists)
        if isinstance(module, nn.ModuleList) and not inside and _holds_layers(module):
            lists[path] = len(module)
    fitting = [path for path, length in lists.items() if length == count] or [*lists]
    depth = min((path.count(".") for path in fitting), default=0)
    return [path for path in fitting if path.count(".") == depth]


def _holds_layers(modules: nn.ModuleList) -> bool:
    """Return whether all members have weights in modules of their own, as decoder layers do."""
    return len(modules) > 0 and all(
        any(len(list(child.parameters())) for child in module.children()) for module in modules
    )


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the model's decoder layers (Mamba mixers and RWKV blocks included).

    Raises:
        TypeError: if the layers cannot be found, see `layers_path`.
    """
    layers = model.get_submodule(layers_path(model))
    assert isinstance(layers, nn.ModuleList)
    return layers


def layer_matrices(model: PreTrainedModel, index: int) -> list[Matrix]:
    """Return the weights of one decoder layer that can be sparsified, in the order of its modules.

    These are the projections of attention, mixer and MLP, and fused experts; never routers, norms,
    embeddings or the head. In a family outside the table: every `Linear` and `Conv1D` of the layer.

    Raises:
        TypeError: if a projection is quantized: packed weights cannot be set to zero one by one.
    """
    family, layer = architecture_of(model), decoder_layers(model)[index]
    prefix = f"{layers_path(model)}.{index}"
    layer_weights = []
    for path, module in layer.named_modules():
        name = path.rpartition(".")[2]
        if family is not None and name not in family.projections + family.not_adapted:
            continue
        if not isinstance(module, (nn.Linear, Conv1D)):
            continue
        if not module.weight.is_floating_point() or module.weight.shape[-1] == 1:
            raise TypeError(
                f"{prefix}.{path} is a quantized {type(module).__name__} ({module.weight.dtype}): "
                "prune first, save, and load the result in 4 or 8 bits"
            )
        transposed = isinstance(module, Conv1D)
        layer_weights.append(Matrix(f"{prefix}.{path}", module, transposed=transposed))
    for path in family.experts if family is not None else ():
        owner, _, parameter = path.rpartition(".")
        if hasattr(layer.get_submodule(owner.partition(".")[0]), "experts"):
            layer_weights.append(Matrix(f"{prefix}.{path}", layer.get_submodule(owner), parameter))
    return layer_weights


def matrices(model: PreTrainedModel) -> dict[str, Matrix]:
    """Return all weights of the decoder layers that can be sparsified, by name."""
    layers = range(len(decoder_layers(model)))
    return {m.name: m for index in layers for m in layer_matrices(model, index)}


def first_tensor(value: Any) -> Tensor:
    """Return the hidden states of a layer's output: the output itself, or its first member."""
    return value[0] if isinstance(value, (tuple, list)) else value
