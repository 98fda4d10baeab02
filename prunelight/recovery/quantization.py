"""Recovery in 4 or 8 bits: QLoRA (arXiv:2305.14314) and LLM.int8() (arXiv:2208.07339).

The projections of the decoder layers become layers of bitsandbytes, in memory, from the
full-precision base. So hub ids, directories and GGUF files are treated alike, and adapters are
merged onto the very base that was quantized. Embeddings, head, norms, shortcuts of sliced models
and fused expert weights stay in full precision. Nothing quantized is written to disk.

Private names of bitsandbytes used here: `CB` and `SCB` of `Int8Params` and of a layer's `state`,
`Linear4bit.support_avx512bf16_for_cpu`, and the logger of its autograd functions. Tested with
bitsandbytes 0.50; tests/recovery/test_private_apis.py checks that these names exist.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from prunelight.models.families.matrices import Matrix, matrices
from prunelight.models.loading import DTYPES
from prunelight.models.packed.grids import has_grids
from prunelight.models.sizes import is_quantized
from prunelight.runtime.arguments import check_choice, check_fields

QUANTIZATIONS = ("none", "nf4", "fp4", "int8")

FOUR_BIT = ("nf4", "fp4")

# bitsandbytes quantizes 4-bit weights in blocks of 64 inputs. For rows that are no multiple of 64,
# its kernel for CPUs with AVX512-BF16 fails, and its CUDA kernels fall back to dequantization.
BLOCK = 64

_REMEDIES = {
    "residual_dims": f"round_to={BLOCK}",
    "round_to": f"round_to={BLOCK}",
    "intermediate_size": f"multiple={BLOCK}",
    "multiple": f"multiple={BLOCK}",
}


@dataclass(frozen=True)
class BitsAndBytes:
    """Settings of quantization, in the words of bitsandbytes.

    Attributes:
        use_double_quant: quantize the scales of 4-bit blocks too, which saves 0.37 bits per weight.
        compute_dtype: dtype of the products with 4-bit weights: auto (the dtype of the
            activations), float32, bfloat16 or float16.

    Raises:
        ValueError: if the dtype is unknown.
    """

    use_double_quant: bool = True
    compute_dtype: str = "auto"

    def __post_init__(self) -> None:
        """Check the values."""
        check_fields(self, "bitsandbytes.")
        check_choice("bitsandbytes.compute_dtype", self.compute_dtype, ("auto", *DTYPES))


def check_kind(kind: str, options: BitsAndBytes, recovery: str) -> None:
    """Check the arguments of a quantization, before anything is loaded.

    Raises:
        ValueError: as `check_combination` does.
        ImportError: if bitsandbytes is missing.
    """
    check_combination(kind, options, recovery)
    if kind != "none":
        check_installed(f"quantization={kind!r}")


def check_combination(kind: str, options: BitsAndBytes, recovery: str) -> None:
    """Check the arguments of a quantization, wherever it will be done.

    Raises:
        ValueError: if the kind is unknown, options have no effect, or all weights would be trained.
    """
    check_choice("quantization", kind, QUANTIZATIONS)
    if kind not in FOUR_BIT and options != BitsAndBytes():
        raise ValueError(f"{options} has no effect with quantization={kind!r}; leave it out")
    if kind != "none" and recovery == "full":
        raise ValueError(
            f"quantization={kind!r} keeps the base frozen, recovery='full' trains it; set "
            "recovery=lora, or quantization=none"
        )


def check_installed(option: str) -> None:
    """Check that bitsandbytes is there for an option.

    Raises:
        ImportError: if it is missing.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            f"{option} needs the package bitsandbytes; install it with: pip install "
            "'prunelight[quantization]'"
        )


def describe_kind(kind: str, options: BitsAndBytes) -> str:
    """Return kind and options in words, for the report."""
    if kind not in FOUR_BIT:
        return kind
    double = "double" if options.use_double_quant else "single"
    return f"{kind} ({double} quantization, compute dtype {options.compute_dtype})"


def check_quantizable(model: PreTrainedModel, kind: str, source: str | Path | None = None) -> None:
    """Check that the projections of a model can be quantized.

    Args:
        model: the model in full precision.
        kind: one of `QUANTIZATIONS`; "none" passes.
        source: where the model is read again to merge adapters onto it; "" for a model that exists
            only in memory, None for no such check.

    Raises:
        TypeError: if the model is quantized already.
        ValueError: if the width of an input does not suit 4 bits, or the model exists only in
            memory.
    """
    if kind == "none":
        return
    if source == "":
        raise ValueError(
            f"quantization={kind} reads the base again to merge adapters onto it, and this model "
            "exists only in memory; save it (prunelight.save) and give its directory as name"
        )
    if is_quantized(model):
        raise TypeError(
            f"model {model.config._name_or_path!r} is quantized already; give the one in full "
            f"precision: quantization={kind} quantizes that one, and merges adapters onto it"
        )
    sliced = getattr(model.config, "residual_dims", None) or []
    dims = {f"residual_dims[{i}]": width for i, width in enumerate(sliced)}
    inputs = {f"in_features of {m.name}": m.in_features for m in quantized_matrices(model)}
    check_widths({**dims, **inputs}, kind)


def check_trainable(model: PreTrainedModel, recovery: str) -> None:
    """Check that a recovery can change the weights of a model.

    Raises:
        TypeError: if full training is asked for, and the model was loaded in 4 or 8 bits; or
            adapters, and it was quantized by GPTQ.
    """
    if recovery == "lora" and has_grids(model):
        raise TypeError(
            f"model {model.config._name_or_path!r} was quantized by GPTQ, and adapters merged onto "
            "its weights would leave their grid; prune and recover in full precision, then: "
            "prunelight export DIR --to gptq"
        )
    if recovery == "full" and is_quantized(model):
        raise TypeError(
            f"model {model.config._name_or_path!r} holds packed weights, which recovery=full "
            "cannot change; take recovery=lora, or give the model in full precision"
        )


def check_widths(widths: Mapping[str, int], kind: str) -> None:
    """Check widths of inputs against the blocks of 4-bit weights.

    Args:
        widths: name of an argument or matrix -> width of inputs that it sets.
        kind: one of `QUANTIZATIONS`; only 4-bit kinds restrict widths.

    Raises:
        ValueError: naming the first width that is no multiple of `BLOCK`.
    """
    for name, width in widths.items():
        if kind in FOUR_BIT and width % BLOCK:
            remedy = _REMEDIES.get(name.partition("[")[0], "quantization=int8")
            raise ValueError(
                f"{name}={width} must be a multiple of {BLOCK} for 4-bit recovery; set {remedy} or "
                "quantization=none"
            )


def quantized_matrices(model: PreTrainedModel) -> list[Matrix]:
    """Return the weights to quantize: projections, but no fused experts and none of a Mamba.

    Weights that the code around their module reads itself stay in full precision.
    """
    return [m for m in matrices(model).values() if not (m.fused or m.read_directly)]


@torch.no_grad()
def quantize(
    model: PreTrainedModel, kind: str, options: BitsAndBytes, device: torch.device | None = None
) -> None:
    """Quantize the projections of a model in full precision, in place.

    Args:
        model: the model as loaded or pruned, without adapters.
        kind: "nf4", "fp4" or "int8".
        options: settings of 4-bit weights.
        device: device that matrices move to, one after another; None leaves them where they are.

    Raises:
        TypeError, ValueError: see `check_quantizable`.
    """
    check_quantizable(model, kind)
    for matrix in quantized_matrices(model):
        layer = _quantized_layer(matrix, kind, options, device or matrix.parameter.device)
        model.set_submodule(matrix.name, layer)
    flags: Any = model  # transformers sets these flags, and peft chooses its layers by them
    flags.is_loaded_in_4bit, flags.is_loaded_in_8bit = kind in FOUR_BIT, kind == "int8"
    if kind == "int8":  # it logs a line per product that activations are cast to float16
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def _quantized_layer(
    matrix: Matrix, kind: str, options: BitsAndBytes, device: torch.device
) -> nn.Module:
    """Return a layer of bitsandbytes that holds the matrix (out, in) in 4 or 8 bits."""
    from bitsandbytes import nn as layers  # an optional package

    W, bias = matrix.views()[0].contiguous(), getattr(matrix.owner, "bias", None)
    layer: Any
    with torch.device("meta"):
        if kind == "int8":
            shape = (W.shape[1], W.shape[0], bias is not None)
            # The threshold of outliers is the paper's.
            layer = layers.Linear8bitLt(*shape, has_fp16_weights=False, threshold=6.0)
        else:
            layer = layers.Linear4bit(
                W.shape[1],
                W.shape[0],
                bias is not None,
                compute_dtype=DTYPES.get(options.compute_dtype),
                compress_statistics=options.use_double_quant,
                quant_type=kind,
            )
    if kind == "int8":
        # From the CPU: a weight that is on CUDA already would not be quantized.
        layer.weight = layers.Int8Params(W.cpu(), requires_grad=False, has_fp16_weights=False)
        layer.register_forward_pre_hook(_move_int8_state)
    else:
        layer.weight = layers.Params4bit(
            W,
            requires_grad=False,
            compress_statistics=options.use_double_quant,
            quant_type=kind,
            module=layer,
        )
        # On CPUs with AVX512-BF16, evaluation would repack the weight for a kernel that computes in
        # bfloat16 and has no backward. A training after that evaluation would lose gradients.
        layer.support_avx512bf16_for_cpu = False
    layer.weight = layer.weight.to(device)  # quantizes
    layer.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    return layer.train(matrix.owner.training)


def _move_int8_state(layer: Any, _: Any) -> None:
    """Move 8-bit codes and scales to the parameter's device; moving a parent module skips them."""
    weight = layer.weight
    for holder in (weight, layer.state):
        if holder.CB is not None and holder.CB.device != weight.device:
            holder.CB, holder.SCB = weight.data, holder.SCB.to(weight.device)
