"""Sizes of a model: number of parameters, bytes, and share of zeros."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunelight.models.families.architectures import sublayers_of
from prunelight.models.families.config_fields import maximum_length
from prunelight.models.families.layers import decoder_layers, layers_path
from prunelight.models.families.matrices import decoder_weights
from prunelight.models.packed.grids import linears_on_grids


def is_quantized(model: PreTrainedModel) -> bool:
    """Return whether a model holds packed weights, of 4 or 8 bits say."""
    return getattr(model.config, "quantization_config", None) is not None


def longest_sequence(model: PreTrainedModel) -> int | None:
    """Return the longest sequence in tokens that a model reads; None without a limit.

    The limit is that of the config, or that of a table of learned positions which is shorter.
    """
    limits = [maximum_length(model.config), *_position_tables(model)]
    return min((limit for limit in limits if limit is not None), default=None)


def _position_tables(model: PreTrainedModel) -> Iterator[int]:
    """Yield how many positions each table of learned positions has, but those of other towers."""
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if _in_other_tower(model, path):
            continue
        if not isinstance(module, nn.Embedding) or not ("position" in name or name == "wpe"):
            continue
        # OPT and BART begin after `offset` rows, RoBERTa after the row of the padding token.
        start = 0 if module.padding_idx is None else module.padding_idx + 1
        yield module.num_embeddings - int(getattr(module, "offset", start))


def _in_other_tower(model: PreTrainedModel, path: str) -> bool:
    """Return whether a module belongs to a part with layers of its own, such as one for images."""
    try:
        decoder = layers_path(model).split(".")
    except TypeError:
        return False
    parts = path.split(".")
    pairs = enumerate(zip(parts, decoder, strict=False))
    common = next((i for i, (part, other) in pairs if part != other), 0)
    branch = model.get_submodule(".".join(parts[: common + 1]))
    return any(isinstance(module, nn.ModuleList) for module in branch.modules())


def parameter_count(model: torch.nn.Module, *, trainable: bool = False) -> int:
    """Return the number of parameters, tied ones once; with `trainable` only of trainable ones."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def depth_unit_sizes(model: PreTrainedModel, granularity: str = "layer") -> list[int]:
    """Return the parameters of each unit that a depth method can remove.

    Args:
        model: whose decoder layers can be found.
        granularity: "layer"; "attention" or "mlp" (the norm before it not counted); "sublayer" is
            both, all attentions first.

    Raises:
        TypeError: if attention and MLP of the family are not known.
    """
    layers = decoder_layers(model)
    if granularity == "layer":
        return [parameter_count(layer) for layer in layers]
    names = sublayers_of(model)
    paths = {"attention": names.attention, "mlp": names.mlp}
    kinds = ("attention", "mlp") if granularity == "sublayer" else (granularity,)
    return [parameter_count(layer.get_submodule(paths[kind])) for kind in kinds for layer in layers]


def parameter_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of all parameters, tied ones once."""
    return tensor_bytes(model.parameters())


def zero_share(parameters: Iterable[Tensor]) -> float:
    """Return the share of exact zeros among all weights, tied ones once, in [0, 1].

    The share is 0 without weights, and for packed 4-bit or 8-bit weights, whose zeros do not show.
    """
    weights = [*parameters]
    nonzero = nonzero_count(weights)
    total = sum(weight.numel() for weight in _distinct(weights))
    return (total - nonzero) / total if total and nonzero is not None else 0.0


@torch.no_grad()
def nonzero_count(parameters: Iterable[Tensor]) -> int | None:
    """Return the number of weights that are not zero, tied ones once.

    None for packed 4-bit or 8-bit weights, whose zeros do not show, and for weights without values.
    """
    weights = _distinct(parameters)
    if any(not w.is_floating_point() or w.element_size() == 1 or w.is_meta for w in weights):
        return None
    return sum(int(torch.count_nonzero(weight)) for weight in weights)


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors, the same one once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _distinct(tensors))


def _distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [*{id(tensor): tensor for tensor in tensors}.values()]


def linear_sparsity(model: PreTrainedModel) -> float:
    """Return the share of zeros in the weights of all decoder layers, in [0, 1].

    Weights that stay dense count too, such as routers and convolutions; vectors do not. The share
    is 0 for a family whose layers cannot be found, and for quantized weights.
    """
    try:
        parameters = decoder_weights(model)
    except TypeError:
        return 0.0
    return zero_share(parameters)


def stored_bytes(model: nn.Module) -> int:
    """Return the bytes of all weights, tied ones once; scales of quantized weights count too.

    Weights on a grid count with the bits in which they are stored.
    """
    tensors: dict[int, Tensor] = {t.data_ptr(): t for t in model.state_dict().values()}
    spared = 0
    for _, linear, grid in linears_on_grids(model):
        weight = linear.weight
        spared += weight.numel() * weight.element_size() - weight.numel() * grid.bits // 8
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) - spared
