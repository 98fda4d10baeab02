"""How a cell's model does in fewer bits: quantized after the pruning, and pruned after it.

Each kind is measured on a copy, on the texts alone. What is not defined, such as slicing packed
weights, is told with its reason and ends nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from transformers import PreTrainedModel

from prunelight.callbacks.base import PruningCallback
from prunelight.comparison.running.bench import Bench
from prunelight.evaluation.quality.text_quality import text_quality
from prunelight.models.packed.grids import check_package
from prunelight.models.sizes import stored_bytes
from prunelight.one_line_errors import our_error
from prunelight.pruning.rounding.quantize import quantize_gptq
from prunelight.recovery.quantization import BitsAndBytes, check_installed, quantize

GPTQ = "gptq"
PRUNE_FIRST, QUANTIZE_FIRST = "prune first", "quantize first"


def check_quantizations(kinds: list[str]) -> None:
    """Check that the packages of quantizations are installed.

    Raises:
        ImportError: if one is missing; names the pip line.
    """
    for kind in kinds:
        if kind == GPTQ:
            check_package(f"quantizations={kinds}")
        else:
            check_installed(f"quantizations={kinds}")


def in_fewer_bits(
    bench: Bench, model: PreTrainedModel, seed: int, methods: Sequence[PruningCallback]
) -> dict[str, dict[str, Any]]:
    """Return for each kind and order what a text tells, or why it is not defined.

    Args:
        bench: of this process.
        model: of the cell; it is not changed.
        seed: of the calibration windows.
        methods: that prune models which are quantized already; none where nothing is pruned so.
    """
    found: dict[str, dict[str, Any]] = {}
    for kind in bench.settings.quantizations:
        found[kind] = {
            PRUNE_FIRST: _told(lambda kind=kind: _quantized(bench, model, kind, seed), bench)  # type: ignore[misc]
        }
        if methods and bench.settings.quantize_first:
            found[kind][QUANTIZE_FIRST] = _told(
                lambda kind=kind: _pruned(bench, kind, seed, methods),  # type: ignore[misc]
                bench,
            )
    return found


def _told(make: Callable[[], PreTrainedModel], bench: Bench) -> dict[str, Any]:
    """Return the figures of a model that is made here, or why it cannot be made."""
    try:
        model = make()
    except (ValueError, TypeError) as error:
        ours = our_error(error)
        if ours is None:
            raise
        return {"failed": " ".join(str(ours).split())}
    texts = [asdict(text_quality(model, text)) for text in bench.texts.values()]
    return {"failed": None, "texts": texts, "bytes": stored_bytes(model)}


def _quantized(bench: Bench, model: PreTrainedModel, kind: str, seed: int) -> PreTrainedModel:
    """Return a copy of a model in fewer bits."""
    model = copy.deepcopy(model)
    if kind == GPTQ:
        quantize_gptq(model, bench.calibration(seed), device=bench.device)
    else:
        quantize(model, kind, BitsAndBytes(), bench.device)
    return model


def _pruned(
    bench: Bench, kind: str, seed: int, methods: Sequence[PruningCallback]
) -> PreTrainedModel:
    """Return the dense model, first quantized, then scored and pruned as it is."""
    windows = bench.calibration(seed)
    model = bench.quantized_dense(kind, seed, lambda: _quantized(bench, bench.dense, kind, seed))
    for method in methods:
        method.check(model)
        plan = method.plan(model, windows)
        with torch.no_grad():
            model = method.apply(model, plan, windows, [])
    return model
