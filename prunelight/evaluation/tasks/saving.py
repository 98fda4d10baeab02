"""Results of tasks as JSON values, and back."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from prunelight.evaluation.report.plan_facts import Json
from prunelight.evaluation.tasks.flips import flips_between
from prunelight.evaluation.tasks.results import TaskResult


def tasks_answer(results: dict[str, TaskResult], reference: dict[str, TaskResult] | None) -> Json:
    """Return results as JSON values, with flips where there is a reference."""
    answer: Json = {"tasks": {name: asdict(result) for name, result in results.items()}}
    if reference is not None:
        flips = flips_between(reference, results)
        answer["flips"] = {name: asdict(of_task) for name, of_task in flips.items()}
    return answer


def task_result(values: dict[str, Any]) -> TaskResult:
    """Return the result that `dataclasses.asdict` made these values of."""
    return TaskResult(**{**values, "parts": [task_result(part) for part in values["parts"]]})
