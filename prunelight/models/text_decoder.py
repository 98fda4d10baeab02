"""The text decoder of a multimodal checkpoint, as the causal language model that transformers has.

transformers loads such a checkpoint as one model with towers for images or sound. Its text model is
an object of a class that a causal language model of text wraps too. That object and the head are
taken as they are, so that no weight is renamed or copied.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
)

_MAPPINGS: tuple[Any, ...] = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING)


def reading_class(config: PretrainedConfig, name: str) -> Any:
    """Return the class that reads a checkpoint: the usual one, or that of a multimodal model.

    Raises:
        TypeError: if a model is multimodal, and transformers has no causal language model for its
            text decoder, or the decoder cannot be taken out because it is quantized.
    """
    text = _text_config(config)
    if text is config or not config.sub_configs:
        return AutoModelForCausalLM
    whole = next((m[type(config)] for m in _MAPPINGS if type(config) in m), None)
    if text is None or type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING or whole is None:
        described = "none alone" if text is None else text.model_type
        raise TypeError(
            f"model {name!r} ({config.model_type}) is multimodal, and transformers has no causal "
            f"language model for its text decoder ({described}); give a text-only model"
        )
    if whole.config_class is type(text):  # transformers takes the text decoder by itself
        return AutoModelForCausalLM
    if text.is_encoder_decoder or getattr(config, "quantization_config", None) is not None:
        reason = "an encoder-decoder" if text.is_encoder_decoder else "quantized"
        raise TypeError(
            f"model {name!r} ({config.model_type}) is multimodal and its text model is {reason}: "
            "only a decoder in full precision can be taken out; give a text-only model"
        )
    return whole


def _text_config(config: PretrainedConfig) -> PretrainedConfig | None:
    """Return the config of the text decoder, which may be `config`; None if there are several."""
    try:
        return config.get_text_config(decoder=True)
    except ValueError:
        return None


def take_text_decoder(model: PreTrainedModel) -> PreTrainedModel:
    """Return the text decoder of a multimodal model as a causal language model of text.

    The decoder and the head are those of `model`, not copies.

    Raises:
        TypeError: if the model does not hold exactly one such decoder, or computes other logits.
    """
    config = copy.deepcopy(model.config.get_text_config(decoder=True))
    config.dtype = model.dtype
    with torch.device("meta"):
        text: Any = AutoModelForCausalLM.from_config(config)
        decoder_class = type(AutoModel.from_config(config))
    parts: list[Any] = list(model.modules())
    whole = [module for module in parts if type(module) is type(text)]
    if whole:
        decoders = [module.base_model for module in whole]
    else:
        decoders = [module for module in parts if type(module) is decoder_class]
    head = (whole[0] if whole else model).get_output_embeddings()
    if len(decoders) != 1 or head is None:
        raise TypeError(
            f"{type(model).__name__} holds {len(decoders)} text decoders {decoder_class.__name__} "
            "and a head for one, exactly one must be there; give a text-only model"
        )
    setattr(text, text.base_model_prefix, decoders[0])
    text.set_output_embeddings(head)
    text.config = decoders[0].config
    text.config.tie_word_embeddings = head.weight is text.get_input_embeddings().weight
    text.config.architectures = [type(text).__name__]
    text.generation_config = model.generation_config
    text.eval()
    if not whole:
        _check_logits(model, text)
    return text


@torch.no_grad()
def _check_logits(model: Any, text: Any) -> None:
    """Check that the decoder alone computes what the multimodal model computes from text.

    Raises:
        TypeError: if it does not: some multimodal models leave out a scale of the logits.
    """
    ids = torch.arange(4).unsqueeze(0) % text.get_input_embeddings().weight.shape[0]
    expected, logits = model(input_ids=ids).logits.float(), text(input_ids=ids).logits.float()
    difference = (expected - logits).abs().max().item()
    if not difference <= 1e-2 * expected.abs().max().item():  # written so that NaN fails
        raise TypeError(
            f"{type(text).__name__} computes other logits than {type(model).__name__} with the "
            f"same weights (they differ by {difference:.3g}); give a text-only model"
        )
