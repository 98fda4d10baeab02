"""torch.compile layer by layer: one graph serves all decoder layers of the same shape.

Compiled in place, so names in the state dict and hooks of Lightning stay as they are. What differs
between layers, and training from evaluation, compiles again: the limit of torch is for one function
and would leave layers of many widths uncompiled, so it grows with their number. The backends eager
and aot_eager gave the bits of the uncompiled model, also after steps of Adam; others may add up in
another order, and Adam makes such rounding as large as a step where gradients are near zero.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from prunelight.models.families.layers import decoder_layers

_GRAPHS = 8  # torch's own limit: training, evaluation, fixed and dynamic shapes, ...


def check_backend(backend: str | None, *, watched: bool = False) -> None:
    """Check that torch.compile knows a backend.

    Args:
        backend: its name; None passes.
        watched: hooks will look at the layers during training; compiled ones ignore them.

    Raises:
        ValueError: if not, naming those for users; or if the layers are watched.
    """
    if backend is not None and watched:
        raise ValueError(
            f"compile_backend={backend!r} hides the layers' outputs from "
            "distillation.hidden_weight, which compares them; leave one of the two out"
        )
    if backend is not None and backend not in torch.compiler.list_backends(exclude_tags=()):
        raise ValueError(
            f"compile_backend={backend!r} must be one of "
            f"{', '.join(torch.compiler.list_backends())}, or None for no compilation"
        )


def compile_layers(model: PreTrainedModel, backend: str) -> None:
    """Compile every decoder layer at its first forward, in place; later hooks have no effect."""
    layers, config = decoder_layers(model), torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _GRAPHS * len(layers))
    config.accumulated_recompile_limit = max(
        config.accumulated_recompile_limit, config.recompile_limit
    )
    for layer in layers:
        layer.compile(backend=backend)


def uncompile_layers(model: PreTrainedModel) -> None:
    """Undo `compile_layers`, in place; does nothing to layers that are not compiled."""
    for layer in decoder_layers(model):
        layer._compiled_call_impl = None
