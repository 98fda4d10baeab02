"""What llama.cpp must be told of each family: architecture, keys, and how it keeps the weights.

A family stands in `FAMILIES` once llama.cpp computes the logits of transformers from our file, see
tests/engines/exports.py. Keys are named as the methods `add_...` of gguf's writer. They follow
llama.cpp's own converter (directory `conversion` of its source, version 0.19 of its gguf package).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PretrainedConfig

from prunelight.models.families.config_fields import head_dim

Keys = dict[str, Any]


def _no_keys(config: Any) -> Keys:
    return {}


@dataclass(frozen=True)
class GgufFamily:
    """How llama.cpp keeps a family.

    Attributes:
        architecture: in gguf's MODEL_ARCH.
        keys: beside those that all families have.
        permutes: whether rows of queries and keys are kept in pairs (RoPE of the first Llama).
        adds_one: whether norms keep 1 + weight.
        head: "tied" takes no head beside the embedding, "always" needs one, "own" takes either.
        free_heads: whether heads may have another width than hidden_size / num_attention_heads.
        activations: of the MLP that the architecture computes.
        needs: field of the config -> the values with which the architecture computes the same.
    """

    architecture: str
    keys: Callable[[Any], Keys] = _no_keys
    permutes: bool = False
    adds_one: bool = False
    head: Literal["own", "tied", "always"] = "own"
    free_heads: bool = True
    activations: tuple[str, ...] = ("silu",)
    needs: Mapping[str, tuple[Any, ...]] | None = None


_GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
# Rotations that the file can describe; of others, llama.cpp's converter knows more.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# Parameters of yarn that no key changes; llama.cpp's value of each, None where it derives it.
YARN_DEFAULTS: dict[str, Any] = {
    "beta_fast": 32,
    "beta_slow": 1,
    "attention_factor": None,
    "mscale": None,
    "mscale_all_dim": None,
    "truncate": True,
}


def _window_keys(config: Any) -> Keys:
    """Return the window, and for each layer whether it has one."""
    return {
        "sliding_window": config.sliding_window,
        "sliding_window_pattern": [kind == "sliding_attention" for kind in config.layer_types],
    }


def _gemma2_keys(config: Any) -> Keys:
    caps = {
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
    }
    return {**{name: cap for name, cap in caps.items() if cap}, **_window_keys(config)}


def _gemma3_keys(config: Any) -> Keys:
    cap = config.final_logit_softcapping
    return {**({"final_logit_softcapping": cap} if cap else {}), **_window_keys(config)}


def _cohere2_keys(config: Any) -> Keys:
    return {"logit_scale": config.logit_scale, **_window_keys(config)}


def _granite_keys(config: Any) -> Keys:
    return {
        "attention_scale": config.attention_multiplier,
        "embedding_scale": config.embedding_multiplier,
        "residual_scale": config.residual_multiplier,
        "logit_scale": config.logits_scaling,
    }


def _mixtral_keys(config: Any) -> Keys:
    return {
        "expert_count": config.num_local_experts,
        "expert_used_count": config.num_experts_per_tok,
    }


def _qwen3_moe_keys(config: Any) -> Keys:
    return {
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
    }


def _phi3_keys(config: Any) -> Keys:
    # llama.cpp takes a window of zero for one that does not end.
    return {
        "rope_scaling_orig_ctx_len": config.original_max_position_embeddings,
        "sliding_window": config.sliding_window or 0,
    }


def _gpt2_keys(config: Any) -> Keys:
    neurons = config.n_inner or 4 * config.hidden_size
    return {"head_count_kv": config.num_attention_heads, "feed_forward_length": neurons}


_LLAMA = GgufFamily("LLAMA", permutes=True)
FAMILIES: dict[str, GgufFamily] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": GgufFamily("LLAMA", _mixtral_keys, permutes=True),
    "qwen2": GgufFamily("QWEN2", free_heads=False),
    "qwen3": GgufFamily("QWEN3", needs={"attention_bias": (False,)}),
    "qwen3_moe": GgufFamily(
        "QWEN3MOE",
        _qwen3_moe_keys,
        needs={"norm_topk_prob": (True,), "attention_bias": (False,)},
    ),
    "gemma": GgufFamily("GEMMA", adds_one=True, head="tied", activations=_GELU),
    "gemma2": GgufFamily(
        "GEMMA2",
        _gemma2_keys,
        adds_one=True,
        head="tied",
        activations=_GELU,
        needs={"use_bidirectional_attention": (False, None), "attention_bias": (False,)},
    ),
    "gemma3_text": GgufFamily(
        "GEMMA3",
        _gemma3_keys,
        adds_one=True,
        activations=_GELU,
        needs={
            "attn_logit_softcapping": (None,),
            "use_bidirectional_attention": (False, None),
            "attention_bias": (False,),
        },
    ),
    "cohere2": GgufFamily(
        "COHERE2",
        _cohere2_keys,
        head="tied",
        free_heads=False,
        needs={"attention_bias": (False,)},
    ),
    "smollm3": GgufFamily(
        "SMOLLM3",
        permutes=True,
        needs={
            "attention_bias": (False,),
            "mlp_bias": (False,),
            "use_sliding_window": (False,),
        },
    ),
    "olmo2": GgufFamily(
        "OLMO2", head="always", free_heads=False, needs={"attention_bias": (False,)}
    ),
    "olmo3": GgufFamily(
        "OLMO2",
        _window_keys,
        head="always",
        free_heads=False,
        needs={"attention_bias": (False,)},
    ),
    "phi3": GgufFamily("PHI3", _phi3_keys, free_heads=False),
    "granite": GgufFamily("GRANITE", _granite_keys, permutes=True),
    "starcoder2": GgufFamily(
        "STARCODER2", free_heads=False, activations=_GELU, needs={"use_bias": (True,)}
    ),
    "gpt2": GgufFamily(
        "GPT2",
        _gpt2_keys,
        free_heads=False,
        activations=_GELU,
        needs={
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "reorder_and_upcast_attn": (False,),
            "add_cross_attention": (False,),
        },
    ),
}


def model_keys(config: Any, family: GgufFamily) -> Keys:
    """Return the keys of a model by the names of the methods of gguf's writer.

    Args:
        config: of the model; of one with layers of different widths, lists stand for numbers.
        family: of the model.
    """
    heads = config.num_attention_heads
    keys: Keys = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": getattr(config, "intermediate_size", 0),
        "head_count": heads,
        "head_count_kv": getattr(config, "num_key_value_heads", None) or heads,
        "key_length": head_dim(config),
        "value_length": head_dim(config),
        "vocab_size": config.vocab_size,
    }
    for field in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"):
        if (value := getattr(config, field, None)) is not None:
            keys["layer_norm_rms_eps" if field == "rms_norm_eps" else "layer_norm_eps"] = value
    return {**keys, **rope_keys(config), **family.keys(config)}


def rope_parameters(config: PretrainedConfig) -> dict[str, Any]:
    """Return the parameters of the rotation, of layers that attend to all tokens; {} for none."""
    values = getattr(config, "rope_parameters", None) or {}
    return dict(values.get("full_attention", values))


def rope_keys(config: Any) -> Keys:
    """Return the keys of the rotation; {} where positions are learned."""
    rope = rope_parameters(config)
    if not rope:
        return {}
    share = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None)) or 1.0
    keys: Keys = {
        "rope_freq_base": float(rope["rope_theta"]),
        "rope_dimension_count": int(head_dim(config) * share),
    }
    local = config.rope_parameters.get("sliding_attention")
    if local:
        keys["rope_freq_base_swa"] = float(local["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        keys["rope_scaling_type"] = kind
        keys["rope_scaling_factor"] = float(rope["factor"])
    if kind == "yarn":
        keys["rope_scaling_orig_ctx_len"] = rope["original_max_position_embeddings"]
    return keys
