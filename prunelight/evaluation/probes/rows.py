"""Lines of a probe as rows of token ids, with the places that a model is asked at.

Rows work with any tokenizer: the tokens of an answer are those that follow what the text before it
gives alone. What a tokenizer cannot express, such as brackets without tokens, is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from transformers import PreTrainedTokenizerBase

from prunelight.evaluation.probes.questions import Line

EXAMPLES = 3  # lines at the beginning of a row that are not asked
_MOST_LINES = 400  # that are tried; a tokenizer may express few
_FIRST_LINES = 20  # of which it expresses one, or none of the others is tried


@dataclass(frozen=True)
class Place:
    """Tokens of a row that a model is to predict.

    Attributes:
        start: index of the first of them.
        stop: index after the last of them.
        options: token ids of which the one at `start` is to be the likeliest; empty where all
            tokens are to be the likeliest of the vocabulary.
    """

    start: int
    stop: int
    options: tuple[int, ...] = ()


@dataclass
class Row:
    """Token ids, and the places in them that are asked."""

    ids: list[int] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)


def make_rows(
    lines: Iterable[Line], tokenizer: PreTrainedTokenizerBase, *, num_rows: int, length: int
) -> list[Row]:
    """Return rows of whole lines, each at most `length` tokens.

    Args:
        lines: of one probe, without end.
        tokenizer: of the model.
        num_rows: how many rows to make.
        length: most tokens of a row.

    Returns:
        Rows with a place or more; none where the tokenizer cannot express the lines, or a row is
        too short for examples and a question.
    """
    start = first_tokens(tokenizer)
    tokens = _expressible(islice(lines, _MOST_LINES), tokenizer)
    rows: list[Row] = []
    row, num_lines = Row([*start]), 0
    for ids, places in tokens:
        if len(row.ids) + len(ids) > length:
            rows.append(row)
            row, num_lines = Row([*start]), 0
            if len(rows) == num_rows or len(start) + len(ids) > length:
                break
        if num_lines >= EXAMPLES:
            shift = len(row.ids)
            row.places += [Place(p.start + shift, p.stop + shift, p.options) for p in places]
        row.ids += ids
        num_lines += 1
    return [row for row in rows if row.places]


def first_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token that the tokenizer puts before a text, if it does."""
    ids, bos = tokenizer("a")["input_ids"], tokenizer.bos_token_id
    return [bos] if bos is not None and ids[:1] == [bos] else []


def _expressible(
    lines: Iterable[Line], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], list[Place]]]:
    """Yield tokens and places of the lines that the tokenizer expresses."""
    expressed = 0
    for number, line in enumerate(lines):
        if number == _FIRST_LINES and not expressed:
            return
        text = "".join(part.text for part in line)
        ids = _encoded(tokenizer, text)
        places, begin, start = [], 0, 0
        for part in line:
            end = begin + len(part.text)
            stop = _common(ids, _encoded(tokenizer, text[:end]))
            if part.asked:
                options = [_encoded(tokenizer, text[:begin] + each) for each in part.options]
                places.append(_place(ids, start, stop, options))
            begin, start = end, stop
        whole = str(tokenizer.decode(ids)).split() == text.split()
        known = [place for place in places if place is not None]
        if whole and len(known) == len(places):
            expressed += 1
            yield ids, known


def _place(ids: list[int], start: int, stop: int, options: Sequence[list[int]]) -> Place | None:
    """Return the place ids[start:stop]; None where an answer or an option has no tokens of its own.

    Args:
        ids: of a line.
        start: how many of them the text before the answer gives.
        stop: how many of them the text up to the end of the answer gives.
        options: ids of the text before the answer and each option.
    """
    # Options may begin alike, as " )" and " ]" do where the space has a token of its own.
    start = max(start, min((_common(options[0], other) for other in options[1:]), default=0))
    firsts = tuple(option[start] for option in options if len(option) > start)
    if not 0 < start < stop or len({*firsts}) != len(options):
        return None
    return Place(start, stop, firsts) if not options or ids[start] in firsts else None


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def _common(one: list[int], other: list[int]) -> int:
    """Return how many tokens two lists begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
