"""Writing a GGUF: keys, then one tensor after another, so that no second copy is in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from prunelight.export.gguf.tensors import GgufTensor, encoded, encoding

FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}


def write_gguf(
    path: Path,
    architecture: str,
    keys: Mapping[str, Any],
    tensors: Iterable[GgufTensor],
    dtype: str,
) -> None:
    """Write a GGUF.

    Args:
        path: of the file.
        architecture: in gguf's MODEL_ARCH.
        keys: names of the writer's methods `add_...` -> values.
        tensors: of the model.
        dtype: of matrices, a key of `FILE_TYPES`.
    """
    import gguf

    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[architecture]])
    try:
        writer.add_type(gguf.GGUFType.MODEL)
        for name, value in keys.items():
            if name == "rope_scaling_type":
                value = gguf.RopeScalingType(value)
            getattr(writer, f"add_{name}")(value)
        writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[dtype]])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        to_write = list(tensors)
        for tensor in to_write:
            _announce(writer, tensor, dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tqdm(to_write, desc="writing", leave=False, delay=5):
            kind = encoding(tensor.name, tensor.shape, dtype)
            writer.write_tensor_data(encoded(tensor.make(), kind))
    finally:
        writer.close()


def _announce(writer: Any, tensor: GgufTensor, dtype: str) -> None:
    """Tell the writer name, shape and bytes of a tensor."""
    import gguf

    kind = gguf.GGMLQuantizationType[encoding(tensor.name, tensor.shape, dtype)]
    stored: np.dtype[Any] = np.dtype({"F32": "float32", "F16": "float16"}.get(kind.name, "uint8"))
    shape = tensor.shape
    if stored.itemsize == 1:
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, kind)
    size = prod(shape) * stored.itemsize
    writer.add_tensor_info(tensor.name, shape, stored, size, raw_dtype=kind)
