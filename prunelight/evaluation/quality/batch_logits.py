"""Logits of a model on windows, one micro-batch at a time.

A model on its device computes one micro-batch after another. The layers of a streamed one compute
one after another, each for all micro-batches, so that each goes to the device once.
"""

# B windows of a batch, T tokens, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TypeAlias

from torch import Tensor
from transformers import PreTrainedModel

from prunelight.calibration.layer_walk import enter_walk
from prunelight.calibration.windows import Windows
from prunelight.models.forward import evaluating
from prunelight.models.placement import is_streamed

# Called as compute(number of a micro-batch, its arguments).
ComputeLogits: TypeAlias = Callable[[int, Mapping[str, Tensor]], Tensor]


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
    with ExitStack() as stack:
        walk = None
        if is_streamed(model):
            walk = enter_walk(stack, model, windows, tokens=tokens, label=f"{label}, layers")
        if walk is None:
            stack.enter_context(evaluating(model))

            def forward(_: int, batch: Mapping[str, Tensor]) -> Tensor:
                moved = {name: value.to(model.device) for name, value in batch.items()}
                logits: Tensor = model(**moved).logits
                return logits

            yield forward
            return
        for _, _ in walk.layers():
            walk.advance()
        yield lambda number, _: walk.finish(walk.states[number], head=True)
