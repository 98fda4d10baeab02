"""The models that the loaders are tried on: small ones of each family, and a result of each method.

Heads are 64 wide and there are enough tokens to leave a window of 16: engines refuse smaller heads,
and a window that is never left proves nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from prunelight.models.engines import family_pattern, has_windows, layer_kinds
from prunelight.planning.layer_choice import lowest_scores
from prunelight.planning.layer_pattern import (
    counts_that_keep_pattern,
    keeps_pattern,
    pattern_fits,
)

VOCABULARY = 128
WINDOW = 16
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_WINDOWED = {"head_dim": 64, "sliding_window": WINDOW}
_TIED = {"tie_word_embeddings": True}
_QWEN = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 4}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_QWEN_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "norm_topk_prob": True,
}
_LATENT = {
    "q_lora_rank": 64,
    "kv_lora_rank": 512,  # vLLM takes no other
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 128,
    "first_k_dense_replace": 2,
    # These stand in published configs; the class of transformers does not know them.
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}
# Name of a case -> (model_type, what differs from the common settings).
FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral, windows": ("mistral", {"sliding_window": WINDOW}),
    "qwen2": ("qwen2", {}),
    "qwen2, windows in some layers": ("qwen2", _QWEN),
    "qwen3": ("qwen3", {"head_dim": 64}),
    "gemma": ("gemma", {"head_dim": 64, **_TIED}),
    "gemma2": ("gemma2", {**_WINDOWED, **_TIED, "query_pre_attn_scalar": 64}),
    "gemma3": (
        "gemma3_text",
        {**_WINDOWED, **_TIED, "num_hidden_layers": 14, "query_pre_attn_scalar": 64},
    ),
    # As wide and deep as llama.cpp knows the 27B: there it takes another scale of attention.
    "gemma3, 62 layers": (
        "gemma3_text",
        {
            **_WINDOWED,
            **_TIED,
            "num_hidden_layers": 62,
            "head_dim": 32,
            "intermediate_size": 128,
            "query_pre_attn_scalar": 64,
        },
    ),
    # rotary_pct stands in published configs; the class of transformers does not know it.
    "cohere2": (
        "cohere2",
        {**_WINDOWED, **_TIED, "logit_scale": 1.0, "rotary_pct": 1.0},
    ),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": WINDOW}),
    "exaone4": ("exaone4", {**_WINDOWED}),
    "exaone4, 64 layers": (
        "exaone4",
        {**_WINDOWED, "num_hidden_layers": 64, "intermediate_size": 128},
    ),
    "smollm3": ("smollm3", {}),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi3, windows": ("phi3", {"sliding_window": WINDOW}),
    "granite": ("granite", {}),
    "starcoder2": ("starcoder2", {"sliding_window": None}),
    "glm4": ("glm4", {"head_dim": 64}),
    "gpt2": ("gpt2", {"n_embd": 256, "n_layer": 8, "n_head": 4, "n_positions": 256, "n_ctx": 256}),
    "gpt_oss": ("gpt_oss", {**_WINDOWED, **_EXPERTS}),
    "mixtral": ("mixtral", {**_EXPERTS, "sliding_window": None}),
    "qwen3_moe": ("qwen3_moe", {**_QWEN_EXPERTS, "head_dim": 64}),
    "qwen3_moe, experts in every second layer": (
        "qwen3_moe",
        {**_QWEN_EXPERTS, "head_dim": 64, "decoder_sparse_step": 2},
    ),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4}),
    "deepseek_v3": ("deepseek_v3", _LATENT),
    # As deep as llama.cpp knows DeepSeek-V2-Lite.
    "deepseek_v3, Lite, 27 layers": (
        "deepseek_v3",
        {**_LATENT, "q_lora_rank": None, "num_hidden_layers": 27, "intermediate_size": 128},
    ),
    "llama4": (
        "llama4_text",
        {
            "head_dim": 64,
            "num_local_experts": 4,
            "intermediate_size_mlp": 512,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 8192,
        },
    ),
}


def family_config(name: str, **tokens: int) -> PretrainedConfig:
    """Return the config of a case; `tokens` are the size of another vocabulary and its ids."""
    family, changes = FAMILIES[name]
    return AutoConfig.for_model(family, **{**_COMMON, **changes, **tokens})


def family_model(name: str, **tokens: int) -> PreTrainedModel:
    """Build a random model whose layers matter: at the usual initialisation they hardly do."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family_config(name, **tokens)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3)
    return model


@dataclass(frozen=True)
class Removal:
    """Layers that go from a case: their indices, and what is left of the family's pattern."""

    state: str
    layers: tuple[int, ...] = ()
    options: dict[str, bool] = field(default_factory=dict)  # of a reader


def removals(name: str) -> Iterator[Removal]:
    """Yield what is removed from a case: nothing; layers that break the pattern, or keep it."""
    yield Removal("dense")
    config = family_config(name)
    kinds, pattern = layer_kinds(config), family_pattern(config)
    if len(set(kinds)) == 1:
        yield Removal("2 layers removed", (2, 5))
        return
    count = counts_that_keep_pattern(kinds, pattern)[1]
    fits = pattern_fits(kinds, pattern, count)
    kept = lowest_scores([0.0] * len(kinds), count, fits=fits)
    broken = next(i for i in range(1, len(kinds)) if not keeps_pattern(kinds, [i], pattern))
    removed = f"{count} layer{'s' * (count > 1)} removed"
    yield Removal(f"{removed}, pattern kept", tuple(kept))
    yield Removal("1 layer removed, pattern broken", (broken,))
    if has_windows(config):
        state = "1 layer removed, pattern broken, key in the GGUF"
        yield Removal(state, (broken,), {"window_pattern": True})


def token_ids(length: int = 40) -> list[int]:
    """Return random ids without special tokens: long enough to leave the window."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
