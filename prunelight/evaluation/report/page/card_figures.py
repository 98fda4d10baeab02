"""What a run measured, as Markdown for the card of the saved model."""

from __future__ import annotations

from prunelight.evaluation.report.examined import probe_grid, task_grid
from prunelight.evaluation.report.figures import stage_rows
from prunelight.evaluation.report.page.verdict import verdict_of
from prunelight.evaluation.report.record import RunRecord
from prunelight.evaluation.report.writing import markdown_table


def card_figures(record: RunRecord) -> str:
    """Return the verdict on a run and its figures, with a word on the data."""
    stages = record.stages
    told = record.evaluation
    parts = [
        "## What was measured",
        " ".join(verdict_of(record)),
        markdown_table(["", *(stage.name for stage in stages)], stage_rows(record)),
    ]
    if "source" in told:
        windows = f"{told.get('num_samples', '?')} windows of {told.get('seq_len', '?')} tokens"
        parts.append(
            f"Perplexity and next-token accuracy: {windows} of `{told['source']}`, held out. "
            f"Speeds: {record.device}, {record.dtype}."
        )
    for title, grid in (("Tasks", task_grid(stages)), ("Collapse probes", probe_grid(stages))):
        if grid is not None:
            parts += [f"### {title}", markdown_table(grid.head, grid.rows)]
    if trained := record.recovery.get("tokens_seen"):
        data = ", ".join(f"`{x}`" for role, x in record.data.items() if role == "train")
        parts.append(f"Recovered on {trained:,} tokens{f' of {data}' if data else ''}.")
    return "\n\n".join(parts)
