"""Linear weights on a grid of few bits: in memory as they compute, on disk packed.

The form on disk is `pack-quantized` of compressed-tensors, which transformers and vLLM load. In
memory a weight stays an ordinary tensor whose values lie on the grid, and its module holds the
scales. So every forward, hook and copy works as with full weights. `packed_state` makes the packed
form again, without loss.
"""

# O out_features, I in_features, G groups of a row

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

METHOD = "compressed-tensors"
FORMAT = "pack-quantized"
PER_ROW = -1  # group_size of one scale a row

_GRID = "weight_grid"  # attribute of a module whose weight lies on a grid
_STATE = ("weight", "weight_scale")
_STORED = ("weight_packed", "weight_scale", "weight_shape")
# Modules of compressed-tensors with a progress bar of their own; private names.
_BARS = (
    *("quantization.lifecycle.apply", "compressors.model_compressors.model_compressor"),
    "offload.dispatch",
)
_OFF_GRID = 0.05  # of a step; bfloat16 keeps 4-bit values within 0.02 of one


@dataclass(frozen=True)
class WeightGrid:
    """The grid of a weight (O, I): whole multiples of a scale, so that zero is one of them.

    Attributes:
        bits: of a value.
        group_size: inputs that share a scale; -1 for all inputs of a row.
    """

    bits: int
    group_size: int

    def arguments(self) -> dict[str, Any]:
        """Return what compressed-tensors calls the arguments of a weight's quantization."""
        shape: dict[str, Any] = {"strategy": "channel"}
        if self.group_size != PER_ROW:
            shape = {"strategy": "group", "group_size": self.group_size}
        return {"num_bits": self.bits, "type": "int", "symmetric": True, **shape}


def check_package(what: str) -> None:
    """Check that compressed-tensors is there for something.

    Raises:
        ImportError: if it is missing.
    """
    if find_spec("compressed_tensors") is None:
        raise ImportError(
            f"{what} needs the package compressed-tensors; install it with: "
            "pip install 'prunelight[gptq]'"
        )


def is_packed_config(config: PretrainedConfig) -> bool:
    """Return whether a config says that weights are stored by compressed-tensors."""
    stated = getattr(config, "quantization_config", None)
    method = stated.get("quant_method") if isinstance(stated, dict) else None
    return str(getattr(stated, "quant_method", method)).rpartition(".")[2].lower() in (
        METHOD,
        "compressed_tensors",
    )


@contextmanager
def quiet_package(config: PretrainedConfig) -> Iterator[None]:
    """Silence the progress bars of compressed-tensors, where a config asks for the package."""
    modules: list[Any] = []
    if is_packed_config(config):
        modules = [import_module(f"compressed_tensors.{name}") for name in _BARS]
    had = [getattr(module, "tqdm", None) for module in modules]
    for module in modules:
        module.tqdm = _without_bar
    try:
        yield
    finally:
        for module, bar in zip(modules, had, strict=True):
            module.tqdm = bar


def _without_bar(items: Iterable[Any], *_: Any, **__: Any) -> Iterable[Any]:
    return items


def set_grid(linear: nn.Linear, grid: WeightGrid, scale: Tensor) -> None:
    """Note that the weight of a module lies on a grid, in place.

    Args:
        linear: its weight (O, I) is not changed.
        grid: bits and groups.
        scale: (O, G), of the dtype in which it is stored.
    """
    linear.register_buffer("weight_scale", scale)
    setattr(linear, _GRID, grid)


def linears_on_grids(model: nn.Module) -> Iterator[tuple[str, nn.Linear, WeightGrid]]:
    """Yield name, module and grid of each linear module whose weight lies on a grid."""
    for name, module in model.named_modules():
        grid = getattr(module, _GRID, None)
        if grid is not None:
            assert isinstance(module, nn.Linear)
            yield name, module, grid


def is_on_grid(module: nn.Module) -> bool:
    """Return whether the weight of a module lies on a grid, so that changes would leave it."""
    return hasattr(module, _GRID)


def has_grids(model: nn.Module) -> bool:
    """Return whether weights of a model lie on grids."""
    return any(True for _ in linears_on_grids(model))


def describe_grids(model: PreTrainedModel) -> dict[str, Any]:
    """Return the quantization_config of a model whose weights lie on grids.

    Every linear module without a grid is named as one that other programs must leave alone.
    """
    members: dict[WeightGrid, list[str]] = {}
    for name, _, grid in linears_on_grids(model):
        members.setdefault(grid, []).append(name)
    chosen = {name for names in members.values() for name in names}
    others = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in chosen]
    groups = {
        f"group_{index}": {
            "targets": ["Linear"] if len(members) == 1 else names,
            "weights": grid.arguments(),
            "input_activations": None,
            "output_activations": None,
        }
        for index, (grid, names) in enumerate(members.items())
    }
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": others,
        "kv_cache_scheme": None,
        "version": version("compressed-tensors"),
    }


@torch.no_grad()
def packed_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a model as they are stored: those on a grid are packed.

    Raises:
        ValueError: if a weight has left its grid; names it.
    """
    check_package("a packed model")
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    state = dict(model.state_dict())
    for name, _, grid in linears_on_grids(model):
        own = {key: state.pop(f"{name}.{key}") for key in _STATE}
        scale_dtype = own["weight_scale"].dtype
        own = {key: value.float() for key, value in own.items()}
        arguments = QuantizationArgs(**grid.arguments())
        scheme = QuantizationScheme(targets=[name], weights=arguments)
        packed = PackedQuantizationCompressor.compress(own, scheme)
        _check_on_grid(name, own["weight"], packed, scheme)
        packed["weight_scale"] = packed["weight_scale"].to(scale_dtype)
        state |= {f"{name}.{key}": value for key, value in packed.items()}
    return state


def _check_on_grid(name: str, weight: Tensor, packed: dict[str, Tensor], scheme: Any) -> None:
    from compressed_tensors.compressors import PackedQuantizationCompressor

    again = PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
    scale = packed["weight_scale"]
    step = scale.repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)
    if bool(((again - weight).abs() > _OFF_GRID * step).any()):
        raise ValueError(
            f"{name}.weight was quantized and has changed since, so that it has left its grid of "
            f"{scheme.weights.num_bits} bits; prune and recover in full precision, then quantize"
        )


@torch.no_grad()
def unpack(model: PreTrainedModel) -> None:
    """Turn packed weights, as transformers loads them, into weights on grids, in place.

    Weights of other formats of compressed-tensors, and those with zero points, stay as they were
    loaded.
    """
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.compressors.base import decompress_module

    chosen: list[Any] = [
        module
        for module in model.modules()
        if hasattr(module, "weight_packed") and not hasattr(module, "weight_zero_point")
    ]
    for linear in chosen:
        arguments = linear.quantization_scheme.weights
        size = arguments.group_size if arguments.strategy == "group" else PER_ROW
        grid = WeightGrid(arguments.num_bits, size)
        stored = {key: value.detach() for key, value in linear.state_dict().items()}
        values = PackedQuantizationCompressor.decompress(stored, linear.quantization_scheme)
        decompress_module(linear, leave_decompressed=False)
        for key in _STORED:
            if hasattr(linear, key):
                delattr(linear, key)
        linear.weight = nn.Parameter(values["weight"], requires_grad=False)
        set_grid(linear, grid, values["weight_scale"])
    if not chosen:
        return
    marked: Any = model
    if hasattr(model, "ct_decompress_hook"):
        marked.ct_decompress_hook.remove()
        del marked.ct_decompress_hook
    # With its quantizer transformers would write these weights as if they were packed.
    marked.hf_quantizer, marked.is_quantized = None, False
    model.config.quantization_config = describe_grids(model)
