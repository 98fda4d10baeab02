"""Reading rows of text or instructions: files, bundled samples, and datasets of the hub.

Deliberately not done: streaming corpora larger than memory.
"""

from __future__ import annotations

import json
import re
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import pyarrow.parquet

from prunelight.data.instructions import is_instruction_row

Row = dict[str, Any]

SAMPLES = {  # name of a sample text that prunelight ships -> its file
    **{f"sample:{name}": f"{name}.txt" for name in ("train", "calibration", "validation")},
    "sample:instructions": "instructions.jsonl",
}

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")

DATASET_NAME = re.compile(r"([^:\[\]]+)(?::([^\[\]]+))?(?:\[(.+)\])?")  # name:config[split]


def read_documents(source: str, *, split: str = "train", text_field: str = "text") -> list[Row]:
    """Read a source as rows; each row holds a text, or an instruction with its response.

    Args:
        source: a .txt (one document), .jsonl, .json or .parquet file; `sample:train`,
            `sample:calibration`, `sample:validation` or `sample:instructions`; or a dataset that
            `datasets.load_dataset` knows, as `name`, `name:config` or `name:config[split]`.
        split: split of a dataset whose name gives no split.
        text_field: name of the field that holds the text.

    Returns:
        Rows. Rows that are the lines of one text (such as WikiText's on the hub) become one row.

    Raises:
        FileNotFoundError: if `source` is written like a path and does not exist.
        ValueError: if `source` cannot be read, is empty, or has a row without text or instruction.
    """
    rows = _read_source(source, split, text_field)
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{source}: row {index} must be an object with fields: {row!r:.50}")
        if not is_instruction_row(row) and not isinstance(row.get(text_field), str):
            raise ValueError(
                f"{source}: row {index} has no text in field {text_field!r}, only the fields "
                f"{sorted(row)}; set text_field to the field that holds the text"
            )
    if not any(is_instruction_row(row) or row[text_field].strip() for row in rows):
        raise ValueError(f"{source} is empty; give a source that holds text")
    return _join_lines(rows, text_field)


def _read_source(source: str, split: str, text_field: str) -> list[Any]:
    if source in SAMPLES:
        with as_file(files("prunelight.data") / "sample" / SAMPLES[source]) as path:
            return _read_file(path, text_field)
    if source.startswith("sample:"):
        raise ValueError(f"source {source!r} is no bundled sample; choose {', '.join(SAMPLES)}")
    path = Path(source).expanduser()
    if path.is_dir() or (path.exists() and path.suffix not in SUFFIXES):
        raise ValueError(f"source {source!r} must be a file that ends in {', '.join(SUFFIXES)}")
    if path.exists():
        return _read_file(path, text_field)
    if path.suffix in SUFFIXES or source.startswith(("/", ".", "~")):
        raise FileNotFoundError(f"source {source!r} does not exist; check the path")
    return _read_dataset(source, split)


def _read_file(path: Path, text_field: str) -> list[Any]:
    try:
        if path.suffix == ".parquet":
            return pyarrow.parquet.read_table(path).to_pylist()
        text = path.read_text(encoding="utf-8-sig")
        if "\0" in text:
            raise ValueError("it holds NUL bytes")
        if path.suffix == ".txt":
            return [{text_field: text}]
        if text.lstrip().startswith("["):
            return json.loads(text)
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except ValueError as error:  # also UnicodeDecodeError, JSONDecodeError and ArrowInvalid
        kind = "UTF-8 text" if path.suffix == ".txt" else f"{path.suffix} data"
        raise ValueError(f"{path} is not {kind} ({error}); give another file or suffix") from error


def _read_dataset(source: str, split: str) -> list[Any]:
    from datasets import load_dataset  # takes a second to import; no other function needs it

    name = DATASET_NAME.fullmatch(source)
    try:
        if name is None:
            raise ValueError("it is not written name:config[split]")
        return load_dataset(name[1], name[2], split=name[3] or split).to_list()
    except Exception as error:  # the hub's errors have no common base class
        fault = f"source {source!r} is neither a file nor a dataset that can be reached ({error})"
        raise ValueError(f"{fault}; give a local file: {', '.join(SUFFIXES)}") from error


def _join_lines(rows: list[Row], text_field: str) -> list[Row]:
    """Join rows that are lines of one text: some rows are blank, all others end in a new line."""
    texts = [row.get(text_field) for row in rows]
    if "" not in texts or not all(text == "" or str(text).endswith("\n") for text in texts):
        return rows
    return [{text_field: "".join(text or " \n" for text in texts)}]  # " \n" as in wiki.train.raw
