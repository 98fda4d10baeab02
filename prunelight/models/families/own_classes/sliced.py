"""Models whose hidden states are narrower than their dense model's: one class for each family.

SliceGPT (arXiv:2401.15024) rotates the hidden states and cuts them to `config.residual_dims`:
widths before the attention and the MLP of each decoder layer, and after the last one, 2 L + 1 in
all. From one width and basis to the next a shortcut carries the residual over. Attention, its
cache, positions and the MLP's neurons are those of the family; norms have no weight, it is in the
projections.

This file needs only torch and transformers: it is what `export_remote_code` puts beside a model.
"""

# B sequences, T tokens, D hidden of the dense model

from __future__ import annotations

import sys
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

PREFIX = "prunelight_sliced_"  # of the model_type

_OLD = int(transformers.__version__.partition(".")[0]) < 5  # OPT's layers returned tuples

FAMILIES = tuple(  # less those that an older transformers does not have
    family
    for family in ("gemma", "llama", "mistral", "opt", "phi3", "qwen2", "qwen3", "smollm3")
    if family in CONFIG_MAPPING and not (_OLD and family == "opt")
)

SHORTCUTS = ("attn_shortcut", "mlp_shortcut")


class Shortcut(nn.Linear):
    """The residual from one basis to the next; bitsandbytes leaves this class in full precision."""

    stays_dense = "carries the residual"


class UnitNorm(nn.Module):
    """RMSNorm without weight that divides by the dense width, whatever the width of its input.

    Args:
        hidden_size: D of the dense model.
        eps: of the dense model's norm.
        centered: subtract the mean first, as a LayerNorm does.
    """

    def __init__(self, hidden_size: int, eps: float, centered: bool = False) -> None:
        super().__init__()
        self.hidden_size, self.eps, self.centered = hidden_size, eps, centered

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise (..., width), in float32 whatever the input."""
        x = hidden_states.float()
        if self.centered:
            x = x - x.mean(-1, keepdim=True)
        power = x.square().sum(-1, keepdim=True) / self.hidden_size
        return (x * torch.rsqrt(power + self.eps)).to(hidden_states.dtype)


class SlicedLayer:
    """What a sliced decoder layer adds to that of its family: the shortcuts, and names."""

    attention_norm, mlp_norm = "input_layernorm", "post_attention_layernorm"
    norm_offset = 0.0  # what the norms of the dense layer add to their weights
    attention_inputs: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    attention_output = "self_attn.o_proj"
    mlp_inputs: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    mlp_output = "mlp.down_proj"

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the hidden states (B, T, width) in the basis of the next layer."""
        return self.feed(self.attend(hidden_states, *args, **kwargs))

    def attend(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the hidden states after the attention, in the MLP's basis."""
        layer: Any = self
        attended = layer.self_attn(layer.input_layernorm(hidden_states), *args, **kwargs)[0]
        return layer.attn_shortcut(hidden_states) + attended

    def feed(self, hidden_states: Tensor) -> Tensor:
        """Return the hidden states after the MLP."""
        layer: Any = self
        fed = layer.mlp(layer.post_attention_layernorm(hidden_states))
        return layer.mlp_shortcut(hidden_states) + fed


class SlicedGemmaLayer(SlicedLayer):
    """Gemma: norms multiply by 1 + weight."""

    norm_offset = 1.0


class SlicedPhi3Layer(SlicedLayer):
    """Phi-3: query, key and value in one projection, gate and up in another, and dropout."""

    attention_inputs = ("self_attn.qkv_proj",)
    mlp_inputs = ("mlp.gate_up_proj",)

    def attend(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the hidden states after the attention, in the MLP's basis."""
        layer: Any = self
        attended = layer.self_attn(layer.input_layernorm(hidden_states), *args, **kwargs)[0]
        return layer.attn_shortcut(hidden_states) + layer.resid_attn_dropout(attended)

    def feed(self, hidden_states: Tensor) -> Tensor:
        """Return the hidden states after the MLP."""
        layer: Any = self
        fed = layer.mlp(layer.post_attention_layernorm(hidden_states))
        return layer.mlp_shortcut(hidden_states) + layer.resid_mlp_dropout(fed)


class SlicedOPTLayer(SlicedLayer):
    """OPT: LayerNorms before attention and MLP, whose projections are in the layer itself."""

    attention_norm, mlp_norm = "self_attn_layer_norm", "final_layer_norm"
    attention_output = "self_attn.out_proj"
    mlp_inputs, mlp_output = ("fc1",), "fc2"

    def attend(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the hidden states after the attention, in the MLP's basis."""
        layer: Any = self
        attended = layer.self_attn(layer.self_attn_layer_norm(hidden_states), *args, **kwargs)[0]
        attended = nn.functional.dropout(attended, p=layer.dropout, training=layer.training)
        return layer.attn_shortcut(hidden_states) + attended

    def feed(self, hidden_states: Tensor) -> Tensor:
        """Return the hidden states after the MLP."""
        layer: Any = self
        fed = layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(hidden_states))))
        fed = nn.functional.dropout(fed, p=layer.dropout, training=layer.training)
        return layer.mlp_shortcut(hidden_states) + fed


class SlicedModel:
    """What a sliced model adds to that of its family, with or without the head.

    The embeddings have the first width of `config.residual_dims`; tied to the head they stay whole,
    and so does the last norm, which otherwise is in the head.
    """

    config: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]  # that of the family
        model: Any = self
        dims, tied = config.residual_dims, config.tie_word_embeddings
        if len(dims) != 2 * config.num_hidden_layers + 1 or (
            tied and dims[0] != config.hidden_size
        ):
            raise ValueError(
                f"residual_dims has {len(dims)} widths, the first {dims[0]}; "
                f"{config.num_hidden_layers} decoder layers need two each and a last one, tied "
                f"embeddings a first of hidden_size={config.hidden_size}"
            )
        for index, layer in enumerate(stack_of(model).layers):
            strip_norms(layer, config, whole=index == 0 and tied)
            _resize_layer(layer, *dims[2 * index : 2 * index + 3])
            layer.train(model.training)
        for embedding in embeddings_of(model):
            resize(embedding, columns=dims[0])
        if tied:
            model.tie_weights()
        else:
            strip_last_norm(model)
        model._no_split_modules = {LAYERS[family_of(config)].__name__}


def family_of(config: Any) -> str:
    """Return the model_type of the dense model."""
    name: str = config.model_type
    return name.removeprefix(PREFIX)


def stack_of(model: Any) -> Any:
    """Return the module that holds embeddings, decoder layers and the last norm.

    Args:
        model: with the head, or without.
    """
    base = getattr(model, "model", model)
    return getattr(base, "decoder", base)


def embeddings_of(model: Any) -> list[Any]:
    """Return the embeddings whose sum enters the first decoder layer."""
    stack = stack_of(model)
    return [getattr(stack, n) for n in ("embed_tokens", "embed_positions") if hasattr(stack, n)]


def norm_eps(config: Any) -> float:
    """Return the epsilon of the norms; LayerNorms of these families have torch's default."""
    return getattr(config, "rms_norm_eps", 1e-5)


def strip_norms(layer: Any, config: Any, *, whole: bool) -> None:
    """Make a decoder layer one of this file, with norms that have no weight, in place.

    Args:
        layer: of the family.
        config: of the dense or the sliced model.
        whole: the layer reads embeddings that are tied to the head, so that a LayerNorm could not
            take their mean from them: its successor still subtracts it.
    """
    layer.__class__ = LAYERS[family_of(config)]
    for name, first in ((layer.attention_norm, whole), (layer.mlp_norm, False)):
        centered = first and isinstance(getattr(layer, name), nn.LayerNorm)
        setattr(layer, name, UnitNorm(config.hidden_size, norm_eps(config), centered))


def last_norm(model: Any) -> str:
    """Return the name of the last norm in the stack."""
    return "final_layer_norm" if hasattr(stack_of(model), "final_layer_norm") else "norm"


def strip_last_norm(model: Any) -> None:
    """Put a norm without weight before the head, in place; a LayerNorm's bias goes to the head."""
    stack, name, head = stack_of(model), last_norm(model), getattr(model, "lm_head", None)
    if head is not None and isinstance(getattr(stack, name), nn.LayerNorm):
        head.bias = nn.Parameter(head.weight.data.new_zeros(len(head.weight)))
    setattr(stack, name, UnitNorm(model.config.hidden_size, norm_eps(model.config)))


def _resize_layer(layer: Any, before: int, inside: int, after: int) -> None:
    """Give a sliced decoder layer its widths before, inside and after it, in place."""
    for names, width in ((layer.attention_inputs, before), (layer.mlp_inputs, inside)):
        for name in names:
            resize(layer.get_submodule(name), columns=width)
    resize(layer.get_submodule(layer.attention_output), rows=inside)
    resize(layer.get_submodule(layer.mlp_output), rows=after)
    weight = layer.get_submodule(layer.mlp_output).weight
    for name, narrow, wide in zip(SHORTCUTS, (before, inside), (inside, after), strict=True):
        made = Shortcut(narrow, wide, bias=False, device=weight.device, dtype=weight.dtype)
        setattr(layer, name, made)


def resize(module: Any, *, rows: int | None = None, columns: int | None = None) -> None:
    """Cut the weight and bias of a linear or embedding, in place."""
    module.weight = nn.Parameter(module.weight.data[:rows, :columns].clone())
    if getattr(module, "bias", None) is not None:
        module.bias = nn.Parameter(module.bias.data[:rows].clone())
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    else:
        module.embedding_dim = module.weight.shape[1]


def _make(family: str) -> tuple[Any, Any, Any]:
    """Make the classes of a family: the layer, the model without head, and that with its head.

    The config class is the models'.
    """
    stock_config = CONFIG_MAPPING[family]
    stock: Any = MODEL_FOR_CAUSAL_LM_MAPPING[stock_config]
    name = stock.__name__.removesuffix("ForCausalLM")
    stock_layer = getattr(sys.modules[stock.__module__], f"{name}DecoderLayer")
    own = {"gemma": SlicedGemmaLayer, "phi3": SlicedPhi3Layer, "opt": SlicedOPTLayer}
    mixin = own.get(family, SlicedLayer)
    here = {"__module__": __name__}
    layer = type(f"Sliced{name}DecoderLayer", (mixin, stock_layer), here)
    fields: dict[str, Any] = {**here, "model_type": PREFIX + family, "residual_dims": None}
    fields["__annotations__"] = {"residual_dims": "list[int] | None"}
    config = type(f"Sliced{name}Config", (stock_config,), fields)
    body = {**here, "config_class": config, "_no_split_modules": [layer.__name__]}
    stock_base: Any = MODEL_MAPPING[stock_config]
    base = type(f"Sliced{name}Model", (SlicedModel, stock_base), body)
    model = type(f"Sliced{name}ForCausalLM", (SlicedModel, stock), body)
    for made in (layer, config, base, model):
        globals()[made.__name__] = made
    if __name__.startswith("prunelight."):  # an exported copy must not register these names
        AutoConfig.register(PREFIX + family, config)
        AutoModel.register(config, base)
        AutoModelForCausalLM.register(config, model)
    return layer, base, model


_MADE = {family: _make(family) for family in FAMILIES}

LAYERS: dict[str, Any] = {family: layer for family, (layer, _, _) in _MADE.items()}

# Causal language models by family.
CLASSES: dict[str, Any] = {family: model for family, (_, _, model) in _MADE.items()}
