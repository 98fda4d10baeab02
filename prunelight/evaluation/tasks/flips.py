"""Questions whose answer changed between two models: the same score may hide many of them.

"Accuracy is Not All You Need" (arXiv:2407.09141) calls them flips.
"""

from __future__ import annotations

from prunelight.evaluation.tasks.results import Flips, TaskResult


def count_flips(reference: TaskResult, other: TaskResult) -> Flips:
    """Count the questions that one model answers right and the other one wrong.

    (wrong_to_right - right_to_wrong) / num_questions is the difference of the two accuracies; of a
    group whose parts count alike, it is not that of its value.

    Args:
        reference: of the model that is compared with.
        other: of the model that is compared.

    Raises:
        ValueError: if the two were not asked the same questions, or the metric is not 0 or 1.
    """
    if reference.fingerprint != other.fingerprint:
        raise ValueError(
            f"flips need the same questions: {reference.task} with {_asked(reference)} and "
            f"{other.task} with {_asked(other)} differ; run both with the same tasks, limit, "
            "examples and chat template"
        )
    if not reference.outcomes or not other.outcomes:
        raise ValueError(
            f"flips of {reference.task} cannot be counted: its {reference.metric} of a question "
            "is not 0 or 1; count those of a task of right and wrong answers"
        )
    pairs = [*zip(reference.outcomes, other.outcomes, strict=True)]
    return Flips(pairs.count(("1", "0")), pairs.count(("0", "1")), len(pairs))


def flips_between(
    reference: dict[str, TaskResult], other: dict[str, TaskResult]
) -> dict[str, Flips]:
    """Count the flips of each task that both were asked and whose answers are right or wrong.

    Raises:
        ValueError: if a task was not asked the same questions.
    """
    common = [name for name in reference if name in other]
    return {
        name: count_flips(reference[name], other[name])
        for name in common
        if reference[name].outcomes or reference[name].fingerprint != other[name].fingerprint
    }


def _asked(result: TaskResult) -> str:
    return f"{result.num_questions} questions, {result.num_fewshot} examples"
