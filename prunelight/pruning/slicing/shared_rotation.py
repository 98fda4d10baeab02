"""One rotation for the whole model: slicing that leaves a stock model of smaller hidden size.

The residual stream keeps one basis, so no shortcut is needed and plain transformers loads the
result. One basis costs accuracy: the principal components are those of all sites together. In
SliceGPT's paper (arXiv:2401.15024) the rotation differs from site to site.
"""

# B sequences, T tokens, D hidden, d sliced

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunelight.calibration.layer_walk import LayerWalk
from prunelight.calibration.statistics import Gram
from prunelight.calibration.windows import Windows
from prunelight.models.families.config_fields import head_dim
from prunelight.models.families.own_classes.sliced import LAYERS, embeddings_of, last_norm, stack_of
from prunelight.models.sizes import parameter_count
from prunelight.planning.steps import SliceHidden
from prunelight.pruning.slicing.basis import (
    principal_components,
    random_rotation,
    read_basis,
    signal_of,
    write_basis,
)
from prunelight.pruning.slicing.slice_hidden import SliceOutcome, check_sliceable, untie
from prunelight.pruning.slicing.targets import allowed_widths
from prunelight.runtime.devices import float64_device


def check_shareable(model: PreTrainedModel) -> None:
    """Check that one rotation leaves a stock model.

    Raises:
        TypeError: if the model has LayerNorms, which subtract a mean over the dense basis, or
            cannot be sliced at all.
    """
    check_sliceable(model)
    if isinstance(getattr(stack_of(model), last_norm(model)), nn.LayerNorm):
        raise TypeError(
            f"rotation='shared' leaves no stock {model.config.model_type}: its LayerNorms subtract "
            "a mean over the dense basis; use rotation='per_layer'"
        )


def check_shared(model: PreTrainedModel, step: SliceHidden) -> None:
    """Check a slice step with one rotation against a model.

    Raises:
        TypeError: see `check_shareable`.
        ValueError: if the config class does not accept the width.
    """
    check_shareable(model)
    width = step.residual_dims[0]
    if not allowed_widths(model, width):
        raise ValueError(
            f"{type(model.config).__name__} does not accept hidden_size={width}; take one that its "
            "query heads divide"
        )


def shared_parameters(model: PreTrainedModel, width: int) -> int:
    """Return how many parameters the model will have with this width; the head is never tied."""
    stack, config = stack_of(model), model.config
    per_width = sum(  # weights and biases of the projections, for one unit of width
        linear.out_features if reads else linear.in_features + (linear.bias is not None)
        for layer in stack.layers
        for linear, _, reads in _linears(model, layer)
    )
    norms, vocabulary = 2 * len(stack.layers) + 1, len(stack.embed_tokens.weight)
    total = parameter_count(model)
    total += vocabulary * config.hidden_size if config.tie_word_embeddings else 0
    return total - (config.hidden_size - width) * (per_width + norms + 2 * vocabulary)


@torch.no_grad()
def share_rotation(
    model: PreTrainedModel,
    step: SliceHidden,
    windows: Windows,
    *,
    device: torch.device | None = None,
    offload: bool = False,
) -> SliceOutcome:
    """Carry out a slice step with one rotation, in place; the class stays, the head is untied.

    Args:
        model: the dense model.
        step: with rotation "shared"; all its widths are the same.
        windows: calibration windows (N, T), or with an attention_mask.
        device: where the layers compute, one at a time.
        offload: keep the calibration states on the CPU.

    Raises:
        ValueError: if states are NaN or Inf, or have fewer components than are kept; the model is
            then unchanged.
    """
    config: Any = model.config
    hidden, width = config.hidden_size, step.residual_dims[0]
    with LayerWalk(model, windows, device=device, offload=offload, label="rotate") as walk:
        gram = Gram(hidden)
        for states in _residuals(walk):
            gram.update(signal_of(states, step.signal, centered=False))
        gram.pool(walk.group)
    basis, explained = principal_components(gram.result(), width)
    if step.orientation == "random":
        generator = torch.Generator().manual_seed(step.seed)
        basis = basis @ random_rotation(width, generator).to(basis)
    if config.tie_word_embeddings:
        untie(model)
    stack: Any = stack_of(model)
    # Norms take the mean over d instead of D. So all that writes into the residual is divided by
    # the gain, which keeps the effect of their epsilon; all that reads from it is multiplied.
    gain = math.sqrt(hidden / width)
    offset = LAYERS[config.model_type].norm_offset
    for layer in stack.layers:
        for linear, norm, reads in _linears(model, layer):
            if reads:
                read_basis(linear, norm, gain * basis, offset=offset)
            else:
                write_basis(linear, basis / gain)
    norm = getattr(stack, last_norm(model))
    read_basis(model.lm_head, norm, gain * basis, offset=offset)
    for embedding in embeddings_of(model):
        # Gemma scales its embeddings by sqrt(hidden_size).
        if scaled := hasattr(embedding, "scalar_embed_scale"):
            embedding.scalar_embed_scale = math.sqrt(width)
            embedding.embed_scale.fill_(embedding.scalar_embed_scale)
        read_basis(embedding, None, basis / (1 if scaled else gain))
    _resize_norms(model, width)
    config.head_dim, config.hidden_size = head_dim(config), width
    return SliceOutcome([explained])


def _residuals(walk: LayerWalk) -> Iterator[Tensor]:
    """Yield the states (tokens, D) at each site of the dense model, without padding."""
    place = float64_device(walk.device)
    counted = walk.positions()
    name = LAYERS[walk.model.config.model_type].mlp_norm
    before_mlp: list[Tensor] = []
    for _, layer in walk.layers():
        hook = layer.get_submodule(name).register_forward_pre_hook(
            lambda module, args: before_mlp.append(args[0])
        )
        try:
            for batch, mask in enumerate(counted):
                yield walk.states[batch].to(mask.device)[mask].to(place)
                walk.states[batch] = walk.forward(batch).to(walk.store)
                yield before_mlp.pop()[mask].to(place)
        finally:
            hook.remove()
    for state, mask in zip(walk.states, counted, strict=True):
        yield state.to(mask.device)[mask].to(place)


def _linears(model: PreTrainedModel, layer: Any) -> Iterator[tuple[Any, Any, bool]]:
    """Yield the linears of a layer, the norm before each, and whether they read the residual."""
    names = LAYERS[model.config.model_type]
    for norm, inputs, output in (
        (names.attention_norm, names.attention_inputs, names.attention_output),
        (names.mlp_norm, names.mlp_inputs, names.mlp_output),
    ):
        for name in inputs:
            yield layer.get_submodule(name), getattr(layer, norm), True
        yield layer.get_submodule(output), None, False


def _resize_norms(model: PreTrainedModel, width: int) -> None:
    """Give the norms of the residual another width, with weights that multiply by one."""
    config: Any = model.config
    stack = stack_of(model)
    names = LAYERS[config.model_type]
    norms = [
        getattr(layer, n) for layer in stack.layers for n in (names.attention_norm, names.mlp_norm)
    ]
    for norm in [*norms, getattr(stack, last_norm(model))]:
        norm.weight = nn.Parameter(norm.weight.data.new_full((width,), 1.0 - names.norm_offset))
    module: Any
    for module in model.modules():
        if vars(module).get("hidden_size") == config.hidden_size:
            module.hidden_size = width
