"""torch.compile layer by layer: one graph serves all decoder layers of the same shape.

Layers are compiled in place, so that names in the state dict and Lightning's hooks stay the same.
Layers of another width, and evaluation beside training, need graphs of their own. torch limits the
graphs of one function; this file raises that limit with the number of layers. The backends eager
and aot_eager gave the same bits as the uncompiled model, also after steps of Adam. Other backends
may sum in another order. Where gradients are near zero, Adam turns such rounding into whole steps.

Private names of torch used here: `torch._dynamo.config` and `Module._compiled_call_impl`. Tested
with torch 2.13; tests/recovery/test_private_apis.py checks that these names exist.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from prunelight.models.families.layers import decoder_layers

_GRAPHS = 8  # per layer, as torch allows a function: training, evaluation, dynamic shapes, ...


def check_backend(backend: str | None, *, watched: bool = False) -> None:
    """Check that torch.compile knows a backend.

    Args:
        backend: name of the backend; None passes.
        watched: hooks will read the layers' outputs during training, which compiled layers prevent.

    Raises:
        ValueError: if torch does not know the backend, naming the backends meant for users; or if
            the layers are watched.
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
    """Compile each decoder layer at its first forward, in place; later hooks have no effect."""
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
