"""The tensors of a model as llama.cpp names, orders and encodes them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from prunelight.export.gguf.families import GgufFamily, rope_parameters
from prunelight.models.families.config_fields import head_dim

_EXPERT = re.compile(r"(.*\.layers\.\d+\.(?:mlp|block_sparse_moe)\.experts)\.(\d+)\.(\w+)\.weight")
_CONV1D = re.compile(r".*\.(c_attn|c_proj|c_fc)\.weight")  # GPT-2 keeps these transposed
_PERMUTED = re.compile(r".*\.(q_proj|k_proj)\.(weight|bias)")
# Always in float32: what has one dimension, norms, and these.
_FLOAT32 = re.compile(r".*_norm\.weight|.*\.ffn_gate_inp\.weight|position_embd\.weight|rope_.*")


@dataclass(frozen=True)
class GgufTensor:
    """A tensor to write: its name in the file, its shape, and how it is made when it is written."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def weights_on_disk(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return a model's weights by their names on disk, where experts are stored one by one.

    The embedding stands for a head that shares its weight.
    """
    weights = revert_weight_conversion(model, dict(model.state_dict()))
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    return weights


def gguf_tensors(
    config: Any, weights: dict[str, Tensor], family: GgufFamily
) -> Iterator[GgufTensor]:
    """Yield the tensors of a model in float32.

    Args:
        config: of the model.
        weights: by their names on disk.
        family: of the model.

    Raises:
        ValueError: if a weight has no name in llama.cpp; names it.
    """
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.architecture], config.num_hidden_layers)
    width = head_dim(config)
    for name, tensors in _with_joined_experts(weights):
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise ValueError(
                f"{name} has no name in llama.cpp's architecture {family.architecture}; llama.cpp "
                "cannot hold this model"
            )
        shape = tuple(tensors[0].shape)
        if len(tensors) > 1:
            shape = (len(tensors), *shape)
        if family.architecture == "GPT2" and _CONV1D.fullmatch(name):
            shape = shape[::-1]
        yield GgufTensor(new, shape, _maker(name, tensors, family, width))
    if family.head == "always" and config.tie_word_embeddings:
        (embedding,) = (w for name, w in weights.items() if name.endswith("embed_tokens.weight"))
        yield GgufTensor("output.weight", tuple(embedding.shape), lambda: embedding)
    if rope_parameters(config).get("rope_type") == "llama3":
        factors = _rope_factors(config)
        yield GgufTensor("rope_freqs.weight", tuple(factors.shape), lambda: factors)


def _with_joined_experts(weights: dict[str, Tensor]) -> Iterator[tuple[str, list[Tensor]]]:
    """Yield name and tensor of each weight; the experts of a layer as one list."""
    experts: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for name, tensor in weights.items():
        if match := _EXPERT.fullmatch(name):
            before, number, projection = match.groups()
            before = before.replace("block_sparse_moe", "feed_forward").removeprefix("model.")
            if "feed_forward" not in before:
                before = f"model.{before}"
            experts[f"{before}.{projection}.weight"][int(number)] = tensor
        else:
            yield name, [tensor]
    for name, by_number in experts.items():
        yield name, [by_number[number] for number in sorted(by_number)]


def _maker(
    name: str, tensors: list[Tensor], family: GgufFamily, width: int
) -> Callable[[], Tensor]:
    def make() -> Tensor:
        tensor = torch.stack(tensors) if len(tensors) > 1 else tensors[0]
        tensor = tensor.detach().float()
        if family.permutes and _PERMUTED.fullmatch(name):
            return in_pairs(tensor, width)
        if family.adds_one and name.endswith("norm.weight"):
            return tensor + 1
        if family.architecture == "GPT2" and _CONV1D.fullmatch(name):
            return tensor.T
        return tensor

    return make


def in_pairs(rows: Tensor, width: int) -> Tensor:
    """Put the two rows that RoPE rotates together beside each other, in each head.

    Args:
        rows: of queries or keys, (heads * width, ...); a weight or a bias.
        width: of a head.
    """
    rest = rows.shape[1:]
    return rows.reshape(-1, 2, width // 2, *rest).swapaxes(1, 2).reshape(rows.shape)


def _rope_factors(config: Any) -> Tensor:
    """Return by what each frequency of RoPE is divided, (width / 2,), for Llama 3's scaling."""
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    steps = torch.arange(0, 2 * len(scaled), 2, dtype=torch.float32) / (2 * len(scaled))
    return (1.0 / rope_parameters(config)["rope_theta"] ** steps) / scaled


def encoding(name: str, shape: tuple[int, ...], dtype: str) -> str:
    """Return how a tensor is encoded, a name of gguf's GGMLQuantizationType, as llama.cpp does.

    Blocks of 32 weights have a scale in q8_0; rows that do not divide so stay in float16.
    """
    if len(shape) <= 1 or _FLOAT32.fullmatch(name) or not name.endswith(".weight"):
        return "F32"
    if dtype == "q8_0" and shape[-1] % 32:
        return "F16"
    return dtype.upper()


def encoded(tensor: Tensor, kind: str) -> np.ndarray[Any, Any]:
    """Return a tensor as the bytes, or floats, of an encoding."""
    import gguf

    array = np.ascontiguousarray(tensor.numpy())
    return np.asarray(gguf.quants.quantize(array, gguf.GGMLQuantizationType[kind]))
