"""Rows as files hold them: each value becomes text, or an error says what it is instead.

Numbers are read as the text that JSON writes for them, bytes as UTF-8. A lone surrogate, which no
tokenizer takes, becomes U+FFFD. What has no one meaning as text (a truth value, a list, an object)
is refused.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

# What reading a file raises if the file is damaged; pyarrow's errors are ValueErrors in part only.
READ_ERRORS = (ValueError, OSError, RecursionError, LookupError, pyarrow.ArrowException)

_SURROGATE = re.compile("[\ud800-\udfff]")

_COMPRESSED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"BZh": "bzip2", b"(\xb5/\xfd": "zstd"}


class Row(dict[str, Any]):
    """Fields of one row of a source.

    Attributes:
        place: names the source and the row in errors.
        joined: how the rows of a named corpus became this text; empty for other sources.
    """

    place: str = ""
    joined: str = ""


def as_text(value: Any, field: str) -> str:
    """Return the value of a field as text that tokenizers take.

    Raises:
        ValueError: if it is no text, number or bytes of text.
    """
    if isinstance(value, (bytes, bytearray)):
        try:
            value = bytes(value).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"field {field!r} holds bytes that are not UTF-8 ({error})") from error
    if isinstance(value, str):
        if not _SURROGATE.search(value):
            return value
        # Two halves of one character become that character.
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    is_number = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    if is_number and not isinstance(value, bool):
        return json.dumps(value)
    raise ValueError(f"field {field!r} is {describe(value)}, which is no text")


def describe(value: Any) -> str:
    """Return what a value is, in a few words that fit a line."""
    names = {type(None): "null", dict: "an object", list: "a list", bool: "a truth value"}
    name = names.get(type(value), f"of type {type(value).__name__}")
    if value is None:
        return name
    try:
        shown = json.dumps(value, default=repr)
    except (RecursionError, ValueError):
        return name
    return f"{name} ({shown if len(shown) <= 40 else shown[:37] + '...'})"


def read_text(path: Path) -> str:
    """Return the text of a file, its lines ended by a line feed alone.

    Raises:
        ValueError: if it is no text in UTF-8, or in UTF-16 with a byte order mark.
    """
    return "\n".join(_decoded(line, f"line {number}") for line, number in _lines(path))


def read_json(path: Path) -> list[tuple[Any, str]]:
    """Return the rows of a .json or .jsonl file, each with the place of its line.

    A file is one list of rows, one object, or a row on each line.

    Raises:
        ValueError: if it holds something else; names the row and the line.
    """
    lines = [(line, number) for line, number in _lines(path) if line.strip()]
    try:
        whole = [_decoded(line, f"line {number}") for line, number in lines]
        content = json.loads("\n".join(whole))
    except (ValueError, RecursionError):
        if len(lines) > 1 and lines[0][0].strip() in (b"[", b"{"):  # one value over many lines
            raise
        # A row on each line; an error names it.
        return [_json_row(index, *line) for index, line in enumerate(lines)]
    is_row = len(lines) == 1 and path.suffix.lower() == ".jsonl" and _are_messages(content)
    if isinstance(content, list) and not is_row:
        return [(row, "") for row in content]
    return [(content, "")]


def read_parquet(path: Path, needed: set[str]) -> list[tuple[Any, str]]:
    """Return the rows of a .parquet file.

    Args:
        path: of the file.
        needed: fields that an error is raised for; another that cannot be read is left out.

    Raises:
        ValueError: if a needed value cannot be read; names the row.
    """
    table = pyarrow.parquet.ParquetFile(path).read()
    columns: dict[str, list[Any]] = {}
    for name in table.column_names:
        try:
            columns[name] = table.column(name).to_pylist()
        except READ_ERRORS as error:
            if name in needed:
                raise _unreadable_value(table.column(name), name) or error from error
    return [
        ({name: values[index] for name, values in columns.items()}, "")
        for index in range(table.num_rows)
    ]


def _lines(path: Path) -> list[tuple[bytes, int]]:
    """Return each line of a text file, without its end, and its number from 1."""
    content = path.read_bytes()
    for start, kind in _COMPRESSED.items():
        if content.startswith(start):
            raise ValueError(f"it is compressed by {kind}: unpack it")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        content = content.decode("utf-16").encode("utf-8", "surrogatepass")
    if b"\0" in content:
        raise ValueError("it holds NUL bytes")
    lines = content.splitlines()
    if content.endswith((b"\n", b"\r")):
        lines.append(b"")
    return [(line, number) for number, line in enumerate(lines, start=1)]


def _decoded(line: bytes, place: str) -> str:
    try:
        return line.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is not UTF-8: {error.reason}") from error


def _json_row(index: int, line: bytes, number: int) -> tuple[Any, str]:
    place = "" if index == number - 1 else f" (line {number})"
    text = _decoded(line, f"row {index}{place}")
    try:
        return json.loads(text), place
    except RecursionError:
        reason = "it is nested too deeply"
    except ValueError as error:
        reason = str(error)
    raise ValueError(f"row {index}{place}: {reason}")


def _are_messages(content: Any) -> bool:
    """Return whether a list is one conversation rather than many rows."""
    return isinstance(content, list) and all(
        isinstance(message, dict) and {"role", "content"} <= set(message) for message in content
    )


def _unreadable_value(column: Any, name: str) -> ValueError | None:
    """Return the error that names the first row of a column that cannot be read."""
    for index, value in enumerate(column):
        try:
            value.as_py()
        except READ_ERRORS as error:
            return ValueError(f"row {index}: field {name!r} cannot be read: {error}")
    return None
