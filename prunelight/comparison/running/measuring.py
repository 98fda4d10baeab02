"""What is measured of a model in a comparison: texts, divergence from the dense model, tasks, cost.

The figures are those of `prunelight evaluate`, by the same functions.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from transformers import PreTrainedModel

from prunelight.comparison.running.bench import Bench
from prunelight.evaluation.quality.divergence import against_reference
from prunelight.evaluation.quality.text_quality import text_quality
from prunelight.evaluation.serving.cost import serving_cost
from prunelight.evaluation.speed import LatencyProtocol, compare_latency

# A short form of the papers' protocol, since a search asks for many models.
LATENCY = LatencyProtocol(num_tokens=32, num_warmup=1, num_runs=7)


def measure(model: PreTrainedModel, bench: Bench, *, tasks: bool) -> dict[str, Any]:
    """Return what is measured of a model, as JSON values.

    Args:
        model: dense, pruned or recovered.
        bench: of this process.
        tasks: ask the tasks of the comparison too.
    """
    found: dict[str, Any] = {"texts": [], "divergence": [], "tasks": {}}
    is_dense = model is bench.dense
    for text in bench.texts.values():
        if is_dense:
            quality = text_quality(model, text)
        else:
            quality, _, divergence = against_reference(
                model, bench.dense, text, memory=bench.dense_logits
            )
            found["divergence"].append(asdict(divergence))
        found["texts"].append(asdict(quality))
    if tasks and bench.task_set is not None:
        from prunelight.evaluation.tasks.running import run_tasks

        results = run_tasks(model, bench.tokenizer, bench.task_set)
        found["tasks"] = {name: asdict(result) for name, result in results.items()}
    if bench.settings.serving:
        found["serving"] = serving_cost(model, None if is_dense else bench.dense)["serving"]
    if bench.settings.equal == "latency" and not is_dense:
        _, factor = compare_latency(model, bench.dense, bench.tokenizer, LATENCY)
        found["latency"] = asdict(factor)
    return found
