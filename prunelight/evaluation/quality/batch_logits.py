"""Logits of a model on windows, one micro-batch at a time.

A model on its device computes one micro-batch after another. The layers of a streamed one compute
one after another, each for many micro-batches, so that each goes to the device once for them all.
"""

# B windows of a batch, T tokens, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TypeAlias

from torch import Tensor
from transformers import PreTrainedModel

from prunelight.calibration.layer_walk import LayerWalk, enter_walk
from prunelight.calibration.shared_windows import own_windows
from prunelight.calibration.windows import Windows, counted_tokens, split_windows
from prunelight.models.forward import evaluating
from prunelight.models.placement import compute_device, is_streamed

# Called as compute(number of a micro-batch, its arguments).
ComputeLogits: TypeAlias = Callable[[int, Mapping[str, Tensor]], Tensor]

# Tokens that a streamed model's layers read while they are on the device; their states are kept.
PART_TOKENS = 65536


@contextmanager
def batch_logits(
    model: PreTrainedModel, windows: Windows, *, tokens: int, label: str
) -> Iterator[ComputeLogits]:
    """Give a function that returns the logits (B, T, V) of a micro-batch, on the compute device.

    Args:
        model: in any mode, which is restored on exit.
        windows: that the micro-batches are of; no window sees another one.
        tokens: of a micro-batch.
        label: name of the progress bar of a streamed model's layers.
    """
    with evaluating(model):
        if not is_streamed(model):
            yield lambda _, batch: _forward(model, batch)
            return
        with _Parts(model, windows, tokens, f"{label}, layers") as parts:
            yield parts.logits


def _forward(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    device = compute_device(model)
    logits: Tensor = model(**{name: value.to(device) for name, value in batch.items()}).logits
    return logits


class _Parts:
    """A streamed model's logits: the layers walk the windows of many micro-batches at a time.

    Each process walks its own windows for itself: one of a group may stream, and another not.

    Args:
        model: streamed, and in eval mode.
        windows: that the micro-batches are of.
        tokens: of a micro-batch.
        label: name of the progress bar of each part.
    """

    def __init__(self, model: PreTrainedModel, windows: Windows, tokens: int, label: str) -> None:
        self.model, self.tokens, self.label = model, tokens, label
        self.ids, self.mask = split_windows(own_windows(windows))
        length = self.ids.shape[1]
        self.batch_size = max(1, tokens // length)
        self.num_batches = max(1, PART_TOKENS // (self.batch_size * length))  # of a part
        self._part = -1
        self._walk: LayerWalk | None = None
        self._plain = False  # the layers cannot be run alone, as was said
        self._stack = ExitStack()

    def __enter__(self) -> _Parts:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def logits(self, number: int, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the logits (B, T, V) of a micro-batch; the first of a part walks all of it."""
        part, place = divmod(number, self.num_batches)
        if part != self._part and not self._plain:
            self._stack.close()
            self._walk, self._part = self._walked(part), part
        if self._walk is None:
            return _forward(self.model, batch)
        return self._walk.finish(self._walk.states[place], head=True)

    def _walked(self, part: int) -> LayerWalk | None:
        """Return the walk of a part, at its end.

        None, where plain forwards do as well or better: of one micro-batch, of nothing but padding,
        or where the layers cannot be run alone.
        """
        size = self.num_batches * self.batch_size
        rows = slice(part * size, (part + 1) * size)
        windows = {"input_ids": self.ids[rows]}
        if self.mask is not None:
            windows["attention_mask"] = self.mask[rows]
        one = len(self.ids[rows]) <= self.batch_size
        if one or counted_tokens(windows) == 0:
            return None
        walk = enter_walk(self._stack, self.model, windows, tokens=self.tokens, label=self.label)
        if walk is None:
            self._plain = True
            return None
        for _, _ in walk.layers():
            walk.advance()
        return walk
