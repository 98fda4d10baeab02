"""Whether a recovery is likely to overfit, and whether it did.

GPT-style models store about 3.6 bits per parameter (Morris et al., arXiv:2505.24832), and a token
of text holds about as many. So a model with more parameters than training tokens can learn its text
by heart. `overfit_risk` warns of full training that reads so little text more than once. It also
warns of text read more than four times: up to there repetition helps about as much as new text
(Muennighoff et al., arXiv:2305.16264). `overfitting` judges by the validations of a training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

METRIC = "val/perplexity"

_MAX_EPOCHS = 4.0  # arXiv:2305.16264

_RISES = 3  # so many rises of perplexity in a row are more than a passing bump


@dataclass(frozen=True)
class TrainingText:
    """Size of a training text.

    Attributes:
        tokens: tokens of an epoch.
        tokens_per_step: tokens of a full optimizer step, for examples of the mean length.
        steps: optimizer steps of an epoch; the last step may be smaller.
    """

    tokens: int
    tokens_per_step: float
    steps: int

    @classmethod
    def of(cls, data: Any, batches_per_step: int) -> TrainingText | None:
        """Return the size of a data module's training text; None if it is no TextDataModule.

        Args:
            data: data module of the Trainer.
            batches_per_step: batches of an optimizer step, over all processes.
        """
        if not hasattr(data, "examples"):
            return None
        examples = data.examples("train")
        tokens = sum(len(example[0]) for example in examples)
        rows = data.batch_size * batches_per_step
        steps = math.ceil(len(examples) / rows)
        return cls(tokens, tokens * rows / len(examples), steps)

    def epochs(self, steps: float) -> float:
        """Return how often the text is read in `steps` optimizer steps."""
        return steps / self.steps

    def steps_for(self, tokens: int) -> int:
        """Return the smallest number of optimizer steps that trains on at least `tokens` tokens."""
        epochs, rest = divmod(tokens, self.tokens)
        return epochs * self.steps + min(math.ceil(rest / self.tokens_per_step), self.steps)


def overfit_risk(recovery: str, text: TrainingText, steps: float, parameters: int) -> str | None:
    """Return why a training is likely to overfit, as a warning; None if nothing suggests it.

    Args:
        recovery: "lora" or "full"; adapters store too little for a comparison with the tokens.
        text: size of the training text.
        steps: planned number of optimizer steps.
        parameters: number of trained parameters.
    """
    epochs, tokens = text.epochs(steps), text.tokens
    if recovery == "full" and epochs > 1 and tokens < parameters:
        return (
            f"{tokens / 1e6:.2f}M training tokens, read {epochs:.1f} times, train "
            f"{parameters / 1e6:.1f}M parameters, which can learn them by heart; give more text, "
            "stop early, or use recovery=lora"
        )
    if epochs > _MAX_EPOCHS:
        return (
            f"{tokens / 1e6:.2f}M training tokens are read {epochs:.1f} times; more than "
            f"{_MAX_EPOCHS:.0f} times help little and overfit: give more text or stop early"
        )
    return None


@dataclass(frozen=True)
class ValidationPoint:
    """One validation: the optimizer step, its perplexity, and the mean training loss before it."""

    step: int
    perplexity: float
    training_loss: float


def overfitting(history: list[ValidationPoint]) -> str | None:
    """Return a warning if validation became worse while training improved; else None.

    Validation became worse if perplexity rose in each of the last three validations. Training
    improved if its loss fell over the same validations.
    """
    last = history[-_RISES - 1 :]
    rises = len(last) > _RISES and all(a.perplexity < b.perplexity for a, b in pairwise(last))
    if not rises or last[-1].training_loss >= last[0].training_loss:
        return None
    return (
        f"the model overfits: {METRIC} rose from {last[0].perplexity:.4g} at step {last[0].step} "
        f"to {last[-1].perplexity:.4g} at step {last[-1].step} while the training loss fell from "
        f"{last[0].training_loss:.4g} to {last[-1].training_loss:.4g}; give more text, or stop "
        "early and keep the best weights (EarlyStopping, ModelCheckpoint)"
    )
