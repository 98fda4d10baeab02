"""Rows and files that datasets hold in practice, and that a reader may stumble over."""

from __future__ import annotations

import gzip
import json
import random
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

GOOD = {"text": "The river runs past the old mill and down to the sea."}
DEEP = 3000  # lists within lists: more than Python's parser takes


def odd_value(draw: random.Random, depth: int = 0) -> Any:
    """Return a value of JSON, of any kind, nested at most three times."""
    plain: list[Any] = [
        None,
        True,
        False,
        0,
        -7,
        3.5,
        10**30,
        10**400,
        float("nan"),
        float("inf"),
        "",
        " \n",
        "a text of a few words",
        "\ud800 alone",
        "\ud83d\ude00",
        "zero \0 inside",
        "\ufeffmarked",
        "line\r\nline\rline",
        "{% raw %}{{ x }}",
    ]
    if depth == 3 or draw.random() < 0.7:
        return draw.choice(plain)
    inner = [odd_value(draw, depth + 1) for _ in range(draw.randrange(3))]
    if draw.random() < 0.5:
        return inner
    return dict(zip(draw.sample(["role", "content", "text", "x"], len(inner)), inner, strict=True))


def odd_row(draw: random.Random) -> Any:
    """Return a row in which one or more values are odd."""
    value, other = odd_value(draw), odd_value(draw)
    message = {"role": draw.choice(["user", "assistant", value]), "content": value}
    return draw.choice(
        [
            value,
            {"text": value},
            {"text": "good", "messages": value},
            {"messages": value},
            {"messages": [value, other]},
            {"messages": [message, {"role": "assistant", "content": other}]},
            {"prompt": value, "response": other},
            {"prompt": "Hello?", "response": value},
            {"instruction": value, "output": other},
            {"instruction": "Greet.", "output": "Hello.", "input": value},
            {},
            {"other": value},
        ]
    )


def rows_with_one_odd(draw: random.Random) -> tuple[list[Any], int]:
    """Return a few rows and which of them is odd."""
    rows: list[Any] = [dict(GOOD) for _ in range(4)]
    index = draw.randrange(len(rows))
    rows[index] = odd_row(draw)
    return rows, index


def write_json_lines(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_json_list(path: Path, rows: list[Any]) -> None:
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def write_table(path: Path, rows: list[Any]) -> None:
    """Write rows as a table of their fields; pyarrow refuses some, which is no fault of ours."""
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, path)


ROW_FILES: dict[str, Callable[[Path, list[Any]], None]] = {
    "rows.jsonl": write_json_lines,
    "rows.json": write_json_list,
    "rows.parquet": write_table,
}


def damaged_files() -> Iterator[tuple[str, bytes, int | None]]:
    """Yield the name of a file, its bytes, and the row at fault; None where a row is none."""
    good = (json.dumps(GOOD) + "\n").encode()
    lines = {
        "invalid UTF-8": b'{"text": "\xff\xfe"}\n',
        "latin 1": '{"text": "é"}\n'.encode("latin-1"),
        "no JSON": b"not json\n",
        "cut": good[:20] + b"\n",
        "two objects": b'{"text": "a"} {"text": "b"}\n',
        "deep": b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
        "deep messages": b'{"messages": ' + b"[" * DEEP + b"]" * DEEP + b"}\n",
        "huge number": b'{"text": ' + b"9" * 5000 + b"}\n",
        "Python": b"{'text': 'a'}\n",
    }
    for line in lines.values():
        for index in (0, 2):
            parts = [good] * 4
            parts[index] = line
            yield "rows.jsonl", b"".join(parts), index
            yield "rows.json", b"".join(parts), index
    whole = {
        "NUL": good + b"\0\0\n" + good,
        "marked": b"\xef\xbb\xbf" + good,
        "marked in the middle": good + b"\xef\xbb\xbf" + good,
        "CRLF": (good + good).replace(b"\n", b"\r\n"),
        "CR": (good + good).replace(b"\n", b"\r"),
        "blank lines": b"\n\n" + good + b"\n  \n" + good,
        "no end of line": (good + good)[:-1],
        "UTF-16": (good + good).decode().encode("utf-16"),
        "half of UTF-16": (good + good).decode().encode("utf-16")[:-1],
        "gzip": gzip.compress(good),
        "cut gzip": gzip.compress(good * 50)[:30],
        "zip": _zipped(good),
        "cut zip": _zipped(good)[:30],
        "nothing": b"",
        "blank": b" \n\n",
        "binary": bytes(range(256)),
    }
    for content in whole.values():
        for name in ("rows.jsonl", "rows.json", "rows.txt", "rows.parquet", "rows.csv", "rows.bin"):
            yield name, content, None
    table = BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([GOOD] * 50), table)
    full = table.getvalue()
    for size in (0, 3, 4, 12, len(full) // 2, len(full) - 1):
        yield "rows.parquet", full[:size], None
    for place in range(4, len(full) - 4, max(len(full) // 40, 1)):
        yield "rows.parquet", full[:place] + bytes([full[place] ^ 0xFF]) + full[place + 1 :], None
    yield "rows.parquet", _table({"text": pyarrow.array([b"fine", b"\xff\xfe"])}), 1
    yield "rows.parquet", _table({"text": _not_utf8()}), 1
    yield "rows.parquet", _table({"text": pyarrow.array([["a"], ["b", "c"]])}), 0
    yield "rows.parquet", _table({"other": pyarrow.array([1, 2])}), 0
    yield "rows.parquet", _table({"text": pyarrow.array([None, None], pyarrow.string())}), 0


def _zipped(content: bytes) -> bytes:
    file = BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("rows.jsonl", content)
    return file.getvalue()


def _table(columns: dict[str, Any]) -> bytes:
    file = BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


def _not_utf8() -> pyarrow.Array:
    """Return strings of which the second is not UTF-8, as writers in other languages make them."""
    return pyarrow.array([b"fine", b"\xff\xfe"]).view(pyarrow.string())
