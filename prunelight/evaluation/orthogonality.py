"""Whether pruning and quantization are orthogonal: do their harms to a model add up?

Harm is the rise of log-perplexity over the dense model, in nats a token. If it is pruning's plus
quantization's where both are done, the two can be chosen apart; the rest is their interaction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

ROWS = ("dense", "pruned", "quantized", "pruned + quantized")

LIMIT = 0.1  # of the sum: below it we call the two orthogonal


@dataclass(frozen=True)
class Cell:
    """One state of the model: quality on the held-out windows, and bytes of its weights."""

    perplexity: float
    accuracy: float
    size_bytes: int


@dataclass(frozen=True)
class Interaction:
    """Rises of log-perplexity over the dense model, in nats a token.

    Attributes:
        pruning: of the pruned model.
        quantization: of the quantized one.
        both: of the model that is pruned and quantized.
    """

    pruning: float
    quantization: float
    both: float

    @classmethod
    def of(cls, cells: Mapping[str, Cell]) -> Interaction:
        """Return what four cells, by `ROWS`, say."""
        dense, *others = (math.log(cells[row].perplexity) for row in ROWS)
        return cls(*(value - dense for value in others))

    @property
    def beyond_sum(self) -> float:
        """Return how much the harm of both exceeds the sum of the harms, in nats."""
        return self.both - self.pruning - self.quantization

    @property
    def share(self) -> float:
        """Return `beyond_sum` as a share of that sum; NaN where nothing was harmed."""
        total = self.pruning + self.quantization
        return self.beyond_sum / total if total > 0 else math.nan

    def sentence(self) -> str:
        """Return what the numbers say."""
        told = (
            f"pruning raises log-perplexity by {self.pruning:.4f} nats, quantization by "
            f"{self.quantization:.4f}, both by {self.both:.4f}: {self.beyond_sum:+.4f} beyond the "
            f"sum (quantization costs {self.both - self.pruning:.4f} on the pruned model)"
        )
        if math.isnan(self.share):
            return f"{told}. Nothing was harmed in total, so that orthogonality means nothing here."
        verdict = "are orthogonal here" if abs(self.share) <= LIMIT else "are not orthogonal here"
        return f"{told}. The interaction is {100 * self.share:+.1f} % of the sum: they {verdict}."


def orthogonality_section(before: Mapping[str, Cell], after: Mapping[str, Cell]) -> str:
    """Return the table and what it says as Markdown, from cells by `ROWS`.

    Args:
        before: without recovery.
        after: with it; quantized models in their bits, with unmerged adapters.
    """
    head = [
        "",
        *(f"{name}{of}" for of in ("", ", LoRA") for name in ("perplexity", "accuracy", "MB")),
    ]
    lines = [head, ["---", *["---:"] * 6]]
    for row in ROWS:
        cells = (before[row], after[row])
        numbers = [
            (f"{c.perplexity:.4g}", f"{c.accuracy:.4f}", f"{c.size_bytes / 1e6:,.1f}")
            for c in cells
        ]
        lines.append([row, *numbers[0], *numbers[1]])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return (
        f"{table}\n\n- Without recovery, {Interaction.of(before).sentence()}\n- With recovery, "
        f"{Interaction.of(after).sentence()}\n\nAn interaction of at most {100 * LIMIT:.0f} % of "
        "the sum counts as orthogonal. Quantized models are evaluated in their bits, with LoRA "
        "unmerged."
    )
