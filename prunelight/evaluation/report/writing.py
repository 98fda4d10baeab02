"""Pieces of Markdown, and files that are written whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from prunelight.evaluation.report.plan_facts import Json
from prunelight.runtime.atomic_files import atomic_replacement

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown: the first column is text, the others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_whole(path: Path, content: str | Figure) -> None:
    """Write a text or a picture, whole or not at all."""
    with atomic_replacement(path) as temporary:
        if isinstance(content, str):
            temporary.write_text(content, encoding="utf-8")
        else:
            content.savefig(temporary, format="png")


def bullets(values: Json) -> str:
    """Return named values as a list in Markdown."""
    return "\n".join(f"- {name.replace('_', ' ')}: {value}" for name, value in values.items())
