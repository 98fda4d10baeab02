"""Config fields whose names differ between families, and the fields that depend on the layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

# Config fields that multiply logits (1: Cohere, Falcon-H1) or divide them (-1: Granite).
_LOGIT_SCALES = {"logit_scale": 1, "lm_head_multiplier": 1, "logits_scaling": -1}


def logits_finish(config: Any) -> Callable[[Tensor], Tensor] | None:
    """Return the function by which a model scales or caps its head's logits; None if it does not.

    `final_logit_softcapping` is the cap of the Gemma family.
    """
    scale, cap = 1.0, getattr(config, "final_logit_softcapping", None)
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


def narrowest_head(config: Any, layer: int) -> int:
    """Return the least width of an attention head in a decoder layer; 2 without attention."""
    config = decoder_config(config)
    if getattr(config, "is_heterogeneous", False):
        config = config.per_layer_config[layer]
    if not getattr(config, "num_attention_heads", None):
        return 2
    names = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    parts = [getattr(config, name, None) for name in names]
    return min([head_dim(config), *(part for part in parts if part)])


def config_accepts(config: PretrainedConfig, **fields: Any) -> bool:
    """Return whether a config's class accepts the config with these fields replaced."""
    try:
        type(config).from_dict({**config.to_dict(), **fields})
    except (StrictDataclassError, ValueError):
        return False
    return True


def counts_tokens(config: PretrainedConfig) -> bool:
    """Return whether the cache of a model can tell how many tokens it holds.

    The states of a recurrence do not tell: a model that mixes them with attention needs one layer
    with attention.
    """
    try:
        DynamicCache(config=decoder_config(config)).get_seq_length()
    except Exception:  # some families have a cache of their own, and none of this class
        return False
    return True


def check_reloadable(model: PreTrainedModel) -> None:
    """Check that AutoModelForCausalLM can load the model again once it is saved.

    Raises:
        TypeError: if transformers knows no such class for the model's config.
    """
    config = type(model.config)
    if config not in MODEL_FOR_CAUSAL_LM_MAPPING and not getattr(model.config, "auto_map", None):
        raise TypeError(
            f"{type(model).__name__} could not be loaded again: AutoModelForCausalLM has no class "
            f"for {config.__name__}; prune the decoder of another checkpoint of this family"
        )


def vocabulary_size(model: PreTrainedModel) -> int:
    """Return the number of token ids for which a model has embeddings."""
    embeddings: Any = model.get_input_embeddings()
    return int(embeddings.weight.shape[0])


def maximum_length(config: PretrainedConfig) -> int | None:
    """Return the longest sequence in tokens that a model allows; None without a limit."""
    for name in ("max_position_embeddings", "context_length", "max_seq_len"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def decoder_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return the part of a config that describes the text decoder: mostly the config itself."""
    text: PretrainedConfig = config.get_text_config(decoder=True)
    # For an encoder-decoder transformers returns a copy, whose changes would be lost.
    return text if any(text is part for part in vars(config).values()) else config
