"""What a paper published of a table, from `figures/PAPER.json`, beside what a contest measured.

A file holds the paper's source, and for each table: title, protocol, the columns (a model, with the
names by which it is loaded), and the rows by the labels of the contest. Nothing is there that could
not be read from a primary source.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from prunelight.runtime.arguments import did_you_mean


@dataclass(frozen=True)
class PublishedTable:
    """Figures of a paper.

    Attributes:
        title: what was measured.
        protocol: how.
        source: where it was published.
        measure: "perplexity" of `text`, or "accuracy", the mean over `tasks` in percent.
        text: name of the text of a perplexity; "" for an accuracy.
        amount: share that was removed; None for several, which stand in the labels of rows.
        models: column -> names by which that model is loaded.
        rows: label of a method -> its figures by column; None where there is none.
    """

    title: str
    protocol: str
    source: str
    measure: str
    text: str
    amount: float | None
    models: dict[str, list[str]]
    rows: dict[str, list[float | str | None]]

    def column_of(self, model: str) -> str | None:
        """Return the column of a model by the name that it is loaded by; None if it has none."""
        own = model.rstrip("/").lower()
        for column, names in self.models.items():
            if any(own == name.lower() or own.endswith(f"/{name.lower()}") for name in names):
                return column
        return None


def published_tables(name: str) -> list[PublishedTable]:
    """Return what was published of a table "PAPER.TABLE"; nothing where no figures are at hand.

    Raises:
        ValueError: if there is no such paper or table; names those that there are.
    """
    paper, _, table = name.partition(".")
    file = files("prunelight.comparison.papers") / "figures" / f"{paper}.json"
    if not file.is_file():
        raise ValueError(
            f"published={name!r} must be PAPER.TABLE of a paper whose figures are here, such as "
            "dlp.perplexity"
        )
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    known = [f"{paper}.{each}" for each in content["tables"]]
    if name not in known:
        raise ValueError(
            f"published={name!r} must be one of {', '.join(known)}{did_you_mean(name, known)}"
        )
    tables = content["tables"][table]
    if isinstance(tables, str):  # the same figures as those of another table
        tables = content["tables"][tables]
    return [PublishedTable(**values) for values in tables]


def notes_of(name: str) -> str:
    """Return what is to be said of a paper's figures, such as what is not at hand."""
    paper = name.partition(".")[0]
    file = files("prunelight.comparison.papers") / "figures" / f"{paper}.json"
    note: str = json.loads(file.read_text(encoding="utf-8"))["note"]
    return note
