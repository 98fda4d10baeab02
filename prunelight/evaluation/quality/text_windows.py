"""Windows of a text by the protocol of the pruning papers, with a sentence that states it.

The papers read WikiText-2 raw as rows, join the rows by a blank line, tokenise all of it at once,
cut it into windows that do not overlap, and leave out the tail that fills no window (SparseGPT,
arXiv:2301.00774, and those after it). A text file of that form is given the same rows here.
`keep_tail` makes the tail a shorter last window instead, so that every token counts.
"""

# N windows, T tokens of a window

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from prunelight.calibration.windows import Windows
from prunelight.data.corpora import wikitext_rows
from prunelight.data.corpus_reading import characters_of
from prunelight.data.instructions import is_instruction_row
from prunelight.data.sources import SAMPLES, read_documents
from prunelight.data.token_windows import Bos, bos_token_id, pack_windows
from prunelight.losses import IGNORED_LABEL

# A heading of WikiText's raw form, on a line of its own: " = Robert Boulter = ".
_HEADING = re.compile(r"^ = [^=\n].*[^=\n]? = ?$", re.MULTILINE)
_BLANK_LINE = "\n\n"


@dataclass(frozen=True)
class TextWindows:
    """Windows of one text.

    Attributes:
        text: name of the text, without folders.
        protocol: how the windows were made, in one sentence.
        ids: token ids, LongTensor (N, T).
        labels: (N, T), IGNORED_LABEL behind the end of a shorter last window; None without one.
    """

    text: str
    protocol: str
    ids: Tensor
    labels: Tensor | None = None

    @property
    def windows(self) -> Windows:
        """Windows as models and labels are given them."""
        return self.ids if self.labels is None else {"input_ids": self.ids, "labels": self.labels}

    @property
    def seq_len(self) -> int:
        """Tokens of a window."""
        return self.ids.shape[1]


def text_windows(
    tokenizer: PreTrainedTokenizerBase,
    source: str | Path,
    seq_len: int,
    *,
    max_windows: int | None = None,
    keep_tail: bool = False,
    bos: Bos = "auto",
    text_field: str = "text",
    split: str = "test",
) -> TextWindows:
    """Return the windows of a text, in its order.

    Args:
        tokenizer: of the model.
        source: what `prunelight.read_documents` takes.
        seq_len: tokens of a window.
        max_windows: take the first so many windows; None takes all.
        keep_tail: the tokens that fill no window are a shorter last one; else they are left out, as
            in the papers.
        bos: whether each window starts with the BOS token, see `calibration_windows`.
        text_field: name of the field that holds the text of a row.
        split: of a dataset whose name gives no split.

    Raises:
        ValueError: if the source cannot be read, holds instructions, fills no window, or a number
            is out of range.
        FileNotFoundError: if `source` is written like a path and does not exist.
    """
    if max_windows is not None and max_windows < 1:
        raise ValueError(f"max_windows={max_windows} must be at least 1, or null for all windows")
    enough = None if max_windows is None else characters_of(max_windows * seq_len)
    rows = read_documents(source, split=split, text_field=text_field, enough=enough)
    if any(is_instruction_row(row) for row in rows):
        raise ValueError(
            f"text={str(source)!r} holds instructions; perplexity is measured on text: give a "
            f"source with a text field, such as {next(iter(SAMPLES))}"
        )
    text, joined = _one_text([row[text_field] for row in rows], rows[0].joined)
    start = bos_token_id(tokenizer, bos)
    # Without a BOS token for each window the tokenizer adds its own tokens once, as in the papers.
    tokens = tokenizer(text, add_special_tokens=start is None, verbose=False)["input_ids"]
    windows = pack_windows(tokens, seq_len, bos_token_id=start)
    tail = tokens[len(windows) * (seq_len - (start is not None)) :]
    if keep_tail and len(tail) > (start is None):  # a window needs a token that is predicted
        last, tail = [*([] if start is None else [start]), *tail], []
    else:
        last = []
    if len(windows) == 0 and not last:
        raise ValueError(
            f"text={str(source)!r} has {len(tokens)} tokens, which fill no window of "
            f"seq_len={seq_len}; give more text or a smaller seq_len, or set keep_tail"
        )
    ids, labels = _with_last(windows, last, seq_len)
    taken = ids[:max_windows]
    whole = labels is None or len(taken) < len(ids)
    name = str(source) if str(source) in SAMPLES or not Path(source).exists() else Path(source).name
    counted = f"all {len(ids)}" if len(taken) == len(ids) else f"{len(taken)} of {len(ids)}"
    first = ", each behind a BOS token" if start is not None else ""
    if start is None and (added := tokenizer.num_special_tokens_to_add()):
        first = f", {added} special token{'s' if added > 1 else ''} added to the whole text"
    if not whole:
        first += f", the last one of {len(last)}"
    left_out = f"; {len(tail)} tokens that fill no window are left out" if tail else ""
    protocol = (
        f"{joined}; {counted} windows of {seq_len} tokens that do not overlap{first}; every token "
        f"of a window but the first is predicted{left_out}"
    )
    return TextWindows(name, protocol, taken, None if whole else labels)


def _with_last(windows: Tensor, last: list[int], seq_len: int) -> tuple[Tensor, Tensor | None]:
    """Return windows and a shorter last one, padded, with labels that leave out the padding.

    What stands behind the tokens of a window changes nothing that a causal model says of them.
    """
    if not last:
        return windows, None
    row = torch.tensor(last)
    padding = (0, seq_len - len(last))
    ids = torch.cat([windows.view(-1, seq_len), pad(row, padding)[None]])
    labels = torch.cat([windows.view(-1, seq_len), pad(row, padding, value=IGNORED_LABEL)[None]])
    return ids, labels


def _one_text(texts: Sequence[str], told: str) -> tuple[str, str]:
    """Return rows as one text, and how they were joined; `told` is what a corpus says of itself."""
    if told and len(texts) > 1:
        return _BLANK_LINE.join(texts), f"{told}, and these joined by a blank line"
    if told:
        return texts[0], told
    if len(texts) > 1:
        return _BLANK_LINE.join(texts), f"{len(texts)} documents joined by a blank line"
    (text,) = texts
    if not _is_wikitext(text):
        return text, "one text as it stands"
    return _BLANK_LINE.join(wikitext_rows(text)), "WikiText's rows joined by a blank line"


def _is_wikitext(text: str) -> bool:
    """Return whether a text is of WikiText's raw form: headings in " = ", blanks of one space."""
    head = text[:20_000]
    return _HEADING.search(head) is not None and "\n \n" in head


def check_text_length(seq_len: int, longest: int | None) -> None:
    """Check that a model can read windows of a length.

    Raises:
        ValueError: if they are longer than its context.
    """
    if longest is not None and seq_len > longest:
        raise ValueError(f"seq_len={seq_len} must be at most {longest}, the model's context")
