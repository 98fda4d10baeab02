"""TokenBudget: end a training after a number of tokens, for any batch size and process count.

Papers state continued pre-training of pruned models in tokens (Sheared LLaMA, arXiv:2310.06694;
Shortened LLaMA, arXiv:2402.02834). The tokens become optimizer steps before the learning-rate
schedule is made.
"""

from __future__ import annotations

import logging
import math

from lightning.pytorch import Callback, LightningModule, Trainer

from prunelight.callbacks.base import PruningCallback
from prunelight.training.changed_settings import ChangedSettings
from prunelight.training.recovery_watch import training_text

log = logging.getLogger(__name__)

_DEFAULT_EPOCHS = 1000  # Lightning's max_epochs where neither steps nor epochs are given


class TokenBudget(Callback):
    """Set the Trainer's max_steps so that at least this many tokens are trained on.

    Args:
        tokens: number of tokens to train on over all processes, without padding. The training text
            is read again from its start once it ends.

    Raises:
        ValueError: if `tokens` is below 1.
    """

    def __init__(self, tokens: int) -> None:
        if tokens < 1:
            raise ValueError(f"tokens={tokens} must be at least 1")
        self.tokens = tokens
        self._changed = ChangedSettings()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Turn tokens into steps; Lightning calls this hook.

        Raises:
            ValueError: if max_steps or max_epochs of the Trainer end the training elsewhere, the
                number of training tokens is not known, or a pruning callback comes first.
        """
        if stage != "fit":
            return
        text = training_text(trainer)
        if text is None:
            raise ValueError(
                f"tokens={self.tokens} needs a prunelight TextDataModule, whose tokens are known"
            )
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        earlier = callbacks[: callbacks.index(self)]
        if any(isinstance(callback, PruningCallback) for callback in earlier):
            raise ValueError(
                "TokenBudget must come before the pruning callbacks in trainer.callbacks: their "
                "schedules ask how many steps there are"
            )
        steps = text.steps_for(self.tokens)
        self._check(trainer, steps, text.epochs(steps))
        self._changed.change(trainer.fit_loop.epoch_loop, "max_steps", steps)
        if trainer.max_epochs == _DEFAULT_EPOCHS:
            self._changed.change(trainer.fit_loop, "max_epochs", -1)
        log.info(
            "token budget %.2fM -> %d steps of %.0f tokens, %.2f epochs of %.2fM training tokens",
            self.tokens / 1e6,
            steps,
            text.tokens_per_step,
            text.epochs(steps),
            text.tokens / 1e6,
        )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the Trainer its steps and epochs back."""
        self._changed.undo()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give them back after an error, too."""
        self._changed.undo()

    def _check(self, trainer: Trainer, steps: int, epochs: float) -> None:
        if trainer.max_steps not in (-1, steps):
            raise ValueError(
                f"trainer.max_steps={trainer.max_steps} contradicts tokens={self.tokens}, which "
                f"are {steps} steps; leave one of the two out"
            )
        limit = trainer.max_epochs
        if limit not in (None, -1, _DEFAULT_EPOCHS) and limit < math.ceil(epochs):
            raise ValueError(
                f"trainer.max_epochs={limit} ends before tokens={self.tokens}, which are "
                f"{epochs:.2f} epochs of the training text; leave max_epochs out"
            )
