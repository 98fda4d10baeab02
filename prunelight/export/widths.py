"""Warnings about widths that engines and quantizations want to divide."""

from __future__ import annotations

from typing import Any

_BLOCK = 256  # weights of a block of llama.cpp's K-quants
_DEVICES = (2, 4, 8)  # that share each layer


def _widths(config: Any) -> dict[str, int]:
    mlp = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    return {"hidden_size": config.hidden_size, "MLP width": mlp or 4 * config.hidden_size}


def block_warnings(config: Any, quantize: str | None) -> list[str]:
    """Return a warning about widths that are no multiple of a block of K-quants.

    Args:
        config: of the model.
        quantize: a quantization of llama.cpp, or None.
    """
    odd = [f"{name} {width}" for name, width in _widths(config).items() if width % _BLOCK]
    if not odd or quantize is None or quantize.endswith("_0"):
        return []
    return [
        f"no multiple of {_BLOCK}: {', '.join(odd)}; llama.cpp keeps such matrices in larger types "
        f"than {quantize}"
    ]


def parallel_warnings(config: Any) -> list[str]:
    """Return a warning about counts that 2, 4 or 8 devices cannot share; it names the first.

    Devices may hold the same key-value head, so fewer heads than devices are no hindrance where the
    number of devices divides by theirs.
    """
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    counts = {**_widths(config), "attention heads": heads}
    for devices in _DEVICES:
        odd = [f"{name} {count}" for name, count in counts.items() if count % devices]
        if groups % devices and devices % groups:
            odd.append(f"key-value heads {groups}")
        if odd:
            return [
                f"not divisible by {devices}: {', '.join(odd)}; {devices} devices or more cannot "
                "share a layer (tensor parallelism)"
            ]
    return []
