"""Do the harms of pruning and of fewer bits add up? A row for each method, kind of bits and order.

Harm is the rise of the mean ln perplexity over the dense model, in nats per token. What both
together harm beyond the sum of the two harms is the interaction; its interval is a paired bootstrap
over the windows, all four models in one draw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from prunelight.comparison.grid import DENSE, Cell
from prunelight.comparison.running.quantized import PRUNE_FIRST
from prunelight.comparison.statistics import combined
from prunelight.evaluation.orthogonality import LIMIT

Result = dict[str, Any]
TITLE = "Do the harms of pruning and of fewer bits add up?"
HEAD = [
    *("method", "amount", "recovered", "bits", "order"),
    *("pruned", "quantized", "both", "beyond the sum", "of the sum", ""),
]
HOW_TO_READ = (
    "Harm of pruning, of fewer bits, and of both, as rises of ln perplexity (mean over the texts) "
    "over the dense model in nats. Beyond the sum: what both harm more than the two harms "
    "together, with its paired 95 % interval over windows. They add up where that interval holds "
    f"0; nearly, where it is at most {LIMIT:.0%} of the sum. Quantize first: scored and pruned "
    "with packed weights."
)


@dataclass(frozen=True)
class Additivity:
    """How two harms combine.

    Attributes:
        label: of the method.
        group: what `asked` is a share of: "parameters" or "zeros".
        asked: amount; None where the method's own arguments say it.
        recovered: the pruned model was trained before it was quantized.
        kind: of quantization.
        order: "prune first" or "quantize first".
        failed: why it is not defined, in one line; "" where it is.
        pruning: rise of ln perplexity in nats.
        quantization: rise of the dense model's.
        both: rise with both.
        beyond: of the sum, with its interval.
    """

    label: str
    group: str
    asked: float | None
    recovered: bool
    kind: str
    order: str
    failed: str = ""
    pruning: float = 0.0
    quantization: float = 0.0
    both: float = 0.0
    beyond: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @property
    def share(self) -> float:
        """The interaction as a share of the sum of harms; NaN where the sum is not positive."""
        total = self.pruning + self.quantization
        return self.beyond[0] / total if total > 0 else math.nan

    @property
    def verdict(self) -> str:
        """What the interval says."""
        value, low, high = self.beyond
        if low <= 0 <= high:
            return "add up"
        if abs(self.share) <= LIMIT:
            return "nearly add up"
        return "harm more together" if value > 0 else "harm less together"


def additivity(cells: Sequence[tuple[Cell, Result | None]]) -> list[Additivity]:
    """Return a row for each pruned model, kind of bits and order; none without quantizations."""
    grouped: dict[Any, list[Result]] = {}
    for cell, result in cells:
        if result is not None and not result["failed"] and "quantized" in result:
            key = (cell.label, cell.group, cell.asked, cell.recovered)
            grouped.setdefault(key, []).append(result)
    dense = grouped.pop((DENSE, "parameters", None, False), [])
    if not dense:
        return []
    return [
        _row(key, kind, order, dense, results)
        for key, results in grouped.items()
        for kind, orders in results[0]["quantized"].items()
        for order in orders
    ]


def _row(
    key: tuple[str, str, float | None, bool],
    kind: str,
    order: str,
    dense: Sequence[Result],
    results: Sequence[Result],
) -> Additivity:
    alone = [result["quantized"][kind][PRUNE_FIRST] for result in dense]
    together = [result["quantized"][kind][order] for result in results]
    failed = next((each["failed"] for each in (*alone, *together) if each["failed"]), "")
    if failed:
        return Additivity(*key, kind, order, failed)
    counts = [text["window_tokens"] for text in dense[0]["texts"]]
    models = [_window_means(each) for each in (dense, results, alone, together)]

    def rise(*weights: float) -> tuple[float, float, float]:
        return combined(models, counts, weights)

    return Additivity(
        *key,
        kind,
        order,
        pruning=rise(-1, 1, 0, 0)[0],
        quantization=rise(-1, 0, 1, 0)[0],
        both=rise(-1, 0, 0, 1)[0],
        beyond=rise(1, -1, -1, 1),
    )


def _window_means(results: Sequence[Result]) -> list[list[float]]:
    """Return [text][window]: negative log-likelihood, the mean over the seeds."""
    return [
        [
            fmean(seeds)
            for seeds in zip(*(r["texts"][text]["window_nll"] for r in results), strict=True)
        ]
        for text in range(len(results[0]["texts"]))
    ]


def table_of(rows: Sequence[Additivity]) -> list[list[str]]:
    """Return the cells of text of rows, under `HEAD`."""
    lines = []
    for row in rows:
        amount = (
            "its own"
            if row.asked is None
            else f"{row.asked:.3g} {'zeros' if row.group == 'zeros' else 'removed'}"
        )
        line = [row.label, amount, "yes" if row.recovered else "", row.kind, row.order]
        if row.failed:
            lines.append([*line, *[""] * 5, f"not defined: {row.failed}"])
            continue
        harms = [f"{x:+.4f}" for x in (row.pruning, row.quantization, row.both)]
        value, low, high = row.beyond
        share = "" if math.isnan(row.share) else f"{row.share:+.1%}"
        interval = f"{value:+.4f} [{low:+.4f}, {high:+.4f}]"
        lines.append([*line, *harms, interval, share, row.verdict])
    return lines


def sentence(rows: Sequence[Additivity]) -> str:
    """Return what the rows say together; "" without any."""
    defined = [row for row in rows if not row.failed]
    if not defined:
        return ""
    adding = [row for row in defined if row.verdict in ("add up", "nearly add up")]
    others = [
        f"{row.label} in {row.kind}{', recovered' if row.recovered else ''} ({row.share:+.0%})"
        for row in defined
        if row not in adding and row.order == PRUNE_FIRST
    ]
    told = f"Pruning and fewer bits add up, or nearly, in {len(adding)} of {len(defined)} pairs"
    return f"{told}; not in {', '.join(others)}." if others else f"{told}."
