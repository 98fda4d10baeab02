"""The decoder layers of a model, and the weights in them that can be sparsified."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prunelight.models.families.architectures import ARCHITECTURES, architecture_of

# Attributes in which transformers keeps a layer's own index (it selects the cache slot).
INDEX_ATTRIBUTES = ("layer_idx", "layer_id")


@dataclass(frozen=True, eq=False)
class Matrix:
    """A weight of a decoder layer that can be sparsified, of `Linear`, `Conv1D` or fused experts.

    Attributes:
        name: dotted path of the module, or of the parameter for fused experts.
        owner: the module whose forward gets the input; the experts module for fused experts.
        parameter_name: name of the weight inside `owner`.
        transposed: stored (in, out), as a `Conv1D` does.
    """

    name: str
    owner: nn.Module
    parameter_name: str = "weight"
    transposed: bool = False

    @property
    def parameter(self) -> Tensor:
        """Return the weight as it is stored."""
        parameter: Tensor = getattr(self.owner, self.parameter_name)
        return parameter

    @property
    def fused(self) -> bool:
        """Return whether it is a stack of experts' weights, (experts, out, in)."""
        return self.parameter.ndim == 3

    def views(self, stored: Tensor | None = None) -> list[Tensor]:
        """Return views (out, in) of the weight, or of a tensor like it: one, or one an expert."""
        data = self.parameter.data if stored is None else stored
        if data.ndim == 3:
            return list(data)
        return [data.T if self.transposed else data]

    @property
    def in_features(self) -> int:
        """Return the width of the input."""
        return int(self.parameter.shape[0 if self.transposed else -1])


def layers_path(model: PreTrainedModel) -> str:
    """Return the dotted path of the `ModuleList` of decoder layers.

    Raises:
        TypeError: if the family is unknown and the structure does not tell which list it is.
    """
    known = architecture_of(model)
    if known is not None:
        return known.layers
    count = getattr(model.config, "num_hidden_layers", None)
    paths = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if len(paths) != 1:
        raise TypeError(
            f"model_type={model.config.model_type!r} is not a known family and {len(paths)} module "
            f"lists have num_hidden_layers={count} members, exactly one must; known families: "
            f"{', '.join(sorted(ARCHITECTURES))}. Add an entry to "
            "prunelight/models/families/architectures.py"
        )
    return paths[0]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the model's decoder layers (Mamba mixers and RWKV blocks included).

    Raises:
        TypeError: if they cannot be found, see `layers_path`.
    """
    layers = model.get_submodule(layers_path(model))
    assert isinstance(layers, nn.ModuleList)
    return layers


def layer_matrices(model: PreTrainedModel, index: int) -> list[Matrix]:
    """Return the weights of one decoder layer that can be sparsified, in the order of its modules.

    Projections of attention, mixer and MLP, and fused experts; never routers, norms, embeddings or
    the head. In a family that is not in the table: every `Linear` and `Conv1D` of the layer.

    Raises:
        TypeError: if a projection is quantized: it has no weight matrix to put zeros into.
    """
    known, layer = architecture_of(model), decoder_layers(model)[index]
    prefix = f"{layers_path(model)}.{index}"
    found = []
    for path, module in layer.named_modules():
        name = path.rpartition(".")[2]
        if known is not None and name not in known.projections + known.not_adapted:
            continue
        if not isinstance(module, (nn.Linear, Conv1D)):
            continue
        if not module.weight.is_floating_point() or module.weight.shape[-1] == 1:
            raise TypeError(
                f"{prefix}.{path} is a quantized {type(module).__name__} ({module.weight.dtype}): "
                "prune first, save, and load the result in 4 or 8 bits"
            )
        found.append(Matrix(f"{prefix}.{path}", module, transposed=isinstance(module, Conv1D)))
    for path in known.experts if known is not None else ():
        owner, _, parameter = path.rpartition(".")
        if hasattr(layer.get_submodule(owner.partition(".")[0]), "experts"):
            found.append(Matrix(f"{prefix}.{path}", layer.get_submodule(owner), parameter))
    return found


def matrices(model: PreTrainedModel) -> dict[str, Matrix]:
    """Return all weights of the decoder layers that can be sparsified, by name; see `Matrix`."""
    layers = range(len(decoder_layers(model)))
    return {m.name: m for index in layers for m in layer_matrices(model, index)}


def first_tensor(value: Any) -> Tensor:
    """Return the hidden states of a layer's output, which is a tensor or a tuple that starts so."""
    return value[0] if isinstance(value, (tuple, list)) else value
