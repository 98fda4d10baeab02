"""Reading rows of text or instructions: files, bundled samples, named corpora, and hub datasets.

Deliberately not done: training on corpora larger than memory.
"""

from __future__ import annotations

import os
import re
from difflib import get_close_matches
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from prunelight.data.corpora import CORPORA, corpus_part, is_corpus
from prunelight.data.corpus_reading import corpus_rows, hub_file_rows
from prunelight.data.instructions import INSTRUCTION_FIELDS, check_instruction, is_instruction_row
from prunelight.data.rows import (
    READ_ERRORS,
    Row,
    as_text,
    describe,
    read_json,
    read_parquet,
    read_text,
)

SAMPLES = {  # name of a sample text that prunelight ships -> its file
    **{f"sample:{name}": f"{name}.txt" for name in ("train", "calibration", "validation")},
    "sample:instructions": "instructions.jsonl",
}

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")

# name:config[split]@revision
DATASET_NAME = re.compile(r"([^:@\[\]]+)(?::([^@\[\]]+))?(?:\[(.+)\])?(?:@(.+))?")

HUB_PREFIX = "hf://datasets/"


def read_documents(
    source: str | os.PathLike[str],
    *,
    split: str = "train",
    text_field: str = "text",
    enough: int | None = None,
) -> list[Row]:
    """Read a source as rows; each row holds a text, or an instruction with its response.

    Rows that are a string alone become texts, and rows that are a list of messages conversations.

    Args:
        source: a .txt (one document), .jsonl, .json or .parquet file; `sample:train`,
            `sample:calibration`, `sample:validation` or `sample:instructions`; a corpus of
            `prunelight.data.corpora`, as `wikitext2` or `c4[train[:1000]]`; a dataset that
            `datasets.load_dataset` knows, as `name:config[split]@revision`, all but the name left
            out at will; or files on the hub, as `hf://datasets/OWNER/NAME@REVISION/PATH`.
        split: split of a corpus or dataset whose name gives no split.
        text_field: name of the field that holds the text; a corpus's own field is known.
        enough: characters after which c4, pg19, bookcorpus and files on the hub may end, so that no
            more is fetched; None for 20 million. Other sources are read whole.

    Returns:
        Rows. Rows that are the lines of one text (such as WikiText's on the hub) become one row.

    Raises:
        FileNotFoundError: if `source` is written like a path and does not exist.
        ValueError: if `source` cannot be read, is empty, or has a row without text or instruction.
    """
    source = os.fspath(source)
    part = corpus_part(source, split=split) if is_corpus(source) else None
    if part is not None:
        given, protocol = corpus_rows(
            part, text_field=text_field, enough=enough, read_file=_read_file
        )
        read = enumerate((row, "") for row in given)
    elif source.startswith(HUB_PREFIX):
        given = hub_file_rows(source, text_field=text_field, enough=enough)
        read = enumerate((row, "") for row in given)
    else:
        read = enumerate(_read_source(source, split, text_field))
    rows = [_checked_row(row, f"{source}: row {i}{line}", text_field) for i, (row, line) in read]
    if not any(is_instruction_row(row) or row[text_field].strip() for row in rows):
        raise ValueError(f"{source} is empty; give a source that holds text")
    if part is None:
        return _join_lines(rows, text_field)
    for row in rows:
        row.joined = protocol
    return rows


def _checked_row(content: Any, place: str, text_field: str) -> Row:
    """Return a row whose fields can be read.

    Raises:
        ValueError: if it has neither text nor an instruction; names source and row.
    """
    if isinstance(content, (str, bytes)):
        content = {text_field: content}
    elif isinstance(content, list) and content and isinstance(content[0], dict):
        content = {"messages": content}
    elif not isinstance(content, dict):
        raise ValueError(
            f"{place} must be an object with fields, or a text: it is {describe(content)}"
        )
    text = content.get(text_field)
    if text is not None:  # a table of texts and instructions has all columns in each row
        instruction = {field for fields in INSTRUCTION_FIELDS for field in fields} - {text_field}
        content = {k: v for k, v in content.items() if v is not None or k not in instruction}
    row = Row(content)
    row.place = place
    remedy = "set text_field to the field that holds the text"
    if text is None and not is_instruction_row(row):
        raise ValueError(
            f"{place} has no text in field {text_field!r}, only the fields {sorted(row)}; {remedy}"
        )
    try:
        if is_instruction_row(row):
            check_instruction(row)
        else:
            row[text_field] = as_text(text, text_field)
    except ValueError as error:
        raise ValueError(f"{place}: {error}; change the row, or {remedy}") from error
    except RecursionError as error:
        raise ValueError(f"{place} is nested too deeply; change the row, or {remedy}") from error
    return row


def _read_source(source: str, split: str, text_field: str) -> list[tuple[Any, str]]:
    if source in SAMPLES:
        with as_file(files("prunelight.data") / "sample" / SAMPLES[source]) as path:
            return _read_file(path, text_field)
    if source.startswith("sample:"):
        raise ValueError(f"source {source!r} is no bundled sample; choose {', '.join(SAMPLES)}")
    if "://" in source or "::" in source:
        raise ValueError(
            f"source {source!r} must be a file on this machine or a dataset's name; download it"
        )
    path = Path(source).expanduser()
    if path.is_dir() or (path.exists() and path.suffix.lower() not in SUFFIXES):
        raise ValueError(f"source {source!r} must be a file that ends in {', '.join(SUFFIXES)}")
    if path.exists():
        return _read_file(path, text_field)
    if path.suffix.lower() in SUFFIXES or source.startswith(("/", ".", "~")):
        raise FileNotFoundError(f"source {source!r} does not exist; check the path")
    return _read_dataset(source, split)


def _read_file(path: Path, text_field: str) -> list[tuple[Any, str]]:
    """Return the rows of a file, each with the line it stands in where that is another number."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            needed = {text_field, *(field for fields in INSTRUCTION_FIELDS for field in fields)}
            return read_parquet(path, needed)
        return [({text_field: read_text(path)}, "")] if suffix == ".txt" else read_json(path)
    except READ_ERRORS as error:
        kind = "UTF-8 text" if suffix == ".txt" else f"{suffix} data"
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path} is not {kind} ({reason}); give another file or suffix") from error


def _read_dataset(source: str, split: str) -> list[tuple[Any, str]]:
    from datasets import load_dataset  # takes a second to import; no other function needs it

    name = DATASET_NAME.fullmatch(source)
    try:
        if name is None:
            raise ValueError("it is not written name:config[split]@revision")
        if name[1] == "pandas":  # reads pickles of the working directory, before datasets 5
            raise ValueError("pandas names a kind of pickled files")
        pinned = {"revision": name[4]} if name[4] else {}
        rows = load_dataset(name[1], name[2], split=name[3] or split, **pinned).to_list()
        return [(row, "") for row in rows]
    except Exception as error:  # the hub's errors have no common base class
        reason = str(error).partition("\n")[0] or type(error).__name__
        fault = f"source {source!r} is neither a file nor a dataset that can be reached ({reason})"
        near = get_close_matches(source.rpartition("/")[2], CORPORA, n=1)
        meant = f"; did you mean the corpus {near[0]}?" if near else ""
        remedy = f"give a local file: {', '.join(SUFFIXES)}"
        raise ValueError(f"{fault}; {remedy}{meant}") from error


def _join_lines(rows: list[Row], text_field: str) -> list[Row]:
    """Join rows that are lines of one text: some rows are blank, all others end in a new line."""
    texts = [row.get(text_field) for row in rows]
    if "" not in texts or not all(text == "" or str(text).endswith("\n") for text in texts):
        return rows
    return [
        Row({text_field: "".join(text or " \n" for text in texts)})
    ]  # " \n" as in wiki.train.raw
