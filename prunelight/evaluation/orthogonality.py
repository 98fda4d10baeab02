"""Whether pruning and quantization are orthogonal: do their harms to a model add up?

Harm is the rise of log-perplexity over the dense model, in nats per token. If the harm of both
together is the sum of the two harms, each can be chosen without regard to the other. The difference
from the sum is their interaction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

ROWS = ("dense", "pruned", "quantized", "pruned + quantized")

LIMIT = 0.1  # up to this share of the sum of harms we call the two orthogonal


@dataclass(frozen=True)
class Cell:
    """One state of the model: its quality on the held-out windows, and the bytes of its weights."""

    perplexity: float
    accuracy: float
    size_bytes: int


@dataclass(frozen=True)
class Interaction:
    """Rises of log-perplexity over the dense model, in nats per token.

    Attributes:
        pruning: rise of the pruned model.
        quantization: rise of the quantized model.
        both: rise of the model that is pruned and quantized.
    """

    pruning: float
    quantization: float
    both: float

    @classmethod
    def of(cls, cells: Mapping[str, Cell]) -> Interaction:
        """Return the interaction that the cells of the four `ROWS` show."""
        dense, *compressed = (math.log(cells[row].perplexity) for row in ROWS)
        return cls(*(value - dense for value in compressed))

    @property
    def beyond_sum(self) -> float:
        """Return how much the harm of both exceeds the sum of the harms, in nats."""
        return self.both - self.pruning - self.quantization

    @property
    def share(self) -> float:
        """Return `beyond_sum` divided by the sum of harms; NaN where the sum is not positive."""
        total = self.pruning + self.quantization
        return self.beyond_sum / total if total > 0 else math.nan

    def sentence(self) -> str:
        """Return the interaction as a sentence of a report."""
        effects = (
            f"pruning raises log-perplexity by {self.pruning:.4f} nats, quantization by "
            f"{self.quantization:.4f}, both by {self.both:.4f}: {self.beyond_sum:+.4f} beyond the "
            f"sum (quantization costs {self.both - self.pruning:.4f} on the pruned model)"
        )
        if math.isnan(self.share):
            return (
                f"{effects}. Nothing was harmed in total, so that orthogonality means nothing here."
            )
        verdict = "are orthogonal here" if abs(self.share) <= LIMIT else "are not orthogonal here"
        return (
            f"{effects}. The interaction is {100 * self.share:+.1f} % of the sum: they {verdict}."
        )


def orthogonality_section(before: Mapping[str, Cell], after: Mapping[str, Cell]) -> str:
    """Return a Markdown table of the cells and the two interactions that it shows.

    Args:
        before: row of `ROWS` -> cell without recovery.
        after: row of `ROWS` -> cell after recovery. Quantized models stay in 4 or 8 bits, with
            unmerged adapters.
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
