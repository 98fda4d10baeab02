"""Config fields whose names or meaning differ between families, and how a config loses layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

# Config fields by which logits are multiplied (1) or divided (-1): Cohere, Falcon-H1, Granite.
_LOGIT_SCALES = {"logit_scale": 1, "lm_head_multiplier": 1, "logits_scaling": -1}


def logits_finish(config: Any) -> Callable[[Tensor], Tensor] | None:
    """Return what the model does to its head's logits, scale or cap them; None for nothing."""
    scale, cap = 1.0, getattr(config, "final_logit_softcapping", None)  # Gemma
    for name, power in _LOGIT_SCALES.items():
        scale *= (getattr(config, name, None) or 1.0) ** power
    if scale == 1.0 and cap is None:
        return None
    return lambda logits: logits * scale if cap is None else cap * torch.tanh(logits * scale / cap)


def head_dim(config: Any) -> int:
    """Return the width of an attention head."""
    width: int = (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    return width


def accepts(config: PretrainedConfig, **fields: Any) -> bool:
    """Return whether the config class accepts these values instead of the config's own."""
    try:
        type(config).from_dict({**config.to_dict(), **fields})
    except (StrictDataclassError, ValueError):
        return False
    return True


def vocabulary_size(model: PreTrainedModel) -> int:
    """Return the number of token ids that the model has embeddings for."""
    embeddings: Any = model.get_input_embeddings()
    return int(embeddings.weight.shape[0])


def maximum_length(config: PretrainedConfig) -> int | None:
    """Return the longest sequence in tokens that the model allows, None if it has no limit."""
    for name in ("max_position_embeddings", "context_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


# Config fields that say from which layer on something starts, or how many layers it covers.
COUNTING_FIELDS = ("max_window_layers", "first_k_dense_replace", "num_dense_layers")


def cut_config(config: PretrainedConfig, kept: Sequence[int], total: int) -> None:
    """Cut every per-layer field of a config in place to the kept layers.

    Lists of length `total` keep the entries of the kept layers; fields that count layers from the
    start, or list indices, are translated; regular spacing of mixture-of-experts layers, which
    removal breaks, is written out as a list.
    """
    values = config.to_dict()
    lists = {
        name: [value[i] for i in kept]
        for name, value in values.items()
        if isinstance(value, (list, tuple)) and len(value) == total
        if name not in (*OTHER_LISTS, "mlp_only_layers")  # indices
        if not isinstance(getattr(type(config), name, None), property)
    }
    counts = {
        name: sum(i < values[name] for i in kept)
        for name in COUNTING_FIELDS
        if isinstance(values.get(name), int)
    }
    config.num_hidden_layers = len(kept)
    for name, value in {**lists, **counts}.items():
        setattr(config, name, value)
    if "attention_types" in values:  # GPT-Neo derives attention_layers, cut above, from this
        config.attention_types = [[[kind], 1] for kind in config.attention_layers]
    step, dense = values.get("decoder_sparse_step"), values.get("mlp_only_layers")
    if isinstance(step, int) and isinstance(dense, list):  # some layers have no experts
        config.decoder_sparse_step = 1
        config.mlp_only_layers = [
            new for new, i in enumerate(kept) if i in dense or (i + 1) % step != 0
        ]


# Config fields that can be as long as the model is deep, by chance.
OTHER_LISTS = ("eos_token_id", "time_step_limit")
