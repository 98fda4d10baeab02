"""Running a model: eval mode, hooks on its decoder layers, replaced forwards of its modules.

Hooks see each layer in the model's own forward, so positions, masks and layer types need no
rebuilding. The hidden states after the last layer are the layer's raw output. They are not
transformers' `hidden_states[-1]`, which is the output of the final norm.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from prunelight.models.families.config_fields import decoder_config
from prunelight.models.families.layers import decoder_layers, first_tensor
from prunelight.models.families.rwkv import restore_rwkv_scale
from prunelight.models.placement import streaming

# Called as visit(layer index, input (B, T, D), output (B, T, D)).
Visit: TypeAlias = Callable[[int, Tensor, Tensor], None]

# Config fields that make a model return more than hidden states and logits.
_SIDE_OUTPUTS = ("use_cache", "output_router_logits")


@contextmanager
def evaluating(model: PreTrainedModel, *, at_home: bool = False) -> Iterator[None]:
    """Put the model in eval mode, without gradients, cache and router logits; undo all on exit.

    Args:
        model: a streamed one computes on its device inside, see `models/placement.py`.
        at_home: it computes where its weights are instead, as gradients of all layers need.
    """
    training = {module: module.training for module in model.modules()}
    # A multimodal model asks the config of its text decoder.
    configs = {id(c): c for c in (model.config, decoder_config(model.config))}.values()
    asked = [(c, name) for c in configs for name in _SIDE_OUTPUTS if hasattr(c, name)]
    settings = [(config, name, getattr(config, name)) for config, name in asked]
    try:
        model.eval()
        for config, name, _ in settings:
            setattr(config, name, False)
        with torch.no_grad(), nullcontext() if at_home else streaming(model):
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for config, name, value in settings:
            setattr(config, name, value)
        restore_rwkv_scale(model)


@contextmanager
def watching_layers(model: PreTrainedModel, visit: Visit) -> Iterator[None]:
    """Call `visit` with the input and output of every decoder layer of each forward."""
    handles = [
        layer.register_forward_hook(_hook(index, layer, visit), with_kwargs=True)
        for index, layer in enumerate(decoder_layers(model))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def hidden_states_argument(layer: nn.Module) -> str:
    """Return the name of the argument in which a decoder layer takes its hidden states."""
    return next(iter(inspect.signature(layer.forward).parameters))


def _hook(index: int, layer: nn.Module, visit: Visit) -> Callable[..., None]:
    name = hidden_states_argument(layer)

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        visit(index, args[0] if args else kwargs[name], first_tensor(output))

    return hook


def forward_without_head(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> None:
    """Run the model without its language-model head, in place of a forward that needs no logits."""
    model.base_model(**batch)


def generate_tokens(
    model: PreTrainedModel,
    ids: Tensor,
    count: int,
    *,
    use_cache: bool = True,
    top_k: int | None = None,
    streamer: BaseStreamer | None = None,
) -> Tensor:
    """Continue ids (B, T) by exactly `count` tokens; the model's mode is left as it is.

    Args:
        model: that generates.
        ids: the prompts, (B, T).
        count: new tokens of each prompt.
        use_cache: keep keys, values and states instead of computing them again.
        top_k: draw each token from so many most probable ones; None takes the most probable.
        streamer: gets the prompts, and then each new token as soon as it is there.

    Returns:
        Token ids, (B, T + count).
    """
    drawn = {"do_sample": False} if top_k is None else {"do_sample": True, "top_k": top_k}
    pad_id = getattr(model.config, "pad_token_id", None)  # RWKV and CodeGen have no such field
    tokens: Tensor = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        **drawn,
        use_cache=use_cache,
        min_new_tokens=count,
        max_new_tokens=count,
        pad_token_id=0 if pad_id is None else pad_id,
        streamer=streamer,
    )
    return tokens


def greedy_tokens(
    model: PreTrainedModel, ids: Tensor, count: int, *, use_cache: bool = True
) -> Tensor:
    """Continue ids (B, T) greedily by `count` tokens, in eval mode.

    Returns:
        Token ids, (B, T + count).
    """
    with evaluating(model):
        return generate_tokens(model, ids, count, use_cache=use_cache)
