"""Whether a recovery is likely to overfit, and whether it did.

A model that has room for its whole training text learns it by heart: GPT-style models hold about
3.6 bits a parameter (Morris et al., arXiv:2505.24832), text has about as many a token. So full
training on fewer tokens than parameters, more than once, is warned of before it starts; and so is
any text read more than four times, from where repeating it no longer helps like new text
(Muennighoff et al., arXiv:2305.16264). Afterwards validation tells.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

METRIC = "val/perplexity"

_MAX_EPOCHS = 4.0  # arXiv:2305.16264

_RISES = 3  # evaluations in a row that a passing bump does not give


@dataclass(frozen=True)
class TrainingText:
    """The text of a training: its tokens, those of a full optimizer step, and steps of an epoch."""

    tokens: int
    tokens_per_step: float  # of examples of the mean length
    steps: int  # the last of them may be small

    @classmethod
    def of(cls, data: Any, batches_per_step: int) -> TrainingText | None:
        """Return that of a data module; None if it is no TextDataModule.

        Args:
            data: of the Trainer.
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
        """Return how often the text is read in that many optimizer steps."""
        return steps / self.steps

    def steps_for(self, tokens: int) -> int:
        """Return the fewest optimizer steps that train on so many tokens."""
        epochs, rest = divmod(tokens, self.tokens)
        return epochs * self.steps + min(math.ceil(rest / self.tokens_per_step), self.steps)


def overfit_risk(recovery: str, text: TrainingText, steps: float, parameters: int) -> str | None:
    """Return why a training is likely to overfit, None if nothing speaks for it.

    Args:
        recovery: lora or full; adapters hold too little to be told by their number.
        text: that is trained on.
        steps: optimizer steps that are planned.
        parameters: that are trained.
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
    """Return that validation became worse while training improved; None if it did not.

    It did if the last three validations each were worse than the one before, and the training loss
    ended below that before the best of them.
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
