"""What a pruning gains on this hardware, in plain sentences: measured against ideal, and why."""

from __future__ import annotations

import platform
from pathlib import Path

import torch
from transformers import PreTrainedModel

from prunelight.evaluation.report.plan_facts import Json
from prunelight.models.families.matrices import matrices

# From this share on, zeros of the parameters are worth a sentence.
_MANY_ZEROS = 0.01

_SPARSE_CORES = "sparse tensor cores (NVIDIA Ampere or later)"


def hardware(device: torch.device) -> str:
    """Return what a device is: the name of the graphics card, or of the processor."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = torch.cuda.get_device_name(device)
        return f"{name}, compute capability {major}.{minor}"
    if device.type != "cpu":
        return device.type
    return f"CPU, {_processor()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # no Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def zeros_pattern(model: PreTrainedModel) -> str | None:
    """Return "2:4" if every matrix with many zeros has two of each four values; else None."""
    try:
        found = [view for matrix in matrices(model).values() for view in matrix.views()]
    except TypeError:
        return None
    sparse = 0
    for view in found:
        if not view.is_floating_point() or view.is_meta or view.shape[1] % 4:
            continue
        zeros = view == 0
        if zeros.float().mean() < 0.45:  # a dense matrix beside the sparse ones
            continue
        if int(zeros.unflatten(1, (-1, 4)).sum(-1).min()) < 2:
            return None
        sparse += 1
    return "2:4" if sparse else None


def verdicts(serving: Json, dense: Json | None) -> list[str]:
    """Return a sentence on the zeros of a model, and one on its shape beside the dense model's.

    Args:
        serving: of a model, as `serving_cost` gives it.
        dense: of the dense model; None leaves out what compares with it.
    """
    lines = [_zeros(serving, dense)] if _has_zeros(serving, dense) else []
    if dense is None:
        return lines
    own, other = serving["shape"], dense["shape"]
    if own["parameters"] == other["parameters"] and serving["packed"] == dense["packed"]:
        return lines or ["No weight was removed: this model costs what the dense one costs."]
    return [*lines, _shape(serving, dense)]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _zero_share(serving: Json) -> float:
    shape = serving["shape"]
    return 0.0 if shape["nonzeros"] is None else 1 - shape["nonzeros"] / shape["parameters"]


def _has_zeros(serving: Json, dense: Json | None) -> bool:
    before = 0.0 if dense is None else _zero_share(dense)
    return _zero_share(serving) > before + _MANY_ZEROS


def _zeros(serving: Json, dense: Json | None) -> str:
    """Say what this hardware gains from zeros, and why."""
    share, place = _zero_share(serving), serving["hardware"]
    start = f"{_percent(share)} of the weights are zero. "
    if serving["zeros_pattern"] is None:
        return start + (
            f"This machine ({place}) gains no speed and no memory: zeros without a pattern are "
            "stored and multiplied like other values."
        )
    start += "Their 2:4 pattern is skipped only by "
    if "compute capability" not in place:
        return start + (
            f"{_SPARSE_CORES} and a runtime that uses them. This machine ({place}) has none: it "
            "gains nothing."
        )
    capability = float(place.rpartition(" ")[2])
    if capability < 8:
        return start + f"{_SPARSE_CORES}. This GPU ({place}) is older: it gains nothing."
    return start + (
        f"{_SPARSE_CORES}, which this GPU ({place}) has, and by a runtime that uses them. "
        "transformers does not: here it gains nothing."
    )


def _shape(serving: Json, dense: Json) -> str:
    """Say how much faster a smaller shape is, against the ideal."""
    own, other = serving["shape"], dense["shape"]
    left = f"{_percent(own['parameters'] / other['parameters'])} of the parameters"
    if serving["num_layers"] != dense["num_layers"] and dense["num_layers"]:
        left = f"{serving['num_layers']} of {dense['num_layers']} layers"
    parts = [
        f"{name} {ratio['measured'][0]:.2f}x of an ideal {ratio['ideal']:.2f}x"
        + (f" at batch {size}" if size != "1" else "")
        for size, ratios in serving.get("ratios", {}).items()
        for name, ratio in (
            ("prefill", ratios["prefill_tokens_per_second"]),
            ("decode", ratios["decode_tokens_per_second"]),
        )
    ]
    cache, other_cache = own["cache_bytes"], other["cache_bytes"]
    if cache != other_cache and other_cache:
        parts.append(f"cache {_percent(cache / other_cache)} as large")
    return f"{left}: {', '.join(parts)}."
