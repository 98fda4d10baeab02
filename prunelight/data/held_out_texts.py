"""Several held-out texts by name: what their names may be, and how their windows are told."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TypeAlias

# One source or several that are read as one text, or texts by name.
Sources: TypeAlias = "str | list[str] | dict[str, str | list[str]]"

ROLE = "validation"  # of the first text
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def role_of(name: str) -> str:
    """Return the role of the examples of a text behind the first."""
    return f"{ROLE}/{name}"


def check_texts(texts: Mapping[str, str | list[str]]) -> None:
    """Check the names and sources of held-out texts.

    Raises:
        ValueError: if a name cannot stand in the name of a metric, two names differ
            by capitals only, or a source is empty.
    """
    for name, source in texts.items():
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"validation: the name {name!r} must be of letters, digits, _, - and dots, as it "
                f"stands in the metric val/perplexity/NAME; write {_mended(name)}: ..."
            )
        if not source or not all([source] if isinstance(source, str) else source):
            raise ValueError(f"validation.{name}={source!r} must not be empty; give a source")
    by_lower: dict[str, str] = {}
    for name in texts:
        other = by_lower.setdefault(name.lower(), name)
        if other != name:
            raise ValueError(
                f"validation names a text twice, as {other!r} and as {name!r}; give each a name "
                "of its own"
            )


def _mended(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip("_.-") or "text"


def told_protocol(joined: str, lengths: Sequence[int], seq_len: int, starts_with_bos: bool) -> str:
    """Return how the windows of a text were made, in words.

    Args:
        joined: how its rows became a text; "" for text as it stands.
        lengths: tokens of each window or instruction example.
        seq_len: tokens of a window, and the most of an example.
        starts_with_bos: whether a window starts with the BOS token.
    """
    whole = all(length == seq_len for length in lengths)
    of = f"windows of {seq_len} tokens" if whole else f"examples of up to {seq_len} tokens"
    start = ", each behind a BOS token" if starts_with_bos else ""
    return f"{joined or 'text as it stands'}; {len(lengths)} {of} that do not overlap{start}"
