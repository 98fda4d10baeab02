"""Rows of a task from local files: where they lie, what they hold, and whether that suffices.

A folder `tasks_dir` holds `TASK/SPLIT.jsonl`, such as `piqa/validation.jsonl`: one row a line, with
the fields of the data set on the hub. The tasks of a group whose data set has a part for each task,
such as the subjects of MMLU, share `GROUP/SPLIT.jsonl`; its rows say their part as `subject`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class LocalData:
    """Where the rows of one task lie.

    Attributes:
        folder: of the files.
        subject: of the rows that belong to the task; None where all do.
        splits: of the task that are there, by what they are for: "asked" and "examples".
    """

    folder: Path
    subject: str | None
    asked: str
    examples: str | None

    def file(self, split: str) -> Path:
        """Return the file of a split."""
        return self.folder / f"{split}.jsonl"

    @property
    def name(self) -> str:
        """The file of the questions, with its folder."""
        return f"{self.folder.name}/{self.asked}.jsonl"


def asked_split(config: dict[str, Any]) -> str | None:
    """Return the split whose rows are the questions, by the settings of a task."""
    return config.get("test_split") or config.get("validation_split")


def examples_split(config: dict[str, Any]) -> str | None:
    """Return the split of the few-shot examples, by the settings of a task; None if it has none."""
    fewshot = config.get("fewshot_config") or {}
    if fewshot.get("samples") is not None:
        return None
    return (
        fewshot.get("split")
        or config.get("fewshot_split")
        or config.get("training_split")
        or config.get("validation_split")
        or config.get("test_split")
    )


class RowFiles:
    """Files of rows; each is read once."""

    def __init__(self) -> None:
        self._rows: dict[Path, list[tuple[int, Row]]] = {}
        self.checksums: dict[str, str] = {}

    def rows(self, data: LocalData, split: str) -> list[tuple[int, Row]]:
        """Return line number and row of each row of a task.

        Raises:
            ValueError: if the file holds no row for it, or lines that are no rows.
        """
        file = data.file(split)
        if file not in self._rows:
            self._rows[file] = [*_read(file)]
            checksum = sha256(file.read_bytes()).hexdigest()
            self.checksums[f"{file.parent.name}/{file.name}"] = checksum
        rows = self._rows[file]
        if data.subject is not None:
            for line, row in rows:
                if "subject" not in row:
                    raise ValueError(
                        f"row {line} of {file} lacks the field 'subject', by which the tasks of "
                        f"{file.parent.name} find their rows"
                    )
            rows = [(line, row) for line, row in rows if row["subject"] == data.subject]
        if not rows:
            of = "" if data.subject is None else f" of subject {data.subject!r}"
            raise ValueError(f"{file} holds no row{of}; it must hold at least one")
        return rows


def _read(file: Path) -> Iterator[tuple[int, Row]]:
    for line, text in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError as error:
            raise ValueError(f"row {line} of {file} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"row {line} of {file} must be a JSON object with fields, not {text}")
        yield line, row


def as_dataset(rows: list[tuple[int, Row]], file: Path) -> Any:
    """Return rows as a data set in memory.

    Raises:
        ValueError: if a field holds values of several kinds.
    """
    import pyarrow
    from datasets import Dataset

    try:
        return Dataset.from_list([row for _, row in rows])
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, TypeError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"a field of {file} must hold values of one kind: {text}") from None


def swapped(config: dict[str, Any], splits: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a task with its data swapped for local splits.

    Splits that are not there are those of examples that nothing asks for.
    """
    from datasets import DatasetDict

    def load(**_: object) -> DatasetDict:
        return DatasetDict(splits)

    ours: dict[str, Any] = {**config, "custom_dataset": load, "dataset_kwargs": None}
    names = ("training_split", "validation_split", "test_split", "fewshot_split")
    for name in names:
        if ours.get(name) not in splits:
            ours[name] = None
    if (ours.get("fewshot_config") or {}).get("split", None) not in {*splits, None}:
        ours["fewshot_config"] = {**ours["fewshot_config"], "split": None}
    return ours


def check_fields(rows: list[tuple[int, Row]], file: Path, read: Callable[[Row], object]) -> None:
    """Check that no row lacks a field that the task reads.

    Args:
        rows: line number and row of each.
        file: of the rows.
        read: does with one row what the task does.

    Raises:
        ValueError: for the first row that lacks one; it names the file, the row and the field.
    """
    fields = dict.fromkeys(name for _, row in rows for name in _paths(row))
    for line, row in rows:
        lacking = [name for name in fields if name not in _paths(row)]
        if not lacking:
            continue
        try:
            read(_without_nulls(row))
        except Exception as error:
            raise lacks(file, line, error, lacking) from None


def lacks(file: Path, line: int, error: Exception, lacking: list[str]) -> ValueError:
    """Return the error for a row that a task cannot read."""
    text = " ".join(str(error).split())
    named = [name for name in lacking if name.rpartition(".")[2] in text] or lacking
    if not named:
        return ValueError(f"row {line} of {file} does not fit the task: {text}")
    fields = " and ".join(repr(name) for name in named)
    return ValueError(
        f"row {line} of {file} lacks the field {fields}, which the task reads; add it, or leave "
        "the row out"
    )


def _paths(row: Row) -> dict[str, None]:
    """Return the names of fields that hold a value: "choices" and "choices.text"."""
    paths: dict[str, None] = {}
    for name, value in row.items():
        if value is not None:
            paths[name] = None
        if isinstance(value, dict):
            paths |= {f"{name}.{inner}": None for inner in _paths(value)}
    return paths


def _without_nulls(row: Row) -> Row:
    return {
        name: _without_nulls(value) if isinstance(value, dict) else value
        for name, value in row.items()
        if value is not None
    }
