"""Run checked tasks on a model in memory, by lm-eval, and keep the outcome of each question."""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunelight.evaluation.tasks.catalog import quiet_lm_eval
from prunelight.evaluation.tasks.results import TaskResult
from prunelight.evaluation.tasks.task_set import TaskSet
from prunelight.models.forward import evaluating
from prunelight.runtime.arguments import at_least, checked
from prunelight.runtime.processes import ProcessGroup
from prunelight.runtime.random_state import random_state_kept


@checked(batch_size=at_least(1))
def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task_set: TaskSet,
    *,
    batch_size: int = 8,
    group: ProcessGroup | None = None,
) -> dict[str, TaskResult]:
    """Run tasks on a model in memory; the model, the tokenizer and random numbers stay as they are.

    The values are those of lm-eval's command line on the same weights, dtype, rows and batch size.

    Args:
        model: in any mode and dtype.
        tokenizer: of the model.
        task_set: what `check_tasks` returned.
        batch_size: prompts that the model reads at once.
        group: processes that share the prompts; all get all results. None is this process alone.

    Returns:
        Result of each task and group, by name. A tag, and a group that lm-eval does not aggregate,
        give their parts.

    Raises:
        ValueError: if questions are turns of a chat, and the tokenizer has no chat template; or if
            an answer alone is longer than what the model reads.
    """
    from lm_eval import evaluate
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    from prunelight.evaluation.tasks.live_model import LiveModel, seeded

    if task_set.apply_chat_template and not tokenizer.chat_template:
        raise ValueError(
            "apply_chat_template=True needs a tokenizer with a chat template, which this one "
            "lacks; leave it out"
        )
    for task in task_set.tasks.values():
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    with (
        quiet_lm_eval(),
        random_state_kept(),
        evaluating(model),
        seeded(DEFAULT_RANDOM_SEED, DEFAULT_OTHER_SEED),
    ):
        # A copy: lm-eval may give the tokenizer a token of padding.
        live = LiveModel(model, copy.deepcopy(tokenizer), batch_size, group or ProcessGroup())
        with _silent_stderr():
            answers: dict[str, Any] = evaluate(
                live,
                {"tasks": task_set.tasks, "groups": task_set.groups, "group_map": {}},
                limit=task_set.limit,
                log_samples=True,
                apply_chat_template=task_set.apply_chat_template,
                fewshot_as_multiturn=task_set.apply_chat_template,
            )
    results = [_result(name, answers, task_set) for name in _asked_for(task_set)]
    return {result.task: result for result in results}


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Hide bars that lm-eval draws while it prepares prompts."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stderr(nowhere):
        yield


def _asked_for(task_set: TaskSet) -> list[str]:
    """Return the tasks and groups that get a result of their own, in the order asked for."""
    aggregated = {name: group for name, group in task_set.groups.items() if group.has_aggregation}
    inside = {_name(member) for group in aggregated.values() for member in _members(group)}
    tops = [name for name in (*aggregated, *task_set.tasks) if name not in inside]
    order = {name: place for place, name in enumerate(task_set.names)}
    return sorted(tops, key=lambda name: order.get(name, len(order)))


def _members(group: Any) -> Iterator[Any]:
    """Yield the tasks and groups inside a group that have a result."""
    for member in group:
        if hasattr(member, "has_aggregation") and not member.has_aggregation:
            yield from _members(member)
        else:
            yield member


def _name(item: Any) -> str:
    return str(item.task_name if hasattr(item, "task_name") else item.name)


def _result(
    name: str, answers: dict[str, Any], task_set: TaskSet, metric: str | None = None
) -> TaskResult:
    """Return the result of a task, or of a group with its parts.

    Args:
        name: of the task or group.
        answers: what lm-eval returned.
        task_set: the tasks.
        metric: the headline metric of the group around it; None takes the task's own.
    """
    metrics = _metrics(answers["results"][name])
    headline = metric if metric in metrics else _headline(metrics)
    group = task_set.groups.get(name)
    if group is not None:
        parts = [_result(_name(part), answers, task_set, headline) for part in _members(group)]
        outcomes = [part.outcomes for part in parts]
        questions = "".join(part.fingerprint for part in parts)
        num_questions = sum(part.num_questions for part in parts)
        data = "; ".join(dict.fromkeys(part.data for part in parts))
    else:
        parts = []
        samples = _samples(answers["samples"][name], headline)
        outcomes = [_outcome(sample.get(headline.partition(",")[0])) for sample in samples]
        questions = json.dumps([_question(sample) for sample in samples], default=str)
        num_questions = answers["n-samples"][name]["effective"]
        data = task_set.sources[name]
    return TaskResult(
        task=name,
        metric=headline,
        value=metrics[headline],
        stderr=metrics.get(_stderr_of(headline)),
        metrics=metrics,
        num_questions=num_questions,
        num_fewshot=answers["n-shot"].get(name, 0),
        version=str(answers["versions"].get(name)),
        data=data,
        outcomes="".join(outcomes) if all(outcomes) else "",
        fingerprint=sha256(f"{headline} {questions}".encode()).hexdigest()[:16],
        parts=parts,
    )


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of lm-eval's answer: "acc,none" is "acc", other filters stay."""
    numbers = {
        key.removesuffix(",none"): value
        for key, value in values.items()
        if key not in ("name", "alias", "sample_len", "sample_count")
    }
    return {key: float(value) for key, value in numbers.items() if _is_number(value)}


def _is_number(value: object) -> bool:
    return hasattr(value, "__float__")


def _headline(metrics: dict[str, float]) -> str:
    names = [name for name in metrics if "_stderr" not in name]
    return next((name for name in ("acc_norm", "acc") if name in names), names[0])


def _stderr_of(metric: str) -> str:
    name, comma, filter_name = metric.partition(",")
    return f"{name}_stderr{comma}{filter_name}"


def _samples(samples: list[dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    """Return the samples of the filter that a metric is of, in the order of the rows."""
    filter_name = metric.partition(",")[2] or "none"
    of_filter = [sample for sample in samples if sample["filter"] == filter_name]
    return sorted(of_filter, key=lambda sample: sample["doc_id"])


def _outcome(value: object) -> str:
    """Return "1" or "0" for right or wrong, "" for a metric of other values."""
    return str(int(bool(value))) if value in (0, 1) else ""


def _question(sample: dict[str, Any]) -> list[object]:
    return [sample["arguments"], sample["target"]]
