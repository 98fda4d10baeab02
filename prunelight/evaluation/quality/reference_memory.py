"""Keeps the logits of a reference that many models are compared with on the same texts."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


class ReferenceMemory:
    """Logits of one reference, kept as long as they fit.

    A reference on a GPU is asked each time: a forward is short there, and memory is dear.

    Args:
        limit: bytes of all logits that are kept.
    """

    def __init__(self, limit: int = 2 * 2**30) -> None:
        self._left = limit
        self._kept: dict[tuple[str, int], Tensor] = {}

    def logits(self, text: str, batch: int, compute: Callable[[], Tensor]) -> Tensor:
        """Return the logits (B, T, V) of a micro-batch; nothing may write into them.

        Args:
            text: name of the text.
            batch: number of the micro-batch, the same windows at each call.
            compute: asks the reference.
        """
        if (text, batch) in self._kept:
            return self._kept[text, batch]
        logits = compute()
        if logits.device.type == "cpu" and logits.nbytes <= self._left:
            self._left -= logits.nbytes
            self._kept[text, batch] = logits
        return logits
