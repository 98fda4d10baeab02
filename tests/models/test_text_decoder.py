"""Multimodal checkpoints: their text decoder is loaded as a model of its own, or refused."""

import logging

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from tiny import COMMON, token_windows
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import prunelight
from prunelight.callbacks import ShortGPT
from prunelight.models.text_decoder import reading_class

TEXT = {"head_dim": 8, "sliding_window": 8}
GEMMA4 = {"vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "image_size": 28,
    "patch_size": 14,
}
SAM = {"output_channels": 32, "global_attn_indexes": [1], "window_size": 2, "mlp_dim": 64}
# model_type -> text config, vision config, class of the text decoder
MULTIMODAL = {
    "gemma3": ({"model_type": "gemma3_text", **TEXT}, TOWER, "Gemma3ForCausalLM"),
    "gemma4": ({"model_type": "gemma4_text", **TEXT, **GEMMA4}, TOWER, "Gemma4ForCausalLM"),
    "fuyu": ({"model_type": "persimmon"}, None, "PersimmonForCausalLM"),
    "got_ocr2": ({"model_type": "qwen2"}, {**TOWER, **SAM}, "Qwen2ForCausalLM"),
    "llava": ({"model_type": "llama"}, TOWER, "LlamaForCausalLM"),
    "mistral3": ({"model_type": "mistral"}, TOWER, "MistralForCausalLM"),
}


def multimodal_config(kind, text, vision):
    text = {**COMMON, **text}
    settings = {} if vision is None else {"vision_config": vision}
    names = ("image_token_id", "image_token_index", "audio_token_id", "video_token_id")
    tokens = {name: 100 for name in names if hasattr(AutoConfig.for_model(kind), name)}
    config = AutoConfig.for_model(kind, text_config=text, **settings, **tokens)
    for name in ("boi_token_index", "eoi_token_index", "boa_token_id", "eoa_token_id"):
        if hasattr(config, name):
            setattr(config, name, 100)
    return config


def write_multimodal(directory, tokenizer, kind, text, vision):
    config = multimodal_config(kind, text, vision)
    torch.manual_seed(0)
    model = reading_class(config, kind)(config).eval()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_a_multimodal_checkpoint_gives_its_text_decoder(tmp_path, tiny_tokenizer, caplog, kind):
    text, vision, name = MULTIMODAL[kind]
    whole = write_multimodal(tmp_path / "whole", tiny_tokenizer, kind, text, vision)
    with caplog.at_level(logging.INFO):
        model, tokenizer = prunelight.load(tmp_path / "whole")
    assert type(model).__name__ == name
    assert f"took {name} out of {type(whole).__name__}" in caplog.text
    ids = token_windows(2, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, whole(input_ids=ids).logits)
    plan = ShortGPT(num_layers=1).plan(model, ids) if kind != "gemma4" else None
    if plan is not None:
        model = prunelight.apply(model, plan, ids)
    prunelight.save(model, tokenizer, tmp_path / "out")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(saved).__name__ == name
    with torch.no_grad():
        torch.testing.assert_close(saved(ids).logits, model(ids).logits)


def test_a_multimodal_model_without_a_causal_text_decoder_is_refused_before_weights_are_read(
    tmp_path, tiny_tokenizer
):
    """The directories hold no weights at all."""
    for kind in ("mllama", "emu3", "musicgen", "qwen2_vl"):
        AutoConfig.for_model(kind).save_pretrained(tmp_path / kind)
        tiny_tokenizer.save_pretrained(tmp_path / kind)
        with pytest.raises(TypeError, match=rf"\({kind}\) is multimodal, and transformers has no"):
            prunelight.load(tmp_path / kind)


def test_a_text_decoder_that_computes_otherwise_is_refused(tmp_path, tiny_tokenizer):
    text = {"model_type": "cohere2", **TEXT}  # which scales its logits, as the whole does not
    write_multimodal(tmp_path, tiny_tokenizer, "aya_vision", text, TOWER)
    with pytest.raises(TypeError, match="Cohere2ForCausalLM computes other logits than AyaVision"):
        prunelight.load(tmp_path)


def test_a_quantized_multimodal_model_is_refused():
    config = multimodal_config("llava", *MULTIMODAL["llava"][:2])
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(TypeError, match="text model is quantized"):
        reading_class(config, "llava")


@pytest.mark.parametrize("kind", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_every_family_has_a_reading_class_or_a_reason(kind):
    try:
        config = AutoConfig.for_model(kind)
    except (ValueError, StrictDataclassClassValidationError) as error:
        pytest.skip(f"no config by default: {error}")
    if kind in ("emu3", "mllama", "musicgen", "musicgen_melody"):
        with pytest.raises(TypeError, match="is multimodal"):
            reading_class(config, kind)
    else:
        assert hasattr(reading_class(config, kind), "from_pretrained")
        assert config.sub_configs or reading_class(config, kind) is AutoModelForCausalLM
