"""The tasks of an evaluation, checked and loaded before anything is computed."""

from __future__ import annotations

import dataclasses
import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import UndefinedError
from transformers import PreTrainedTokenizerBase

from prunelight.evaluation.report.plan_facts import Json
from prunelight.evaluation.tasks.catalog import (
    Catalog,
    check_lm_eval_installed,
    quiet_lm_eval,
    spelled_out,
)
from prunelight.evaluation.tasks.local_rows import (
    LocalData,
    Row,
    RowFiles,
    as_dataset,
    asked_split,
    check_fields,
    examples_split,
    lacks,
    swapped,
)
from prunelight.runtime.arguments import at_least, checked
from prunelight.runtime.random_state import random_state_kept

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskSet:
    """Tasks that can be run on any model.

    Attributes:
        names: tasks and groups, as they were asked for.
        limit: questions of each task, from the first; None asks all.
        num_fewshot: examples before each question; None takes the task's own number.
        apply_chat_template: whether questions are turns of a chat.
        tasks: lm-eval's tasks by name.
        groups: lm-eval's groups by name.
        sources: task -> where its rows come from: "hub", or the name of a local file.
        checksums: local file -> SHA-256 of its bytes.
    """

    names: list[str]
    limit: int | None
    num_fewshot: int | None
    apply_chat_template: bool
    tasks: dict[str, Any] = field(repr=False)
    groups: dict[str, Any] = field(repr=False)
    sources: dict[str, str] = field(repr=False)
    checksums: dict[str, str] = field(repr=False)

    def describe(self) -> Json:
        """Return what the results depend on, beside the model."""
        return {
            "tasks": self.names,
            "limit": self.limit,
            "num_fewshot": self.num_fewshot,
            "apply_chat_template": self.apply_chat_template,
            "versions": {name: str(task.VERSION) for name, task in self.tasks.items()},
            "files": self.checksums,
        }


@checked(limit=at_least(1), num_fewshot=at_least(0))
def check_tasks(
    names: list[str],
    *,
    tasks_dir: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> TaskSet:
    """Check and load tasks before anything is computed.

    Args:
        names: tasks, groups or tags of lm-eval's, or of YAML files in `tasks_dir`; "papers" stands
            for `PAPER_TASKS`.
        tasks_dir: folder of local rows, `TASK/SPLIT.jsonl`, and of the user's own task files. A
            task whose rows are not there is read from the hub.
        limit: questions of each task, from the first; None asks all.
        num_fewshot: examples before each question; None takes the task's own number.
        apply_chat_template: make each question a turn of a chat, by the tokenizer's template.
        tokenizer: of the model, where it is known already.

    Raises:
        ImportError: if lm-eval is missing.
        ValueError: for an unknown task, a limit below 1, rows that lack a field, or a task that
            needs images, runs code of the model, or has too few examples.
        OSError: if the rows of a task are neither in `tasks_dir` nor can be had from the hub.
    """
    check_lm_eval_installed()
    asked = spelled_out(names)
    folder = None if tasks_dir is None else Path(tasks_dir).expanduser()
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(
            f"tasks_dir={str(tasks_dir)!r} is no directory; it must hold rows as "
            "TASK/SPLIT.jsonl, such as piqa/validation.jsonl"
        )
    if apply_chat_template and tokenizer is not None and not tokenizer.chat_template:
        raise ValueError(
            "apply_chat_template=True needs a tokenizer with a chat template, which this one "
            "lacks; leave it out"
        )
    with quiet_lm_eval(), random_state_kept():
        return _Loading(asked, folder, num_fewshot).load(limit, apply_chat_template)


class _Loading:
    """Finds the rows of each task, and makes lm-eval's tasks."""

    def __init__(self, names: list[str], tasks_dir: Path | None, num_fewshot: int | None) -> None:
        self.names, self.tasks_dir, self.num_fewshot = names, tasks_dir, num_fewshot
        self.catalog = Catalog(names, tasks_dir)
        self.files = RowFiles()
        self.local: dict[str, LocalData] = {}

    def load(self, limit: int | None, apply_chat_template: bool) -> TaskSet:
        self._check_each_once()
        for name in self.names:
            for leaf in self.catalog.leaves(name):
                self._use_local_rows(leaf)
        tasks: dict[str, Any] = {}
        groups: dict[str, Any] = {}
        for name in self.names:
            loaded = self._load(name)
            tasks |= loaded["tasks"]
            groups |= loaded["groups"]
        for name, task in tasks.items():
            self._check_task(name, task)
            self._set_examples(name, task)
        sources = {name: self._source(name) for name in tasks}
        return TaskSet(
            names=self.names,
            limit=limit,
            num_fewshot=self.num_fewshot,
            apply_chat_template=apply_chat_template,
            tasks=tasks,
            groups=groups,
            sources=sources,
            checksums=self.files.checksums,
        )

    def _check_each_once(self) -> None:
        """Check that no task is asked for by two names, as a group and alone."""
        owners: dict[str, str] = {}
        for name in self.names:
            for leaf in self.catalog.leaves(name):
                if leaf in owners:
                    raise ValueError(
                        f"tasks={self.names!r} ask for {leaf} twice, by {owners[leaf]} and by "
                        f"{name}; leave one of them out"
                    )
                owners[leaf] = name

    # --- rows ---------------------------------------------------------------------------------

    def _use_local_rows(self, leaf: str) -> None:
        """Let a task read local rows, if there are any for it."""
        from lm_eval.tasks._yaml_loader import load_yaml

        entry = self.catalog.index[leaf]
        if entry.kind.name != "TASK" or (self._is_own(leaf) and entry.cfg.get("dataset_path")):
            return
        data = self._find(leaf, entry.cfg)
        if data is None:
            return
        self.local[leaf] = data
        wanted = [split for split in (data.asked, data.examples) if split is not None]
        rows = {split: self.files.rows(data, split) for split in wanted}
        splits = {split: as_dataset(rows[split], data.file(split)) for split in wanted}
        config = swapped(load_yaml(entry.yaml_path), splits)
        self.catalog.index[leaf] = dataclasses.replace(entry, yaml_path=None, cfg=config)

    def _find(self, leaf: str, config: Json) -> LocalData | None:
        """Return where the rows of a task lie in `tasks_dir`; None if they do not."""
        split = asked_split(config)
        if self.tasks_dir is None or split is None:
            return None
        folders = [place.parent for place in self.tasks_dir.glob(f"*/{split}.jsonl")]
        for folder in sorted(folders, key=lambda place: -len(place.name)):
            if folder.name != leaf and not leaf.startswith(f"{folder.name}_"):
                continue
            same, subject = self._is_data_of(folder.name, leaf, config)
            if same:
                return self._with_examples(LocalData(folder, subject, split, None), leaf, config)
        return None

    def _is_data_of(self, owner: str, leaf: str, config: Json) -> tuple[bool, str | None]:
        """Whether a task reads the data set of the folder's owner, and which subject of it."""
        if owner == leaf:
            return True, None
        entry = self.catalog.index.get(owner)
        if entry is None:
            return False, None
        name = config.get("dataset_name")
        if entry.kind.name == "TASK":
            theirs = entry.cfg.get("dataset_path"), entry.cfg.get("dataset_name")
            return theirs == (config.get("dataset_path"), name), None
        others = (self.catalog.index[other].cfg for other in self.catalog.leaves(owner))
        paths = {other.get("dataset_path") for other in others if other is not None}
        return name is not None and config.get("dataset_path") in paths, name

    def _with_examples(self, data: LocalData, leaf: str, config: Json) -> LocalData:
        """Add the split of the examples, where it is there."""
        split, shots = examples_split(config), self._shots(config)
        if split is None or split == data.asked:
            return data
        if data.file(split).is_file():
            return dataclasses.replace(data, examples=split)
        if shots > 0:
            raise FileNotFoundError(
                f"{shots} examples before each question of {leaf} need the file {data.file(split)}"
                ", which is not there; put it there, or set num_fewshot=0"
            )
        return data

    def _shots(self, config: Json) -> int:
        """Return the examples before a question, by lm-eval's rule: a task's own 0 stays."""
        own = config.get("num_fewshot")
        return own or 0 if self.num_fewshot is None or own == 0 else self.num_fewshot

    def _is_own(self, leaf: str) -> bool:
        """Whether a task file of the user's describes the task."""
        place = self.catalog.index[leaf].yaml_path
        return (
            self.tasks_dir is not None
            and place is not None
            and place.resolve().is_relative_to(self.tasks_dir.resolve())
        )

    def _source(self, name: str) -> str:
        if name in self.local:
            return self.local[name].name
        if name in self.catalog.index and self._is_own(name):
            return str(self.catalog.index[name].yaml_path.name)
        return "hub"

    # --- lm-eval's tasks ----------------------------------------------------------------------

    def _load(self, name: str) -> Json:
        """Return lm-eval's tasks and groups of one name."""
        from datasets.exceptions import DatasetNotFoundError

        remote = [leaf for leaf in self.catalog.leaves(name) if leaf not in self.local]
        if remote:
            log.info("task %s: reading its rows from the hub or the user's own files", name)
        random.seed(0)
        np.random.seed(1234)
        try:
            loaded: Json = self.catalog.manager.load([name])
        except (UndefinedError, KeyError, TypeError, AttributeError, IndexError) as error:
            if remote:
                raise
            raise self._misfit(name, error) from error
        except (OSError, DatasetNotFoundError) as error:
            raise self._without_data(name, remote, error) from error
        return loaded

    def _misfit(self, name: str, error: Exception) -> ValueError:
        """Return the error for rows whose first one the task cannot read."""
        data = self.local[next(self.catalog.leaves(name))]
        line, row = self.files.rows(data, data.asked)[0]
        words = str(error).replace("'", " ").split()
        lacking = [word for word in words if word.isidentifier() and word not in row]
        named = [word for word in lacking if repr(word) in str(error)]
        return lacks(data.file(data.asked), line, error, named)

    def _without_data(self, name: str, remote: list[str], error: Exception) -> OSError:
        """Return the error for a task whose rows cannot be had."""
        configs = [self.catalog.index[leaf].cfg or {} for leaf in remote]
        splits = dict.fromkeys(
            split for config in configs for split in self._needed(config) if split is not None
        )
        files = " and ".join(f"{name}/{split}.jsonl" for split in splits)
        where = "under tasks_dir" if self.tasks_dir is None else f"under {self.tasks_dir}"
        hub = ", ".join(dict.fromkeys(str(config.get("dataset_path")) for config in configs))
        text = " ".join(str(error).split())
        return OSError(
            f"the rows of task {name} cannot be read: put {files} {where}, or reach {hub} on the "
            f"hub (HF_HUB_OFFLINE must not be 1): {text}"
        )

    def _needed(self, config: Json) -> Iterator[str | None]:
        yield asked_split(config)
        if self._shots(config) > 0:
            yield examples_split(config)

    def _check_task(self, name: str, task: Any) -> None:
        """Check what the task asks of a model, and that its local rows hold what it reads."""
        if getattr(task, "UNSAFE_CODE", False):
            raise ValueError(
                f"task {name} runs code that the model writes, on this machine; prunelight does "
                "not. Run it with lm-eval itself, in a container"
            )
        if getattr(task, "MULTIMODAL", False):
            raise ValueError(f"task {name} needs images or sound; choose a task of text")
        data = self.local.get(name)
        if data is not None:
            file = data.file(data.asked)
            check_fields(self.files.rows(data, data.asked), file, _Reader(task))

    def _set_examples(self, name: str, task: Any) -> None:
        """Set the number of examples before a question, by lm-eval's rule."""
        own = task.get_config("num_fewshot")
        if self.num_fewshot and own == 0:
            log.warning(
                "num_fewshot=%s has no effect on task %s, which sets 0 itself",
                self.num_fewshot,
                name,
            )
        shots = own or 0 if self.num_fewshot is None or own == 0 else self.num_fewshot
        task.set_config(key="num_fewshot", value=shots)
        data = self.local.get(name)
        if shots == 0 or data is None:
            return
        split = data.examples or data.asked
        num_rows = len(self.files.rows(data, split)) - (split == data.asked)
        if shots > num_rows:
            raise ValueError(
                f"num_fewshot={shots} is more than the {num_rows} examples of {data.file(split)} "
                f"for task {name}; set at most {num_rows}"
            )


class _Reader:
    """Does with one row what a task does with it."""

    def __init__(self, task: Any) -> None:
        self.task = task

    def __call__(self, row: Row) -> None:
        from datasets import Dataset

        rows, process = Dataset.from_list([row]), self.task.config.process_docs
        for document in rows if process is None else process(rows):
            self.task.doc_to_text(document)
            if self.task.config.doc_to_choice is not None:
                self.task.doc_to_choice(document)
            self.task.doc_to_target(document)
