"""The corpora of the pruning literature by name: where each lies, and how its rows become a text.

A source is `NAME`, `NAME[split]`, `NAME[split[:1000]]`, or with another join
`NAME:JOIN[split]`. Revisions are pinned where the hub has a commit that does not move; datasets
that are scripts, which datasets 4 refuses, are read from the hub's parquet copy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Join = Literal["blank_lines", "spaces", "documents", "raw"]

JOINS: dict[str, str] = {  # how rows become a text -> as a protocol says it
    "blank_lines": "joined by a blank line",
    "spaces": "joined by a space",
    "documents": "each a document",
    "raw": "joined as they stand",
}

PARQUET_COPY = "refs/convert/parquet"  # the hub makes it of datasets that are scripts

# A row of a text file: a line with its end as in WikiText, a line alone, or the whole file.
Lines = Literal["wikitext", "sentences", "whole", "none"]


@dataclass(frozen=True)
class Corpus:
    """One corpus of the catalogue.

    Attributes:
        hub_id: dataset of the hub.
        revision: commit or branch of it.
        files: split -> file of the dataset; may be a pattern with `*` if `streamed`.
        joins: split -> how its rows are joined unless the source says otherwise.
        licence: of the texts, as their publisher states it.
        text_field: the field that holds the text; None for instructions.
        lines: what is a row of a local .txt file.
        streamed: only as many rows are fetched as are needed; else a whole split, which is small.
        first: split -> the papers' number of rows, taken unless the source says otherwise.
        stands_in: split that is asked for -> split that the literature takes instead.
    """

    hub_id: str
    revision: str
    files: Mapping[str, str]
    joins: Mapping[str, Join]
    licence: str
    text_field: str | None = "text"
    lines: Lines = "whole"
    streamed: bool = False
    first: Mapping[str, int] = field(default_factory=dict)
    stands_in: Mapping[str, str] = field(default_factory=dict)


def _each(join: Join, *splits: str) -> dict[str, Join]:
    return dict.fromkeys(splits, join)


CORPORA: dict[str, Corpus] = {
    # SparseGPT, Wanda, DLP, LLM-Pruner: "\n\n".join(rows) of the raw form, train and test.
    "wikitext2": Corpus(
        hub_id="Salesforce/wikitext",
        revision="b08601e04326c79dfdd32d625aee71d232d685c3",
        files={
            split: f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet"
            for split in ("train", "validation", "test")
        },
        joins=_each("blank_lines", "train", "validation", "test"),
        licence="CC BY-SA 3.0, GFDL",
        lines="wikitext",
    ),
    # SparseGPT, Wanda, DLP: train shard 0; " ".join of the first 1100 rows of validation shard 0.
    "c4": Corpus(
        hub_id="allenai/c4",
        revision="607bd4c8450a42878aa9ddc051a65a055450ef87",
        files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
        joins={"train": "documents", "validation": "spaces"},
        licence="ODC-By 1.0",
        streamed=True,
        first={"validation": 1100},
        stands_in={"test": "validation"},
    ),
    # SparseGPT: " ".join of test; LLM-Pruner and SLM: ptb:blank_lines[validation].
    "ptb": Corpus(
        hub_id="ptb-text-only/ptb_text_only",
        revision=PARQUET_COPY,
        files={
            split: f"penn_treebank/{split}/0000.parquet"
            for split in ("train", "validation", "test")
        },
        joins=_each("spaces", "train", "validation", "test"),
        licence="LDC User Agreement for Non-Members: research only",
        text_field="sentence",
        lines="sentences",
    ),
    # ShortGPT calibrates on it. deepmind/pg19 is a script that fetches each book by itself. Others
    # read data/test-00000-of-00001-29a571947c0b5ccc.parquet of the copy at c021754. We saw no
    # names of the other splits' files.
    "pg19": Corpus(
        hub_id="emozilla/pg19",
        revision="main",
        files={split: f"data/{split}-*.parquet" for split in ("train", "validation", "test")},
        joins=_each("documents", "train", "validation", "test"),
        licence="Apache-2.0 (deepmind/pg19); the books are in the public domain in the USA",
        streamed=True,
    ),
    # SLM and LLM-Pruner calibrate on it; its rows are the sentences of books, in their order.
    "bookcorpus": Corpus(
        hub_id="bookcorpus/bookcorpus",
        revision=PARQUET_COPY,
        files={"train": "plain_text/train/*.parquet"},
        joins=_each("spaces", "train"),
        licence="unknown: the authors of the books keep their rights",
        lines="sentences",
        streamed=True,
    ),
    "alpaca": Corpus(
        hub_id="tatsu-lab/alpaca",
        revision="dce01c9b08f87459cf36a430d809084718273017",
        files={"train": "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet"},
        joins=_each("documents", "train"),
        licence="CC BY-NC 4.0: not for commercial use",
        text_field=None,
        lines="none",
    ),
}

_SOURCE = re.compile(
    rf"({'|'.join(CORPORA)})(?::([^@\[\]]*))?(?:\[(\w+)(?:\[(\d*):(\d*)\])?\])?(?:@(.+))?"
)


@dataclass(frozen=True)
class CorpusPart:
    """What a source names of a corpus.

    Attributes:
        name: of the corpus, see `CORPORA`.
        split: that is read.
        join: how rows become texts.
        start: the first row.
        stop: the row behind the last one; None for as many as are there or needed.
        revision: of the dataset.
    """

    name: str
    split: str
    join: str
    start: int
    stop: int | None
    revision: str

    @property
    def corpus(self) -> Corpus:
        """The row of the catalogue."""
        return CORPORA[self.name]

    def protocol(self, rows: int) -> str:
        """Return how so many rows became a text, in words."""
        behind = f" behind the first {self.start}" if self.start else ""
        comma = "," if self.join == "documents" else ""
        return f"split {self.split}, {rows} rows{behind}{comma} {JOINS[self.join]}"


def is_corpus(source: str) -> bool:
    """Return whether a source is written as a corpus of the catalogue, perhaps wrongly."""
    return re.match(rf"({'|'.join(CORPORA)})(?=$|[:\[@])", source) is not None


def corpus_part(source: str, *, split: str) -> CorpusPart:
    """Return what a source names of a corpus.

    Args:
        source: `NAME`, `NAME:JOIN`, `NAME[split]` or `NAME[split[a:b]]`, `@revision` behind it.
        split: taken if the source gives none.

    Raises:
        ValueError: if the corpus has no such split or join, or no row is named.
    """
    match = _SOURCE.fullmatch(source)
    if match is None:
        raise ValueError(
            f"source {source!r} must be written NAME:JOIN[split[a:b]]@revision, where all but NAME "
            f"may be left out, such as c4[train[:1000]]"
        )
    name, join, given, first, last, revision = match.groups()
    corpus = CORPORA[name]
    split = given or corpus.stands_in.get(split, split)
    if split not in corpus.files:
        there = ", ".join(corpus.files)
        only = next(iter(corpus.files))
        raise ValueError(
            f"source {source!r}: the corpus {name} has no split {split!r}, only {there}; write "
            f"{name}[{only}], or {name}[{only}[:1000]] for its first 1000 rows"
        )
    allowed = _joins_of(corpus)
    if join is not None and join not in allowed:
        raise ValueError(
            f"source {source!r}: {name} cannot be joined by {join!r}; choose {', '.join(allowed)}"
        )
    start = int(first or 0)
    papers = corpus.first.get(split) if first is None else None
    stop = int(last) if last else papers
    if stop is not None and stop <= start:
        raise ValueError(f"source {source!r} names no row; give an end above {start}")
    return CorpusPart(
        name=name,
        split=split,
        join=join or corpus.joins[split],
        start=start,
        stop=stop,
        revision=revision or corpus.revision,
    )


def _joins_of(corpus: Corpus) -> tuple[str, ...]:
    if corpus.text_field is None:
        return ("documents",)
    return tuple(join for join in JOINS if join != "raw" or corpus.lines == "wikitext")


def joined(texts: Sequence[str], join: str) -> list[str]:
    """Return the texts that the rows of a corpus become.

    Args:
        texts: of its rows.
        join: one of `JOINS`.
    """
    if join == "documents":
        return [text for text in texts if text.strip()]
    if join == "raw":  # a blank line is " \n", as in wiki.test.raw
        return ["".join(text or " \n" for text in texts)]
    return [("\n\n" if join == "blank_lines" else " ").join(texts)]


def wikitext_rows(text: str) -> list[str]:
    """Return the rows of WikiText's raw text as `datasets` gives them: a line, or "" for a blank.

    A line keeps its end.
    """
    lines = text.removesuffix("\n").split("\n")
    return [f"{line}\n" if line.strip() else "" for line in lines]
