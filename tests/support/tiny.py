"""Tiny random models of every family, and a small real tokenizer, built without any download."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 128
NUM_LAYERS = 6
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# model_type -> what differs from the common settings
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8},
    "phi3": {},
    "phi": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt2": {},
    "gpt_neox": {},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "head_dim": 8,
        "decoder_sparse_step": 2,
    },
    "smollm3": {},
    "granite": {},
    "starcoder2": {},
    "olmo2": {},
    "falcon": {},
    "bloom": {},
    "stablelm": {},
    "cohere": {},
    "glm4": {"head_dim": 8},
    "nemotron": {},
    "mamba": {},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1, "state_size": 8},
    "rwkv": {"attention_hidden_size": 32, "context_length": 128, "rescale_every": 2},
}
# Not in the table of architectures: found by structure.
UNKNOWN_FAMILIES: dict[str, dict[str, object]] = {
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 3]], "window_size": 8},
}


def tiny_model(
    family: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object
) -> PreTrainedModel:
    """Build a random model of 6 layers and hidden size 32, in eval mode."""
    settings = {**COMMON, **{**FAMILIES, **UNKNOWN_FAMILIES}[family], **changes}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
    return model.to(dtype).eval()


def token_windows(num_samples: int = 4, seq_len: int = 16, *, seed: int = 0) -> torch.Tensor:
    """Random token ids (num_samples, seq_len) that avoid the special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (num_samples, seq_len), generator=generator)
