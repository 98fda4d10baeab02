"""A tiny random model of each causal-LM class of the installed transformers.

The configuration of a family is its own default with every size shrunk by a rule over the field's
name; OVERRIDES says only what the rule cannot know. NOT_BUILT names the families that stay out.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 128
FIRST_SPECIAL_TOKEN = 112  # ids of images and sounds start here; texts stay below
NUM_LAYERS = 6
NUM_EXPERTS = 6  # no other width is 6, so that what has 6 outputs picks experts
LAYER_COUNTS = {"num_hidden_layers", "num_layers", "num_blocks", "depth", "encoder_layers"}

# The first pattern that fits the whole name of an integer field gives its tiny value. None: as is.
RULES: tuple[tuple[str, int | None], ...] = (
    (r"bos_token_id|.*decoder_start_token_id", 1),
    (r"(forced_)?eos_token_id|sep_token_id|eod_token_id", 2),
    (r"pad_token_id", 0),
    (r"(forced_bos|cls|mask|unk)_token_id", 1),
    (r".*(vocab|vocab_size|group_vocab|vocab_size_base|vocab_size_per_layer_input)", VOCABULARY),
    (r"(type|task_type|segment)_vocab_size|n_langs", 2),
    # counts of layers
    (r"num_(hidden_)?layers|n_layers?|(num_)?decoder_layers|num_blocks", NUM_LAYERS),
    (r"encoder_layers|num_encoder_layers", NUM_LAYERS),  # as many as in the decoder
    (r"depth|num_global_layers", 2),
    (r"num_layers_per_stack", NUM_LAYERS),
    (r"num_nextn_predict_layers|num_kv_shared_layers", None),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"max_window_layers|.*layer_group_size|global_attn_every_n_layers", 3),
    (r"moe_layer_end_index", -1),
    (r"rescale_every", 2),
    # experts
    (r"(n|num|moe_num)_shared_experts", None),
    (r"(n_routed|num_local|num|moe_num|n)_experts|.*expert_num", NUM_EXPERTS),
    (r"num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts", 2),
    (r"n_group|num_expert_group", 2),
    (r"topk_group", 1),
    # heads
    (r".*(kv_heads|key_value_heads|query_groups)", 2),
    (r"(mamba_)?n(um)?_heads", 4),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r".*heads?", 4),
    (r".*(head_dim|headdim|head_size)|mamba_d_head|kv_channels|dim_head|d_head", 8),
    # widths
    (r"(moe|expert).*(intermediate|ffn_hidden)_size|shared.*intermediate_size", 32),
    (r".*(intermediate_size.*|ffn_dim|ffn_hidden_size|dim_ff|dff|feed_forward_size|d_inner)", 64),
    (r"attention_hidden_size|lru_width", 32),
    (r"hidden_size_per_layer_input|router_hidden_size|router_dim", 8),
    (r"(.*_)?(hidden_size.*|d_model|n_embd|emb_dim|embedding_dim|embedding_size)", 32),
    (r"word_embed_proj_dim|.*_embed_dim|dim_model_base|mamba_d_ssm", 32),
    (r".*rank", 8),
    (r"image_size", 16),
    (r"patch_size", 8),
    (r"rotary_dim", 4),
    # memory and windows
    (r".*(d_state|state_size)", 8),
    (
        r".*(positions|max_position_embeddings|context_length|n_ctx|max_seq_len|model_max_length)",
        128,
    ),
    (r".*(sliding_window(_size)?|window_size|window_len|local_attention|chunk_size|block_size)", 8),
    (r".*(chunk_length|attention_chunk_size)|local_attention|index_block_size", 8),
    (r"chunk_size_.*", None),
    (r"index_topk", 8),
    (r"index_topk_blocks", 2),
)

_DOTS3 = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 8,
    "swa_kv_lora_rank": 8,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 8,
}
_DOTS3_VISION = {"pyramid_num_routed": [-1, 4], "adapter_in_dim": 32, "adapter_out_dim": 32}
_DOTS3_AUDIO = {"adapter_input_size": 32, "whisper_adapter_out_dim": 32}
_QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "ple_layer_ids": [1, 5],
    "eos_token_id": 2,
}
# model_type -> what the rule cannot know: settings, those of a sub-configuration by its name.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [2, 5]},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
    },
    "cpmant": {"position_bias_num_buckets": 32, "segment_types": 4},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": NUM_EXPERTS, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma4_text": {
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 3]]},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2
    },
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": NUM_EXPERTS, "moe_topk": 2},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {
        "n_groups": 2,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"] * 2,
    },
    "dots3_note": {
        "text_config": _DOTS3,
        "vision_config": _DOTS3_VISION,
        "audio_config": _DOTS3_AUDIO,
    },
    "dots3_note_text": _DOTS3,
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
    },
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    # With axial positions training takes windows of one length only; hashes differ by chance.
    "reformer": {"axial_pos_embds": False, "hash_seed": 0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2},
}

# model_type -> why there is no tiny model of it.
_COMPOSITE = "its causal-LM class reads the decoder's configuration, not that of its model type"
_ASSISTANT = "it reads the hidden states and the cache of another model instead of tokens"
NOT_BUILT: dict[str, str] = {
    "gemma3n": "transformers builds its vision tower with the package timm",
    "gemma4_assistant": _ASSISTANT,
    "gemma4_unified_assistant": _ASSISTANT,
    "musicgen": _COMPOSITE,
    "musicgen_melody": _COMPOSITE,
}


def family_names() -> list[str]:
    """The model types that transformers maps to a causal-LM class, in alphabetical order."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_value(name: str, value: Any, special_tokens: list[int]) -> Any:
    """The tiny value of a field; special tokens of images and sounds get ids of their own."""
    if "dropout" in name or "pdrop" in name:
        return 0.0 if isinstance(value, float) else value
    if re.fullmatch("time_step_rank|(mamba_)?dt_rank", name):
        return 8  # "auto" would be 2, and half of a row of 2 is nothing or one
    if name == "is_decoder":
        return True
    if isinstance(value, bool) or not isinstance(value, int) or value in (0, 1):
        return value
    for pattern, tiny in RULES:
        if re.fullmatch(pattern, name):
            return value if tiny is None else tiny
    if re.search(r"_token_(id|index)$", name):
        special_tokens.append(VOCABULARY - 1 - len(special_tokens))
        return special_tokens[-1]
    return value


def tiny_settings(config_class: type[PretrainedConfig], changes: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a class for its default configuration with every size shrunk."""
    special_tokens: list[int] = []
    settings: dict[str, Any] = {}
    fields = {field.name: field for field in dataclasses.fields(config_class) if field.init}
    defaults = {name: field.default for name, field in fields.items()}
    if isinstance(getattr(config_class(), "eos_token_id", None), list):
        settings["eos_token_id"] = 2
    for name, value in defaults.items():
        if value is not dataclasses.MISSING:
            tiny = tiny_value(name, value, special_tokens)
            if tiny is not value:
                settings[name] = tiny
    heads, kv_heads = defaults.get("num_attention_heads"), defaults.get("num_key_value_heads")
    if isinstance(kv_heads, int) and heads == kv_heads:
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    for name, sub_class in sub_config_classes(config_class).items():
        sub_settings = tiny_settings(sub_class, changes.get(name, {}))
        if not re.search("text|decoder|attn|ffn", name):
            sub_settings.update(dict.fromkeys(LAYER_COUNTS & sub_settings.keys(), 2))
        settings[name] = sub_settings
        if sub_class.model_type:
            settings[name]["model_type"] = sub_class.model_type
    others = {name: x for name, x in changes.items() if not isinstance(settings.get(name), dict)}
    return {**settings, **others}


def sub_config_classes(config_class: type[PretrainedConfig]) -> dict[str, type[PretrainedConfig]]:
    """The classes of the sub-configurations that a default configuration has."""
    if not config_class.sub_configs:
        return {}
    default = config_class()
    classes = {name: type(getattr(default, name, None)) for name in config_class.sub_configs}
    return {name: x for name, x in classes.items() if issubclass(x, PretrainedConfig)}


def tiny_config(name: str) -> PretrainedConfig:
    """The tiny configuration of a family."""
    config_class = CONFIG_MAPPING[name]
    return config_class(**tiny_settings(config_class, OVERRIDES.get(name, {})))


def make_lively(model: PreTrainedModel, seed: int = 0) -> None:
    """Change the weights in place, so that each layer changes the hidden states.

    State-space scalars, convolutions and decays keep their values: their range carries meaning.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(parameter: torch.Tensor) -> torch.Tensor:
        return torch.randn(parameter.shape, generator=generator)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            own_name = name.rsplit(".", 1)[-1]
            if re.search(r"A_log|conv|decay|dt_|time_|\.D$", name):
                continue
            if parameter.ndim >= 2:
                parameter.copy_(noise(parameter) / max(parameter.shape[-2:]) ** 0.5)
            elif own_name in ("weight", "bias", "gamma", "beta"):
                parameter.add_(0.2 * noise(parameter))


def tiny_family(name: str, seed: int = 0) -> PreTrainedModel:
    """Build the tiny model of a family in eval mode and float32."""
    if name in NOT_BUILT:
        raise ValueError(f"there is no tiny model of {name}: {NOT_BUILT[name]}")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(name), dtype=torch.float32)
    make_lively(model, seed)
    return model.eval()


FAMILIES = [name for name in family_names() if name not in NOT_BUILT]
