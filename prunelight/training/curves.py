"""The curves of a training, for its report; a resumed training goes on with them.

They do not depend on the loggers of the run.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from prunelight.recovery.overfitting import METRIC
from prunelight.run.run_state import Run
from prunelight.training.finite_training import loss_of

MOST_POINTS = 400  # of a curve in a report


class TrainingCurves(Callback):
    """Collects train loss, learning rate and validation perplexity by optimizer step.

    A point of the loss is the mean over the steps since the point before, in the first process.
    There is one a step at first; when there are MOST_POINTS, each two become one.

    Args:
        run: whose report gets the curves.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._losses: list[tuple[int, float]] = []
        # Later points, sums of which are still on their device: step, sum, batches.
        self._waiting: list[tuple[int, Tensor | float, int]] = []
        self.rates: list[tuple[int, float]] = []
        self.perplexities: list[tuple[int, float]] = []
        self._sum: Tensor | float = 0.0  # on its device
        self._batches = 0
        self._every = 1  # steps from one point to the next
        self._rate: float | None = None  # of the step that is taken

    @property
    def losses(self) -> list[tuple[int, float]]:
        """Points of the train loss; reads those that are still on the device."""
        self._losses += [(step, float(total) / n) for step, total, n in self._waiting]
        self._waiting = []
        return self._losses

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        """Note the learning rate of the step that follows."""
        self._rate = float(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any
    ) -> None:
        """Add the loss of a batch; no point is read from the device before it is asked for."""
        loss = loss_of(outputs)
        if loss is not None:
            # Lightning has divided it by the batches of an optimizer step.
            self._sum = self._sum + loss.detach() * trainer.accumulate_grad_batches
            self._batches += 1
        step = trainer.global_step
        # Batches of the same optimizer step share a number.
        points = self._waiting or self._losses
        due = step % self._every == 0 and step > (points[-1][0] if points else 0)
        if not due or not self._batches:
            return
        self._waiting.append((step, self._sum, self._batches))
        if self._rate is not None:
            self.rates.append((step, self._rate))
        self._sum, self._batches = 0.0, 0
        if len(self._losses) + len(self._waiting) >= MOST_POINTS:
            pairs = zip(self.losses[::2], self.losses[1::2], strict=True)
            self._losses = [(second[0], (first[1] + second[1]) / 2) for first, second in pairs]
            self.rates = self.rates[1::2]
            self._every *= 2

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the result of a validation during training."""
        if METRIC in trainer.callback_metrics and not trainer.sanity_checking:
            point = (trainer.global_step, float(trainer.callback_metrics[METRIC]))
            earlier = [other for other in self.perplexities if other[0] < point[0]]
            self.perplexities = [*earlier, point]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the curves into the report, also where a finished training was started again."""
        if self.run.record is not None:
            curves = {
                "train_loss": self.losses,
                "learning_rate": self.rates,
                "validation_perplexity": self.perplexities,
            }
            told = {name: [[*point] for point in points] for name, points in curves.items()}
            self.run.record.curves = {name: points for name, points in told.items() if points}

    def state_dict(self) -> dict[str, Any]:
        """Return the curves so far."""
        return {
            "losses": list(self.losses),
            "rates": list(self.rates),
            "perplexities": list(self.perplexities),
            "sum": float(self._sum),
            "batches": self._batches,
            "every": self._every,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the curves of the run that wrote the checkpoint."""
        self._losses, self.rates, self.perplexities = (
            [(int(step), float(value)) for step, value in state_dict[name]]
            for name in ("losses", "rates", "perplexities")
        )
        self._waiting = []
        self._sum, self._batches = state_dict["sum"], state_dict["batches"]
        self._every = state_dict["every"]
