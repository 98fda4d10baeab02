"""Pieces of Markdown, and files that are written whole or not at all."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from prunelight.evaluation.report.plan_facts import Json
from prunelight.runtime.files.atomic_files import atomic_replacement

# Names of pictures that reports and analyses write.
PICTURES = (
    *("layers.png", "layers-[0-9].png", "cka.png", "cka-[0-9].png"),
    *("analysis-layers.png", "analysis-cka.png", "analysis-angular_distance.png"),
)

_MARK = b"prunelight"  # in the facts of a picture that was written here

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown: the first column is text, the others are numbers."""
    # A bar ends a cell, unless it is escaped, by the caller or here.
    cells = [[re.sub(r"(?<!\\)\|", r"\\|", " ".join(cell.split())) for cell in row] for row in rows]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def code_span(text: str) -> str:
    """Return any text as code within a line of Markdown, on one line and cut at 300 letters."""
    shown = " ".join(text.split())
    shown = shown if len(shown) <= 300 else f"{shown[:300]} ..."
    longest = max((len(run) for run in re.findall("`+", shown)), default=0)
    ticks = "`" * (longest + 1)
    return f"{ticks} {shown} {ticks}" if longest else f"{ticks}{shown}{ticks}"


def write_whole(path: Path, content: str | Figure) -> None:
    """Write a text or a picture, whole or not at all."""
    with atomic_replacement(path) as temporary:
        if isinstance(content, str):
            temporary.write_text(content, encoding="utf-8")
        else:
            content.savefig(temporary, format="png", metadata={"Software": _MARK.decode()})


def check_report_files(directory: Path) -> None:
    """Check that a report or an analysis replaces no file of others.

    A picture of ours says so in its facts. A file of ours begins as ours do. Those of older
    versions have a report beside them that names them.

    Raises:
        FileExistsError: if there is a file of the name that prunelight did not write.
    """
    starts = {"report.md": "# Pruning report: ", "analysis.md": "# Analysis: "}
    texts = {name: _text(directory / name) for name in starts}
    for name, start in starts.items():
        if texts[name] is not None and not str(texts[name]).startswith(start):
            _refuse(directory / name)
    page = _text(directory / "report.html")
    if page is not None and '<meta name="generator" content="prunelight">' not in page[:2000]:
        _refuse(directory / "report.html")
    for name in ("report.json", "analysis.json"):
        text = _text(directory / name)
        if text is not None and '"model"' not in text:
            _refuse(directory / name)
    for pattern in PICTURES:
        for file in directory.glob(pattern):
            named = any(f"]({file.name})" in str(text) for text in texts.values())
            if not named and (not file.is_file() or _MARK not in file.read_bytes()[:4096]):
                _refuse(file)


def _text(file: Path) -> str | None:
    """Return the text of a file; None if there is none, "" if it is no text."""
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return ""


def _refuse(file: Path) -> None:
    raise FileExistsError(
        f"{file} exists and was not written by prunelight, whose report has a file of that name; "
        "set trainer.default_root_dir to a directory of its own"
    )


def bullets(values: Json) -> str:
    """Return named values as a list in Markdown."""
    return "\n".join(f"- {name.replace('_', ' ')}: {value}" for name, value in values.items())
