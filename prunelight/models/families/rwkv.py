"""RWKV halves weights and states between its layers in eval mode; here that is undone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel


@torch.no_grad()
def restore_rwkv_scale(model: PreTrainedModel) -> None:
    """Undo, in place, the halving that an RWKV of transformers applies to its weights in eval mode.

    Its first eval forward divides the output weights of layer i by 2^(i // rescale_every). Saving,
    removing layers or taking a fingerprint then would mix two scales. Exact: powers of two.
    """
    modules: Iterator[Any] = model.modules()
    for module in modules:
        if getattr(module, "layers_are_rescaled", False):
            was_training = module.training
            module.training = True
            module._rescale_layers()
            module.training = was_training


@contextmanager
def without_rescaling(model: PreTrainedModel) -> Iterator[None]:
    """Keep an RWKV from halving weights and states between its layers, which no layer shows."""
    scale = getattr(model.config, "rescale_every", None)
    restore_rwkv_scale(model)
    if scale is not None:
        model.config.rescale_every = 0
    try:
        yield
    finally:
        restore_rwkv_scale(model)  # nothing was halved: only the flag that says so is cleared
        if scale is not None:
            model.config.rescale_every = scale
