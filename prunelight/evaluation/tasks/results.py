"""What one task of lm-eval gave for a model: plain data, no torch, no lm-eval."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class TaskResult:
    """One task, or group of tasks such as MMLU.

    Attributes:
        task: lm-eval's name.
        metric: the headline metric, as lm-eval names it: acc_norm where the task has it, else acc,
            else its first.
        value: of that metric, as lm-eval gives it.
        stderr: its standard error, as lm-eval gives it; None where lm-eval gives none.
        metrics: every metric of lm-eval's, with "_stderr" ones.
        num_questions: that were asked.
        num_fewshot: examples before a question.
        version: lm-eval's version of the task.
        data: where the rows came from: "hub" or the name of a local file.
        outcomes: the headline metric of each question, in the order of the rows; a group has the
            outcomes of its parts one after another. "1" right, "0" wrong where the metric is
            0 or 1, so that the text is short; empty for metrics of other values.
        fingerprint: of the questions, so that flips are only counted between equal ones.
        parts: tasks of a group.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    metrics: dict[str, float]
    num_questions: int
    num_fewshot: int
    version: str
    data: str
    outcomes: str = field(repr=False)
    fingerprint: str
    parts: list[TaskResult] = field(default_factory=list)


@dataclass(frozen=True)
class Flips:
    """Questions whose answer changed between a reference and a model.

    Attributes:
        right_to_wrong: right in the reference, wrong in the model.
        wrong_to_right: wrong in the reference, right in the model.
        num_questions: both were asked.
    """

    right_to_wrong: int
    wrong_to_right: int
    num_questions: int
