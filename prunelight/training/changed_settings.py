"""Settings of a Trainer that a fit changes, and gives back when it ends, also by an error."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class ChangedSettings(Callback):
    """Remembers what was changed for a fit, and undoes it; a callback for a module's changes."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []

    def change(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of a Trainer, or of its loops, until the fit ends."""
        self._before.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Give all back, the last change first."""
        while self._before:
            setattr(*self._before.pop())

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Undo at the end of a fit."""
        self.undo()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Undo after an error, too."""
        self.undo()
