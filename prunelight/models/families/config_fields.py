"""Config fields whose names differ between families, and the fields that depend on the layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

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


def config_accepts(config: PretrainedConfig, **fields: Any) -> bool:
    """Return whether a config's class accepts the config with these fields replaced."""
    try:
        type(config).from_dict({**config.to_dict(), **fields})
    except (StrictDataclassError, ValueError):
        return False
    return True


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


# Config fields that count layers from the first one: so many layers have a feature, or lack it.
COUNTING_FIELDS = ("max_window_layers", "first_k_dense_replace", "num_dense_layers")

# Config fields that are no lists per layer, though their length may equal the number of layers.
LISTS_NOT_PER_LAYER = ("eos_token_id", "time_step_limit")


def cut_config(config: PretrainedConfig, kept: Sequence[int], total: int) -> None:
    """Cut every per-layer field of a config, in place, to the kept layers.

    Lists of length `total` keep the entries of the kept layers. Fields that count layers from the
    first one, or that list indices of layers, are renumbered. Mixture-of-experts layers at a
    regular distance, which removal would break, are listed in `mlp_only_layers`.

    Args:
        config: of the model before layers are removed.
        kept: indices of the layers that stay, ascending.
        total: number of layers before.
    """
    values = config.to_dict()
    lists = {
        name: [value[i] for i in kept]
        for name, value in values.items()
        if isinstance(value, (list, tuple)) and len(value) == total
        if name not in (*LISTS_NOT_PER_LAYER, "mlp_only_layers")  # this one lists indices
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
    if "attention_types" in values:  # GPT-Neo derives from it attention_layers, which was cut above
        config.attention_types = [[[kind], 1] for kind in config.attention_layers]
    step, dense = values.get("decoder_sparse_step"), values.get("mlp_only_layers")
    if isinstance(step, int) and isinstance(dense, list):  # some layers have no experts
        config.decoder_sparse_step = 1
        config.mlp_only_layers = [
            new for new, i in enumerate(kept) if i in dense or (i + 1) % step != 0
        ]
