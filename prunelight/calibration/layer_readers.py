"""Readers of the layers: one pass over the calibration windows serves several of them.

A model on its device reads one micro-batch after another. The layers of a streamed one, or of one
whose readers ask for it, compute one after another, each for all micro-batches.
"""

# B sequences, T tokens, D hidden

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunelight.calibration.layer_walk import LayerWalk, enter_walk
from prunelight.calibration.windows import Windows, micro_batches
from prunelight.models.families.rwkv import without_rescaling
from prunelight.models.forward import evaluating, forward_without_head, watching_layers
from prunelight.models.placement import is_streamed


class LayerReader:
    """What is read of decoder layers while they compute; here nothing.

    Attributes:
        by_layer: layers must compute one after another, each for all micro-batches.
    """

    by_layer = False

    def watching(self, mask: Tensor | None, index: int | None) -> AbstractContextManager[Any]:
        """Return a context around the forward of a micro-batch.

        Args:
            mask: bool (B, T), False on padding; None without padding.
            index: of the layer that computes inside; None if all do.
        """
        return nullcontext()

    def visit(self, batch: int, index: int, inputs: Tensor, outputs: Tensor) -> None:
        """Read what a layer got and gave for a micro-batch, (B, T, D) each."""

    def leave(self, index: int) -> None:
        """Read a layer, on the compute device, that has seen all micro-batches.

        It is called where layers compute one after another.
        """

    def finish(self) -> None:
        """Finish after the pass: add up what all ranks read."""


@torch.no_grad()
def read_layers(
    model: PreTrainedModel,
    windows: Windows,
    readers: Sequence[LayerReader],
    *,
    device: torch.device | None = None,
    offload: bool = False,
    label: str = "",
) -> None:
    """Let readers read all windows in one pass.

    Args:
        model: unchanged.
        windows: calibration windows.
        readers: who read; each is as if it read alone.
        device: where the layers compute if they go one after another; None takes the model's own.
        offload: keep all states on the CPU then; of a streamed model also where the device has no
            room for them.
        label: name of the progress bar.

    Raises:
        TypeError: if a reader asks for layers one by one, and they cannot be run so.
    """
    if not readers:
        return
    by_layer = any(reader.by_layer for reader in readers)
    with ExitStack() as stack:
        walk = None
        if by_layer or is_streamed(model):
            walk = enter_walk(
                stack, model, windows, must=by_layer, device=device, offload=offload, label=label
            )
        if walk is None:
            _read_by_batch(model, windows, readers, label)
        else:
            _read_by_layer(walk, readers)
    for reader in readers:
        reader.finish()


def _read_by_batch(
    model: PreTrainedModel, windows: Windows, readers: Sequence[LayerReader], label: str
) -> None:
    with evaluating(model), without_rescaling(model):  # as a walk does
        for number, batch in enumerate(micro_batches(model, windows, label=label)):
            mask = batch.get("attention_mask")
            mask = None if mask is None else mask.bool()
            with ExitStack() as watched:
                watched.enter_context(watching_layers(model, partial(_visit, readers, number)))
                for reader in readers:
                    watched.enter_context(reader.watching(mask, None))
                forward_without_head(model, batch)


def _read_by_layer(walk: LayerWalk, readers: Sequence[LayerReader]) -> None:
    for index, _ in walk.layers():
        for number, inputs in enumerate(walk.states):
            with ExitStack() as watched:
                for reader in readers:
                    watched.enter_context(reader.watching(walk.masks[number], index))
                outputs = walk.forward(number)
            _visit(readers, number, index, inputs.to(walk.device), outputs)
            walk.states[number] = outputs.to(walk.store)
        for reader in readers:
            reader.leave(index)


def _visit(
    readers: Sequence[LayerReader], batch: int, index: int, inputs: Tensor, outputs: Tensor
) -> None:
    for reader in readers:
        reader.visit(batch, index, inputs, outputs)
