"""comparison.json and comparison.md as texts, and the check of what they would replace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prunelight.comparison.papers.beside import beside_published, note_on_published
from prunelight.comparison.running.measuring import LATENCY
from prunelight.comparison.telling.additivity import HEAD, TITLE, table_of
from prunelight.comparison.telling.additivity import HOW_TO_READ as HARMS
from prunelight.comparison.telling.claim import HEAD as HEAD_OF_CLAIM
from prunelight.comparison.telling.claim import LEAD as LEAD_OF_CLAIM
from prunelight.comparison.telling.claim import TITLE as TITLE_OF_CLAIM
from prunelight.comparison.telling.claim import judged
from prunelight.comparison.telling.claim import table_of as table_of_claim
from prunelight.comparison.telling.summary import Summary
from prunelight.comparison.telling.table import head, lines
from prunelight.evaluation.report.writing import markdown_table
from prunelight.runtime.origin import without_paths

_TITLE = "# Comparison of pruning methods: "

HOW_TO_READ = (
    "Perplexity is of held-out text, lower is better; KL is how far the next-token distributions "
    "are from those of the dense model, in nats; same top-1 is the share of tokens whose most "
    "likely next token stayed. In brackets: 95 % bootstrap intervals over windows.",
    "Flips: -a questions went from right to wrong, +b from wrong to right. Time: scoring and "
    "pruning, in F, one forward of the calibration windows through the dense model.",
    "best and tie: methods of one part are compared on the same windows and the same questions "
    "(paired bootstrap). Those whose difference from the best may be 0 tie with it.",
)
LATENCY_NOTE = (
    f"Latency: time of a generation of {LATENCY.num_tokens} tokens at batch 1 on this machine, as "
    f"a factor of that with the dense model; median and spread of {LATENCY.num_runs} in turn."
)


def check_outputs(out: Path) -> None:
    """Check that a comparison replaces no file of others.

    Raises:
        FileExistsError: if there is a file of a name that it writes, of another origin.
    """
    starts = {"comparison.md": _TITLE, "comparison.json": "{", "report.html": "<!DOCTYPE html>"}
    for name, start in starts.items():
        file = out / name
        if file.exists() and not (
            file.is_file() and file.read_text(encoding="utf-8", errors="replace").startswith(start)
        ):
            raise FileExistsError(
                f"{file} exists and is none of a comparison; set another out, or move it"
            )


def json_of(summary: Summary) -> dict[str, Any]:
    """Return summary and table as JSON values, without folders of this machine.

    Plans, with the scores of all layers, stand in the results of the cells.
    """
    columns, rows = table_with_titles(summary)
    values = {**summary.to_dict(), "table": {"columns": columns, "rows": rows}}
    for row in values["rows"]:
        del row["plan"]
    told: dict[str, Any] = _without_paths(json.loads(json.dumps(values)))
    return told


def table_with_titles(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Return the columns of the table with all intervals, and its rows; a title opens a part."""
    columns = head(summary)
    rows = []
    for title, part in lines(summary):
        if title:
            rows.append([f"*{title}*", *[""] * (len(columns) - 1)])
        rows += part
    return columns, rows


def _without_paths(value: Any) -> Any:
    """Return JSON values in which paths are their last parts."""
    if isinstance(value, dict):
        return {name: _without_paths(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_paths(inner) for inner in value]
    return without_paths(value) if isinstance(value, str) else value


def markdown(summary: Summary, told: list[str]) -> str:
    """Return comparison.md."""
    settings, facts = summary.settings, summary.facts
    parts = [f"{_TITLE}{facts['model']['name']}", *told]
    columns, rows = table_with_titles(summary)
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    parts += [markdown_table(columns, rows), *HOW_TO_READ]
    if settings.equal == "latency":
        parts.append(LATENCY_NOTE)
    if summary.additivity:
        parts += [f"## {TITLE}", markdown_table(HEAD, table_of(summary.additivity)), HARMS]
    if found := judged(summary):
        parts += [f"## {TITLE_OF_CLAIM}", LEAD_OF_CLAIM]
        parts.append(markdown_table(HEAD_OF_CLAIM, table_of_claim(found)))
    for one in beside_published(summary):
        parts += [f"## {one.title}", markdown_table(one.columns, one.rows)]
    if summary.settings.published:
        parts.append(note_on_published(summary))
    parts.append(_facts(summary))
    if settings.tasks and settings.limit:
        parts.append(f"Tasks: the first {settings.limit} questions of each.")
    return "\n\n".join(parts) + "\n"


def _facts(summary: Summary) -> str:
    settings, facts = summary.settings, summary.facts
    data = settings.data
    f = "" if summary.forward_seconds is None else f" F = {summary.forward_seconds:.2f} s."
    return (
        f"Model {facts['model']['name']} ({facts['model']['parameters'] / 1e6:.1f}M parameters, "
        f"{facts['model']['dtype']}, fingerprint {facts['model']['fingerprint']}). "
        f"Texts: {summary.texts}, "
        f"{data.held_out} each. Calibration: "
        f"{summary.calibration}. Seeds {settings.seeds}. Device: "
        f"{summary.device}.{f} {summary.date}. Command: {summary.command or 'from Python'}"
    )
