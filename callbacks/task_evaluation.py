"""TaskEvaluation: the columns of a fit's report get zero-shot tasks, run by lm-eval.

The tasks run on the model in memory, at each stage: dense, pruned and recovered. Each later stage
is compared with the dense one, question by question.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import Callback
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunelight.evaluation.report.plan_facts import Json
from prunelight.evaluation.report.record import Stage
from prunelight.evaluation.tasks.running import run_tasks
from prunelight.evaluation.tasks.saving import task_result, tasks_answer
from prunelight.evaluation.tasks.task_set import TaskSet, check_tasks
from prunelight.runtime.arguments import NOT_EMPTY, at_least, checked
from prunelight.runtime.processes import ProcessGroup


class TaskEvaluation(Callback):
    """Run tasks on each stage of a fit, for its report.

    Args:
        tasks: tasks, groups or tags of lm-eval's; "papers" stands for the seven of the papers.
        limit: questions of each task, from the first; None asks all.
        num_fewshot: examples before each question; None takes the task's own number.
        apply_chat_template: make each question a turn of a chat.
        tasks_dir: folder of local rows, TASK/SPLIT.jsonl, and of task files; None uses the hub.
        batch_size: prompts that the model reads at once.

    Raises:
        ValueError: if there is no task, or a number is too small.
    """

    examines = "tasks"

    @checked(tasks=NOT_EMPTY, limit=at_least(1), num_fewshot=at_least(0), batch_size=at_least(1))
    def __init__(
        self,
        tasks: list[str],
        limit: int | None = None,
        num_fewshot: int | None = None,
        apply_chat_template: bool = False,
        tasks_dir: str | None = None,
        batch_size: int = 8,
    ) -> None:
        self.tasks = tasks
        self.limit = limit
        self.num_fewshot = num_fewshot
        self.apply_chat_template = apply_chat_template
        self.tasks_dir = tasks_dir
        self.batch_size = batch_size
        self._task_set: TaskSet | None = None

    def check_examination(self, name: str, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Check and load the tasks before anything is computed.

        Raises:
            ImportError, ValueError, OSError: as `check_tasks` does.
        """
        self._task_set = check_tasks(
            self.tasks,
            tasks_dir=self.tasks_dir,
            limit=self.limit,
            num_fewshot=self.num_fewshot,
            apply_chat_template=self.apply_chat_template,
            tokenizer=tokenizer,
        )

    def describe_examination(self) -> Json:
        """Return what the results depend on, beside the model."""
        return {**self._loaded().describe(), "batch_size": self.batch_size}

    def examine(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        earlier: Sequence[Stage],
        group: ProcessGroup,
    ) -> Json:
        """Return results of the tasks, and flips against the dense stage."""
        results = run_tasks(
            model, tokenizer, self._loaded(), batch_size=self.batch_size, group=group
        )
        dense = earlier[0].examined.get(self.examines) if earlier else None
        reference = dense and {name: task_result(one) for name, one in dense["tasks"].items()}
        return tasks_answer(results, reference or None)

    def _loaded(self) -> TaskSet:
        if self._task_set is None:
            self.check_examination("", None)
        assert self._task_set is not None
        return self._task_set
