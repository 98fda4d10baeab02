"""One cell: prune a copy of the dense model, measure it, write its result whole.

`result.json` in the cell's directory is written last. A cell without it is run again from its
start, or where its training stopped. A method that cannot prune this model is a result too.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from prunelight.callbacks.base import PruningCallback
from prunelight.comparison.amounts.matching import Rung, callbacks_of
from prunelight.comparison.grid import DENSE, FORMAT, Cell, one_line, write_json
from prunelight.comparison.methods import entrants_of
from prunelight.comparison.running.bench import Bench, bench_of
from prunelight.comparison.running.fits import recovered_model
from prunelight.comparison.running.measuring import measure
from prunelight.comparison.running.quantized import in_fewer_bits
from prunelight.models.families.layers import decoder_layers
from prunelight.models.families.matrices import decoder_weights
from prunelight.models.sizes import linear_sparsity, parameter_count, zero_share
from prunelight.one_line_errors import our_error
from prunelight.planning.fingerprints import library_versions
from prunelight.runtime.devices import device_name, synchronize
from prunelight.scoring.remembered import remembering_scores

log = logging.getLogger(__name__)

RESULT = "result.json"


def cell_directory(out: Path, cell: Cell) -> Path:
    """Return the directory of a cell."""
    return out / "cells" / cell.fingerprint


def read_result(out: Path, cell: Cell) -> dict[str, Any] | None:
    """Return the result of a cell; None if it is not there or damaged, so that it is run again."""
    file = cell_directory(out, cell) / RESULT
    try:
        result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return result if result.get("format") == FORMAT else None


def run_cell(settings: str, cell: Cell, device: str | None = None) -> dict[str, Any]:
    """Run a cell in this process, write its result and return it.

    Args:
        settings: of the comparison, as JSON text.
        cell: to run.
        device: where models compute.
    """
    bench = bench_of(settings, device)
    out = Path(bench.settings.out).expanduser()
    try:
        result = _result(bench, cell, cell_directory(out, cell))
    except Exception as error:
        ours = our_error(error)
        if ours is None:
            log.warning("%s failed: %s", cell.title, one_line(error), exc_info=True)
        reason = one_line(ours or error)
        result = {"failed": reason if ours else f"{type(error).__name__}: {reason}"}
        if ours is None or isinstance(ours, OSError):
            return _complete(result, cell)  # not kept: the next start tries again
    result = _complete(result, cell)
    write_json(cell_directory(out, cell) / RESULT, result)
    if not bench.settings.keep_models:
        shutil.rmtree(cell_directory(out, cell) / "fit", ignore_errors=True)
    return result


def _complete(result: dict[str, Any], cell: Cell) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "cell": asdict(cell),
        "failed": None,
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "versions": library_versions(),
        **result,
    }


def _result(bench: Bench, cell: Cell, directory: Path) -> dict[str, Any]:
    if cell.fault:
        return {"failed": cell.fault}
    facts: dict[str, Any] = {}
    methods = _methods(cell)
    if cell.label == DENSE:
        model = bench.dense
    elif cell.recovered:
        model, facts = recovered_model(bench, cell, methods, directory / "fit")
    else:
        model, facts = _pruned(bench, cell, methods)
    start = time.perf_counter()
    found = measure(model, bench, tasks=cell.with_tasks)
    if bench.settings.quantizations:
        anew = [] if cell.recovered else methods
        found["quantized"] = in_fewer_bits(bench, model, cell.seed, anew)
    seconds = {**facts.pop("seconds", {}), "measure": time.perf_counter() - start}
    parameters = parameter_count(model)
    return {
        **facts,
        **found,
        "parameters": parameters,
        "dense_parameters": bench.parameters,
        "share_removed": 1 - parameters / bench.parameters,
        "zeros": linear_sparsity(model),
        "zeros_of_all": zero_share(model.parameters()),
        "decoder_weights_left": _decoder_weights_left(model, bench.dense),
        "layers": len(decoder_layers(model)),
        "seconds": seconds,
        "forward_seconds": bench.forward_seconds,
        "device": device_name(bench.device),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _methods(cell: Cell) -> list[PruningCallback]:
    """Return the methods of a cell, in their order; none for the dense model."""
    made = []
    for one in cell.methods:
        (entrant,) = entrants_of([{"class_path": one["method"], "label": cell.label}])
        made += callbacks_of(entrant, Rung(one["arguments"], 0.0))
    return made


def _decoder_weights_left(model: PreTrainedModel, dense: PreTrainedModel) -> float:
    """Return the share of the dense model's decoder weights that are there, zeros or not.

    It is 1 for a family whose layers cannot be found, as its share of zeros is 0.
    """
    try:
        left, before = (
            sum(weight.numel() for weight in decoder_weights(one)) for one in (model, dense)
        )
    except TypeError:
        return 1.0
    return left / before


def _pruned(
    bench: Bench, cell: Cell, methods: Sequence[PruningCallback]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the pruned model, and how it was pruned; each method finds what earlier ones left."""
    windows = bench.calibration(cell.seed)
    methods[0].check(bench.dense)
    methods[0].check_calibration(bench.dense, windows)
    bench.forward_seconds  # noqa: B018 (measured before the load of a cell)
    outcomes: list[dict[str, Any]] = []
    plans, seconds = [], {"plan": 0.0, "apply": 0.0}
    model = bench.dense
    for method in methods:
        method.device = bench.device
        with remembering_scores(bench.memory) as memory:
            before, start = memory.seconds_spared, time.perf_counter()
            plan = method.plan(model, windows)
            synchronize(bench.device)
            seconds["plan"] += time.perf_counter() - start + memory.seconds_spared - before
        model = bench.copy_of_dense() if model is bench.dense else model
        start = time.perf_counter()
        with torch.no_grad():
            model = method.apply(model, plan, windows, outcomes)
        synchronize(bench.device)
        seconds["apply"] += time.perf_counter() - start
        plans.append(plan.to_dict())
    return model, {
        "plan": plans[0],
        "later_plans": plans[1:],
        "outcomes": outcomes,
        "seconds": seconds,
        "prune_forwards": sum(seconds.values()) / bench.forward_seconds,
    }
