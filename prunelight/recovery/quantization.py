"""Recovery in 4 or 8 bits: QLoRA (arXiv:2305.14314) and LLM.int8() (arXiv:2208.07339).

The projections of the decoder layers become layers of bitsandbytes, in memory, from the
full-precision base: hub ids, directories and GGUF files take the same way, and training sees the
very base that adapters are merged onto at the end. Embeddings, head, norms, shortcuts of sliced
models and fused expert weights stay in full precision. Nothing quantized is written to disk.
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

from prunelight.models.families.architectures import architecture_of
from prunelight.models.families.layers import Matrix, matrices
from prunelight.models.loading import DTYPES
from prunelight.runtime.arguments import check_choice

QUANTIZATIONS = ("none", "nf4", "fp4", "int8")

FOUR_BIT = ("nf4", "fp4")

# bitsandbytes quantizes 4-bit weights in blocks of 64 inputs. Its kernel for CPUs with AVX512-BF16
# fails where rows are no whole blocks, and its CUDA kernels give way to dequantization.
BLOCK = 64

_REMEDIES = {
    "residual_dims": f"round_to={BLOCK}",
    "round_to": f"round_to={BLOCK}",
    "intermediate_size": f"multiple={BLOCK}",
}


@dataclass(frozen=True)
class BitsAndBytes:
    """Settings of quantization, in the words of bitsandbytes.

    Attributes:
        use_double_quant: quantize the scales of 4-bit blocks too, which saves 0.37 bits a weight.
        compute_dtype: dtype of the products with 4-bit weights: auto (that of the activations),
            float32, bfloat16 or float16.

    Raises:
        ValueError: if the dtype is unknown.
    """

    use_double_quant: bool = True
    compute_dtype: str = "auto"

    def __post_init__(self) -> None:
        """Check the values."""
        check_choice("bitsandbytes.compute_dtype", self.compute_dtype, ("auto", *DTYPES))


def check_kind(kind: str, options: BitsAndBytes, recovery: str) -> None:
    """Check the arguments of a quantization, before anything is loaded.

    Raises:
        ValueError: if the kind is unknown, options have no effect, or all weights would be trained.
        ImportError: if bitsandbytes is missing.
    """
    check_choice("quantization", kind, QUANTIZATIONS)
    if kind not in FOUR_BIT and options != BitsAndBytes():
        raise ValueError(f"{options} has no effect with quantization={kind!r}; leave it out")
    if kind == "none":
        return
    if recovery == "full":
        raise ValueError(
            f"quantization={kind!r} keeps the base frozen, recovery='full' trains it; set "
            "recovery=lora, or quantization=none"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            f"quantization={kind!r} needs the package bitsandbytes; install it with: pip install "
            "'prunelight[quantization]'"
        )


def describe_kind(kind: str, options: BitsAndBytes) -> str:
    """Return kind and options in words, by which a checkpoint knows its quantization."""
    if kind not in FOUR_BIT:
        return kind
    double = "double" if options.use_double_quant else "single"
    return f"{kind} ({double} quantization, compute dtype {options.compute_dtype})"


def check_quantizable(model: PreTrainedModel, kind: str, source: str | Path | None = None) -> None:
    """Check that the projections of a model can be quantized.

    Args:
        model: in full precision.
        kind: of quantization; "none" passes.
        source: from where it can be read again, to merge adapters; "": from nowhere.

    Raises:
        TypeError: if it is quantized already.
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
    if getattr(model.config, "quantization_config", None) is not None:
        raise TypeError(
            f"model {model.config._name_or_path!r} is quantized already; give the one in full "
            f"precision: quantization={kind} quantizes it, and adapters are merged onto it"
        )
    sliced = getattr(model.config, "residual_dims", None) or []
    dims = {f"residual_dims[{i}]": width for i, width in enumerate(sliced)}
    found = quantized_matrices(model)
    check_widths({**dims, **{f"in_features of {m.name}": m.in_features for m in found}}, kind)


def check_widths(widths: Mapping[str, int], kind: str) -> None:
    """Check widths of inputs, by where they come from, against the blocks of 4-bit weights.

    Raises:
        ValueError: naming the first that does not fit.
    """
    for name, width in widths.items():
        if kind in FOUR_BIT and width % BLOCK:
            remedy = _REMEDIES.get(name.partition("[")[0], "quantization=int8")
            raise ValueError(
                f"{name}={width} must be a multiple of {BLOCK} for 4-bit recovery; set {remedy} or "
                "quantization=none"
            )


def quantized_matrices(model: PreTrainedModel) -> list[Matrix]:
    """Return the weights that are quantized: projections, but neither fused experts nor a Mamba's.

    Those of `Architecture.not_adapted` are read by fused kernels, not by their module.
    """
    known = architecture_of(model)
    spared = () if known is None else known.not_adapted
    return [
        matrix
        for matrix in matrices(model).values()
        if not matrix.fused and matrix.name.rpartition(".")[2] not in spared
    ]


@torch.no_grad()
def quantize(
    model: PreTrainedModel, kind: str, options: BitsAndBytes, device: torch.device | None = None
) -> None:
    """Quantize the projections of a model in full precision, in place.

    Args:
        model: as loaded or pruned, without adapters.
        kind: "nf4", "fp4" or "int8".
        options: of 4-bit weights.
        device: where to, one matrix after the other; None: where they are.

    Raises:
        TypeError, ValueError: see `check_quantizable`.
    """
    check_quantizable(model, kind)
    for matrix in quantized_matrices(model):
        made = _quantized(matrix, kind, options, device or matrix.parameter.device)
        model.set_submodule(matrix.name, made)
    flags: Any = model  # by which peft chooses its layers, as transformers sets them
    flags.is_loaded_in_4bit, flags.is_loaded_in_8bit = kind in FOUR_BIT, kind == "int8"
    if kind == "int8":  # one line a product: activations are cast to float16
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def _quantized(matrix: Matrix, kind: str, options: BitsAndBytes, device: torch.device) -> nn.Module:
    """Return the layer of bitsandbytes with a weight in 4 or 8 bits, which is (out, in) there."""
    from bitsandbytes import nn as layers  # optional

    W, bias = matrix.views()[0].contiguous(), getattr(matrix.owner, "bias", None)
    made: Any
    with torch.device("meta"):
        if kind == "int8":
            shape = (W.shape[1], W.shape[0], bias is not None)
            made = layers.Linear8bitLt(*shape, has_fp16_weights=False, threshold=6.0)  # the paper's
        else:
            made = layers.Linear4bit(
                W.shape[1],
                W.shape[0],
                bias is not None,
                compute_dtype=DTYPES.get(options.compute_dtype),
                compress_statistics=options.use_double_quant,
                quant_type=kind,
            )
    if kind == "int8":
        # On its way from the CPU only: a weight on CUDA it would take as it is.
        made.weight = layers.Int8Params(W.cpu(), requires_grad=False, has_fp16_weights=False)
        made.register_forward_pre_hook(_bring_scales)
    else:
        made.weight = layers.Params4bit(
            W,
            requires_grad=False,
            compress_statistics=options.use_double_quant,
            quant_type=kind,
            module=made,
        )
        # Evaluation on CPUs with AVX512-BF16 would repack the weight for a kernel that computes in
        # bfloat16 and has no backward: the training after it would lose gradients.
        made.support_avx512bf16_for_cpu = False
    made.weight = made.weight.to(device)  # quantizes
    made.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    return made.train(matrix.owner.training)


def _bring_scales(layer: Any, _: Any) -> None:
    """Take 8-bit weights and scales to where a parent module moved the parameter without them."""
    weight = layer.weight
    for holder in (weight, layer.state):
        if holder.CB is not None and holder.CB.device != weight.device:
            holder.CB, holder.SCB = weight.data, holder.SCB.to(weight.device)
