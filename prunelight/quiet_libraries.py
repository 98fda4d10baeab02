"""Keeps notices of other libraries off a user's screen where they help nobody to decide anything.

Only known texts are dropped. What a library says of this run, such as a metric that stopped to
improve, stays.
"""

from __future__ import annotations

import logging
import warnings

# Beginnings of lines that Lightning logs at the start and the end of each run.
LIGHTNING_NOTICES = (
    "Seed set to",
    "GPU available:",
    "TPU available:",
    "HPU available:",
    "\U0001f4a1 Tip:",
    "`Trainer.fit` stopped: `max_steps=",
    "`Trainer.fit` stopped: `max_epochs=",
    "Restoring states from the checkpoint path",
    "Restored all states from the checkpoint",
    "\nDetected KeyboardInterrupt",
)
# Loggers of Lightning that write to the terminal themselves.
LIGHTNING_LOGGERS = ("lightning", "lightning.pytorch", "lightning.fabric")
# Patterns of warnings that a plain run cannot avoid.
WARNINGS = (
    ".*there is no last checkpoint available",  # the first start of a run has none
    r".*isinstance\(treespec, LeafSpec\)",
    ".*overridden `on_before_batch_transfer` in `LightningModule`",  # which checks token ids
    ".*does not have many workers which may be a bottleneck",  # the tokens are in memory
    ".*is smaller than the logging interval Trainer",  # the bar shows the loss meanwhile
    ".*Checkpoint directory .* exists and is not empty",  # a run goes on in its directory
    ".*resuming from a checkpoint that ended before the epoch ended",  # which is exact here
)


class DropNotices(logging.Filter):
    """Drops log lines that begin with a known notice."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is shown."""
        return not record.getMessage().startswith(LIGHTNING_NOTICES)


def quiet_libraries(handler: logging.Handler) -> None:
    """Let one handler write all lines of this process, without the known notices, in place.

    For a command line, not for a library: loggers and warnings are the process's own.
    """
    handler.addFilter(DropNotices())
    for name in LIGHTNING_LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    for text in WARNINGS:
        warnings.filterwarnings("ignore", text)
