"""The frame of a page that decisions are made from: one HTML file, without network or script.

A page is a title, a verdict in plain words, warnings, and sections of pieces: tables, charts (see
`charts.py`), facts, text. Every text is escaped: names of models, prompts and generated texts come
from others. This module needs neither torch nor lightning.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

_FOLDER = files("prunelight.evaluation.report.page")
_MOST_LETTERS = 4000  # of one text from others


@dataclass(frozen=True)
class Section:
    """A section of a page.

    Attributes:
        title: of the section, and its entry in the contents.
        parts: pieces of HTML, such as `table` returns. A str is escaped and is a paragraph.
        lead: a sentence that says how to read the section.
    """

    title: str
    parts: Sequence[Markup | str]
    lead: str = ""


def render_page(
    title: str,
    verdict: str | Sequence[str],
    sections: Sequence[Section],
    *,
    kicker: str = "prunelight",
    warnings: Sequence[str] = (),
    footer: str = "Drawn by prunelight. This page needs no network.",
) -> str:
    """Return a whole page as the text of one HTML file.

    Args:
        title: of the page.
        verdict: what to conclude: the first sentence stands out, others follow.
        sections: in their order; those without parts are left out.
        kicker: a line above the title: what kind of page this is.
        warnings: shown on top.
        footer: the last line.
    """
    text = (
        _environment()
        .get_template("page.html")
        .render(
            title=title,
            verdict=[verdict] if isinstance(verdict, str) else list(verdict),
            sections=_placed([section for section in sections if section.parts]),
            kicker=kicker,
            warnings=list(warnings),
            footer=footer,
            style=Markup((_FOLDER / "page.css").read_text(encoding="utf-8")),
        )
    )
    return _with_own_ids(printable(text))


def _placed(sections: Sequence[Section]) -> list[dict[str, Any]]:
    """Return sections as the template reads them, each with a name of its own within the page."""
    taken: Counter[str] = Counter()
    placed = []
    for section in sections:
        anchor = re.sub(r"[^a-z0-9]+", "-", section.title.lower()).strip("-") or "section"
        taken[anchor] += 1
        anchor += f"-{taken[anchor]}" if taken[anchor] > 1 else ""
        parts = [_piece(part) for part in section.parts]
        told = {"title": section.title, "lead": section.lead}
        placed.append({"anchor": anchor, "parts": parts, **told})
    return placed


def _with_own_ids(page: str) -> str:
    """Return a page on which two equal charts, or sections of equal names, share no id."""
    seen: Counter[str] = Counter()

    def renamed(match: re.Match[str]) -> str:
        body, prefix = match[0], re.search(r'id="(c[0-9a-f]{8}-)', match[0])
        if prefix is None:
            return body
        seen[prefix[1]] += 1
        number = seen[prefix[1]]
        return body if number == 1 else body.replace(prefix[1], f"{prefix[1]}{number}-")

    return re.sub(r"<svg .*?</svg>", renamed, page, flags=re.DOTALL)


def printable(text: str) -> str:
    """Return a text without what no page may hold: control characters, and halves of characters."""
    text = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "\N{REPLACEMENT CHARACTER}", text)
    return text.encode("utf-8", errors="replace").decode("utf-8")


def table(
    head: Sequence[Any],
    rows: Sequence[Sequence[Any]],
    *,
    caption: str = "",
    marked: Sequence[int] = (),
    numbers: bool = True,
) -> Markup:
    """Return a table, which scrolls within itself where the page is narrow.

    Args:
        head: names of the columns.
        rows: of cells; the first cell of a row is its name.
        caption: of the table.
        marked: numbers of rows that stand out.
        numbers: all columns but the first hold numbers, and stand to the right.
    """
    return _call("table", [*head], [[*row] for row in rows], caption, {*marked}, numbers)


def figure(svg: Markup, caption: str = "", *, wide: bool = False) -> Markup:
    """Return a chart with its caption; a wide one scrolls within itself on a phone."""
    return _call("figure", svg, caption, wide)


def figures(parts: Sequence[Markup]) -> Markup:
    """Return figures beside each other, below each other where the page is narrow."""
    return _call("figures", parts)


def facts(values: Mapping[str, Any]) -> Markup:
    """Return named values as a list of terms."""
    return _call("facts", values)


def bullets(texts: Sequence[str]) -> Markup:
    """Return texts as a list."""
    return _call("bullets", texts)


def paragraph(text: str, kind: str = "") -> Markup:
    """Return a paragraph; of kind "note" it is small."""
    return _call("paragraph", text, kind)


def heading(text: str) -> Markup:
    """Return a heading within a section."""
    return _call("heading", text)


def code(text: str) -> Markup:
    """Return lines of code."""
    return _call("code", text)


def details(summary: str, *content: Markup) -> Markup:
    """Return what is shown when the reader opens it, and in print."""
    return _call("details", summary, content)


def tiles(values: Sequence[tuple[str, str, str]]) -> Markup:
    """Return the few figures that matter most: name, value, note of each."""
    return _call("tiles", values)


def beside(texts: Sequence[tuple[str, str]]) -> Markup:
    """Return named texts beside each other, with their line breaks; very long ones are cut."""
    return _call("beside", [(name, _cut(text)) for name, text in texts])


def _cut(text: str) -> str:
    rest = len(text) - _MOST_LETTERS
    return text if rest <= 0 else f"{text[:_MOST_LETTERS]} ... ({rest:,} more letters)"


def _piece(part: Markup | str) -> Markup:
    return part if isinstance(part, Markup) else paragraph(part)


def _call(macro: str, *arguments: Any) -> Markup:
    return Markup(getattr(_environment().get_template("pieces.html").module, macro)(*arguments))


@cache
def _environment() -> Environment:
    names = ("page.html", "pieces.html")
    texts = {name: (_FOLDER / name).read_text(encoding="utf-8") for name in names}
    return Environment(loader=DictLoader(texts), autoescape=True, undefined=StrictUndefined)
