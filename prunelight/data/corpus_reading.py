"""Rows of named corpora and of files on the hub, from this machine or fetched as far as needed.

A corpus is looked for in the directory that the environment variable PRUNELIGHT_DATA names, as
NAME/SPLIT.parquet, .jsonl, .json or .txt: the layout that `load_dataset(directory)` reads too. Then
in the hub's cache, then on the hub. A big corpus is streamed and ends when there is enough text.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from prunelight.data.corpora import Corpus, CorpusPart, joined, wikitext_rows
from prunelight.data.instructions import INSTRUCTION_FIELDS

log = logging.getLogger(__name__)

DATA_VARIABLE = "PRUNELIGHT_DATA"

# Characters that a streamed corpus ends after if nobody says how many are needed: about 5 million
# tokens of English text.
MOST_CHARACTERS = 20_000_000

# More than a token of English text has on average, so that enough windows can be cut.
CHARACTERS_OF_A_TOKEN = 6

HUB_FILES = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?/(.+?)(?:\[(\d*):(\d*)\])?")

_BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}

ReadFile = Callable[[Path, str], list[tuple[Any, str]]]  # path, text_field -> rows and lines


def corpus_rows(
    part: CorpusPart, *, text_field: str, enough: int | None, read_file: ReadFile
) -> tuple[list[dict[str, Any]], str]:
    """Return the rows of a part of a corpus, joined as it says, and how, in words.

    Args:
        part: of the corpus.
        text_field: name of the field that is to hold the text.
        enough: characters after which a streamed corpus may end; None for `MOST_CHARACTERS`.
        read_file: reads a file of this machine.

    Raises:
        ValueError: if it is neither here nor reachable; names the files that would do.
        OSError: if a file of this machine cannot be read.
    """
    local = _local_file(part)
    if local is not None:
        rows = _rows_of_file(local, part.corpus, read_file)
        place = str(local)
    else:
        place = f"{part.corpus.hub_id}, {part.corpus.files[part.split]} at {part.revision}"
        rows = _fetched(part, place, read_file)
    field = part.corpus.text_field
    stops = part.corpus.streamed and part.stop is None
    wanted: Iterator[Any] = islice(rows, part.start, part.stop)
    if stops:
        wanted = _until(wanted, field, enough or MOST_CHARACTERS)
    try:
        taken = list(wanted)
        more = stops and next(rows, None) is not None
    except Exception as error:  # the hub's errors have no common base class
        if local is not None:
            raise
        raise _unreachable(part, place, error) from error
    ended = f"; they are enough, {part.name}[{part.split}[:N]] takes N rows" if more else ""
    protocol = part.protocol(len(taken))
    log.info("%s is %s: %s%s", part.name, place, protocol, ended)
    if field is None:
        return taken, protocol
    texts = [_text(row, field, f"{place}: row {i}") for i, row in enumerate(taken, part.start)]
    return [{text_field: text} for text in joined(texts, part.join)], protocol


def hub_file_rows(source: str, *, text_field: str, enough: int | None) -> list[dict[str, Any]]:
    """Return the rows of files on the hub, streamed; `[a:b]` behind the path gives the rows.

    Args:
        source: `hf://datasets/OWNER/NAME@REVISION/PATH`; PATH may be a pattern.
        text_field: the field whose characters are counted.
        enough: characters after which no more rows are fetched; None for `MOST_CHARACTERS`.

    Raises:
        ValueError: if the source is written otherwise, or cannot be reached.
    """
    match = HUB_FILES.fullmatch(source)
    builder = _builder(match[3]) if match else None
    if match is None or builder is None:
        raise ValueError(
            f"source {source!r} must be hf://datasets/OWNER/NAME@REVISION/PATH, where @REVISION "
            f"may be left out and PATH ends in {', '.join(_BUILDERS)}, perhaps .gz behind it"
        )
    name, revision, path, first, last = match.groups()
    url = f"hf://datasets/{name}{f'@{revision}' if revision else ''}/{path}"
    try:
        rows = _stream(builder, url)
        wanted: Iterator[Any] = islice(rows, int(first or 0), int(last) if last else None)
        if not last:
            wanted = _until(wanted, text_field, enough or MOST_CHARACTERS)
        taken = list(wanted)
        more = not last and next(rows, None) is not None
    except Exception as error:  # the hub's errors have no common base class
        fault = f"source {source!r} cannot be reached or read ({_reason(error)})"
        raise ValueError(f"{fault}; check its name, or give a file of this machine") from error
    if more:
        log.info("%s: %s rows are enough; %s[:N] takes N rows", url, len(taken), url)
    return taken


def characters_of(tokens: int) -> int:
    """Return how many characters of English text hold at least so many tokens."""
    return tokens * CHARACTERS_OF_A_TOKEN


def _local_file(part: CorpusPart) -> Path | None:
    """Return the corpus's file in the directory of PRUNELIGHT_DATA; None if it is not there.

    Raises:
        ValueError: if the variable names no directory.
    """
    given = os.environ.get(DATA_VARIABLE)
    if not given:
        return None
    folder = Path(given).expanduser()
    if not folder.is_dir():
        raise ValueError(
            f"{DATA_VARIABLE}={given} is no directory; name the one that holds "
            f"{part.name}/{part.split}.parquet, or unset it"
        )
    files = (folder / part.name / f"{part.split}{suffix}" for suffix in _suffixes(part.corpus))
    return next((file for file in files if file.is_file()), None)


def _suffixes(corpus: Corpus) -> list[str]:
    """Return the endings of local files, the ones with the most structure first."""
    return [suffix for suffix in _BUILDERS if suffix != ".txt" or corpus.lines != "none"]


def _rows_of_file(path: Path, corpus: Corpus, read_file: ReadFile) -> Iterator[Any]:
    """Yield the rows of a file of this machine."""
    field = corpus.text_field or "text"
    rows = [row for row, _ in read_file(path, field)]
    if path.suffix.lower() != ".txt" or corpus.lines == "whole":
        return iter(rows)
    (row,) = rows
    text = row[field]
    if corpus.lines == "wikitext":
        lines = wikitext_rows(text)
    else:
        lines = [line.strip() for line in text.split("\n") if line.strip()]
    return iter([{field: line} for line in lines])


def _fetched(part: CorpusPart, place: str, read_file: ReadFile) -> Iterator[Any]:
    """Yield the rows of the hub's cache or of the hub."""
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    corpus, file = part.corpus, part.corpus.files[part.split]
    try:
        where: dict[str, Any] = {"repo_type": "dataset", "revision": part.revision}
        where["cache_dir"] = constants.HF_HUB_CACHE
        path: Any = try_to_load_from_cache(corpus.hub_id, file, **where)
        if not isinstance(path, str) and corpus.streamed:
            revision = part.revision.replace("/", "%2F")
            url = f"hf://datasets/{corpus.hub_id}@{revision}/{file}"
            return _stream(str(_builder(file)), url)
        if not isinstance(path, str):
            path = hf_hub_download(corpus.hub_id, file, **where)
    except Exception as error:  # the hub's errors have no common base class
        raise _unreachable(part, place, error) from error
    if corpus.streamed:
        return _stream(str(_builder(file)), path)
    return _rows_of_file(Path(path), corpus, read_file)


def _stream(builder: str, url: str) -> Iterator[Any]:
    from datasets import load_dataset  # takes a second to import; no other function needs it

    return iter(load_dataset(builder, data_files=[url], split="train", streaming=True))


def _builder(path: str) -> str | None:
    """Return what reads a file on the hub; None if nothing does."""
    return _BUILDERS.get(Path(path.removesuffix(".gz")).suffix.lower())


def _until(rows: Iterable[Any], field: str | None, characters: int) -> Iterator[Any]:
    """Yield rows until they hold so many characters.

    Without a field, or where a row lacks it, all strings of the row count.
    """
    fields = {name for names in INSTRUCTION_FIELDS for name in names}
    for row in rows:
        yield row
        value = row.get(field) if isinstance(row, dict) and field else None
        if isinstance(value, str):
            characters -= len(value)
        elif isinstance(row, dict):
            characters -= sum(len(str(row[name])) for name in fields & set(row))
        if characters <= 0:
            return


def _text(row: Any, field: str, place: str) -> str:
    """Return the text of a corpus's row; a local file may call its field `text`, or hold strings.

    Raises:
        ValueError: if it has none.
    """
    if isinstance(row, str):
        return row
    value = row.get(field, row.get("text")) if isinstance(row, dict) else None
    if not isinstance(value, str):
        names = " or ".join(repr(name) for name in dict.fromkeys((field, "text")))
        raise ValueError(f"{place} has no text in field {names}; rename the field of that file")
    return value


def _unreachable(part: CorpusPart, place: str, error: Exception) -> ValueError:
    endings = ", ".join(_suffixes(part.corpus))
    given = os.environ.get(DATA_VARIABLE)
    folder = Path(given or f"${DATA_VARIABLE}").expanduser()
    unset = "" if given else f", where {DATA_VARIABLE} names a directory"
    return ValueError(
        f"the corpus {part.name} ({place}) cannot be reached ({_reason(error)}); go online, or put "
        f"its split {part.split} at {folder / part.name / part.split} with one of the endings "
        f"{endings}{unset}"
    )


def _reason(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
