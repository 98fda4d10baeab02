"""Undo or prevent the halving of weights and states with which RWKV runs in eval mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

# The norm of the embeddings, which the first block holds. It stays at its place when blocks go.
EMBEDDING_NORM = "pre_ln"


@torch.no_grad()
def restore_rwkv_scale(model: PreTrainedModel) -> None:
    """Undo, in place, the halving that transformers' RWKV applies to its weights in eval mode.

    The first forward in eval mode divides the output weights of layer i by 2^(i // rescale_every).
    Saving, removing layers or taking a fingerprint would then mix two scales. The undoing is exact,
    because the divisors are powers of two. Other models are left as they are.
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
    """Keep an RWKV from halving weights and states; other models are left as they are.

    The states are halved between layers, where a replay of single layers would miss the halving.
    """
    stopped = stop_rescaling(model)
    try:
        yield
    finally:
        if stopped:
            resume_rescaling(model)


def stop_rescaling(model: PreTrainedModel) -> bool:
    """Keep an RWKV from halving its weights until `resume_rescaling`, in place.

    The halving would reach the weights and not adapters over them. Other models stay as they are.

    Returns:
        Whether the model halved its weights until now.
    """
    restore_rwkv_scale(model)
    rescale_every = getattr(model.config, "rescale_every", None)
    if not rescale_every:
        return False
    model.rescale_every_at_rest = rescale_every
    model.config.rescale_every = 0
    return True


def resume_rescaling(model: PreTrainedModel) -> None:
    """Let an RWKV halve its weights again, in place; other models are left as they are."""
    restore_rwkv_scale(model)  # clears RWKV's flag; with rescale_every=0 nothing was halved
    if hasattr(model, "rescale_every_at_rest"):
        model.config.rescale_every = model.rescale_every_at_rest
        del model.rescale_every_at_rest
