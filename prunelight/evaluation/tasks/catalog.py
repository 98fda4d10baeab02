"""The tasks that lm-eval knows, without reading all of its files where few are asked for.

lm-eval parses its 14,000 task files at each start, which takes longer than many evaluations. Here
only the folders are parsed that hold the tasks asked for. A name that this cannot settle, such as
a tag of several folders, takes all of them.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

# The tasks of ShortGPT's, SLEB's, SliceGPT's and Wanda's tables, together.
PAPER_TASKS = (
    "piqa",
    "hellaswag",
    "winogrande",
    "arc_easy",
    "arc_challenge",
    "boolq",
    "openbookqa",
)
# "task: piqa" or "group: mmlu" in a task file.
_DECLARATION = re.compile(r"""^["']?(?:task|group)["']?:[ ]*["']?([^\s"'\[]+)["']?\s*$""", re.M)


def check_lm_eval_installed() -> None:
    """Check that lm-eval is there.

    Raises:
        ImportError: if it is missing.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError(
            "tasks need the package lm-eval, which is not installed; install it with: "
            "pip install 'prunelight[eval]'"
        )


def spelled_out(names: Sequence[str]) -> list[str]:
    """Return names of tasks, each once, with "papers" replaced by the tasks of the papers.

    Raises:
        ValueError: if there is no name.
    """
    each = [part for name in names for part in (PAPER_TASKS if name == "papers" else (name,))]
    if not each or not all(each):
        raise ValueError(
            f"tasks={[*names]!r} must name a task; 'papers' means {', '.join(PAPER_TASKS)}"
        )
    return [*dict.fromkeys(each)]


class Catalog:
    """The tasks, groups and tags that are known, from lm-eval and from a folder of the user's.

    Attributes:
        manager: lm-eval's TaskManager.
        index: name -> lm-eval's entry: kind, file, settings.
    """

    def __init__(self, names: Sequence[str], tasks_dir: Path | None) -> None:
        """Read the task files.

        Raises:
            ValueError: for a name that lm-eval does not know; it says the nearest ones.
        """
        from lm_eval.tasks import TaskManager

        root = Path(str(importlib.util.find_spec("lm_eval").origin)).parent / "tasks"  # type: ignore[union-attr]
        own = [] if tasks_dir is None else [tasks_dir]
        files = _task_files(root)
        folders = _folders(names, root, files)
        self.manager = TaskManager(include_path=[*folders, *own], include_defaults=False)
        self.index: dict[str, Any] = self.manager.task_index
        for name in names:
            # A name that no task file mentions is no tag of theirs either.
            if name not in self.index and not any(name in text for text in files.values()):
                raise self._unknown(name, _declarations(files))
        if not all(self._is_whole(name, root, folders, files) for name in names):
            self.manager = TaskManager(include_path=[*own])
            self.index = self.manager.task_index
        for name in names:
            if name not in self.index:
                raise self._unknown(name, ())

    def leaves(self, name: str) -> Iterator[str]:
        """Yield the tasks of a task, group or tag, depth first."""
        entry = self.index.get(name)
        if entry is None:  # written out in the file of a group
            return
        if entry.kind.name == "TAG":
            yield from sorted(entry.tags)
        elif entry.kind.name == "GROUP":
            for member in _members(entry.cfg):
                yield from self.leaves(member)
        else:
            yield name

    def _is_whole(
        self, name: str, root: Path, folders: Sequence[Path], files: dict[Path, str]
    ) -> bool:
        """Whether the folders that were parsed hold all that belongs to a name."""
        entry = self.index.get(name)
        if entry is None:
            return False
        if entry.kind.name == "GROUP":
            return all(
                self._is_whole(member, root, folders, files) for member in _members(entry.cfg)
            )
        if entry.kind.name == "TAG":  # any file may join a tag
            others = (text for file, text in files.items() if _top(file, root) not in folders)
            return not any(name in text for text in others)
        return True

    def _unknown(self, name: str, others: Iterable[str]) -> ValueError:
        near = get_close_matches(name, {*self.index, *others}, n=3)
        names = f"; the nearest names are {', '.join(near)}" if near else ""
        return ValueError(f"task {name!r} is unknown to lm-eval{names}")


def _members(config: dict[str, Any]) -> Iterator[str]:
    """Yield the names that the settings of a group refer to."""
    members = config.get("task") or []
    for member in [members] if isinstance(members, str) else members:
        if isinstance(member, str):
            yield member
        elif "group" in member and isinstance(member.get("task"), list):
            yield from _members(member)
        else:
            yield member.get("group") or member["task"]


def _task_files(root: Path) -> dict[Path, str]:
    """Return the text of every task file of lm-eval's and of what task files include."""
    files = (file for file in root.rglob("*") if file.suffix in ("", ".yaml", ".yml"))
    return {
        file: file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file()
    }


def _declarations(files: dict[Path, str]) -> dict[str, set[Path]]:
    """Return the files that declare each task and group."""
    declared: dict[str, set[Path]] = defaultdict(set)
    for file, text in files.items():
        for name in _DECLARATION.findall(text):
            declared[name].add(file)
    return declared


def _folders(names: Sequence[str], root: Path, files: dict[Path, str]) -> list[Path]:
    """Return the folders of lm-eval's that declare the names, where one folder does."""
    declared = _declarations(files)
    tops = [{_top(file, root) for file in declared.get(name, ())} for name in names]
    return sorted({folder for folders in tops if len(folders) == 1 for folder in folders})


def _top(file: Path, root: Path) -> Path:
    """Return the folder of lm-eval's tasks that holds a file."""
    return root / file.relative_to(root).parts[0]


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Let lm-eval and datasets say errors only, and show no bars of their own."""
    import datasets

    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
