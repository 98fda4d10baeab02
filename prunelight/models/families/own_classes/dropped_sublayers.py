"""Decoder layers without attention or MLP (LLM-Drop, arXiv:2406.15786) or at a gap, as models.

No stock config can say that a layer has no attention. So each family that supports it has a
registered class here, whose config lists what was dropped: after `import prunelight`,
`AutoModelForCausalLM.from_pretrained` loads it. A dropped sublayer keeps neither weights nor
its norm, computes nothing, and an attention takes no room in the cache. The first attention of each
kind of layer must stay: transformers counts the tokens of the cache there. Assisted generation
crops caches, which in transformers 5.23 fails on an empty one of a sliding window.

At a gap, where the next layers are gone, a matrix can make up for them (Ghosted Layers,
arXiv:2605.15491): such a layer hands on x + M x. `gap_operators` lists these layers.

A saved config.json also states what was dropped as transformers' `per_layer_config` does, which the
models of these families do not read. The lists count; a statement that differs is an error.

This file needs only torch and transformers: it is what `export_remote_code` puts beside a model.
"""

# B sequences, T tokens, D hidden

from __future__ import annotations

from functools import cache, wraps
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING,
)

try:
    from transformers import conversion_mapping
except ImportError:  # transformers 4, whose modules have the names that weights have on disk
    conversion_mapping = None  # type: ignore[assignment]

PREFIX = "prunelight_"  # of the model_type

FAMILIES = tuple(  # whose classes are made at once; those of other families at their first use
    family
    for family in (
        *("gemma", "granite", "llama", "mistral", "mixtral", "phi3", "qwen2", "qwen3"),
        *("qwen3_moe", "smollm3"),
    )
    if family in CONFIG_MAPPING
)

SUBLAYERS = ("attention", "mlp")

# Names inside a decoder layer, where the config has no `sublayer_names`.
NAMES = {
    "attention": "self_attn",
    "attention_norm": "input_layernorm",
    "mlp": "mlp",
    "mlp_norm": "post_attention_layernorm",
}


class DroppedSublayer(nn.Module):
    """Stands where an attention or MLP was: adds nothing to the hidden states."""

    def __init__(self, pair: bool) -> None:
        super().__init__()
        self.pair = pair  # attentions return their weights too

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return a zero, whatever the arguments."""
        zero = hidden_states.new_zeros(())
        return (zero, None) if self.pair else zero


class GapOperator(nn.Linear):
    """M of a layer at a gap, (D, D); bitsandbytes leaves this class in full precision."""

    stays_dense = "stands for the layers of a gap"


class _WithSkips:
    """What the registered config classes add to those of their family."""

    @property
    def per_layer_config(self) -> Any:
        """The configs of the layers, as transformers gives them for every model."""
        return super().per_layer_config  # type: ignore[misc]

    @per_layer_config.setter
    def per_layer_config(self, stated: dict[str, dict[str, Any]] | None) -> None:
        """Check that what config.json states is what the lists say; nothing is stored."""
        said = layer_settings(self)
        if stated is not None and {int(index): stated[index] for index in stated} != said:
            raise ValueError(
                f"per_layer_config={stated} differs from drop_attention and drop_mlp, which say "
                f"{said}; change both, or delete per_layer_config"
            )


def layer_settings(config: Any) -> dict[int, dict[str, Any]]:
    """Return what the layers skip, as transformers states it.

    Returns:
        layer -> {"skip": names of sublayers}, as in `per_layer_config`.
    """
    flags = {name: getattr(config, f"drop_{name}", None) or [] for name in SUBLAYERS}
    skipped = {
        index: [name for name in SUBLAYERS if index < len(flags[name]) and flags[name][index]]
        for index in range(config.num_hidden_layers)
    }
    return {index: {"skip": names} for index, names in skipped.items() if names}


class _WithDropped:
    """What the registered classes add to the classes of their family."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # that of the family
        take_out(self)
        put_operators(self)


def dropped(model: PreTrainedModel, name: str) -> set[int]:
    """Return the layers without "attention" or "mlp"; none for models of other classes."""
    flags = getattr(model.config, f"drop_{name}", None) or []
    return {index for index, flag in enumerate(flags) if flag}


def take_out(model: PreTrainedModel) -> None:
    """Take the sublayers that the config lists, and their norms, out of the model, in place.

    Args:
        model: with the head, or without.
    """
    layers = layers_of(model)
    names = {**NAMES, **(getattr(model.config, "sublayer_names", None) or {})}
    for name in SUBLAYERS:
        for index in dropped(model, name):
            if not hasattr(layers[index], names[name]):
                raise TypeError(
                    f"{type(layers[index]).__name__} has no {names[name]} in this version of "
                    "transformers; install transformers 5.23 or newer"
                )
            stand_in = DroppedSublayer(name == "attention")
            setattr(layers[index], names[name], stand_in)
            setattr(layers[index], names[f"{name}_norm"], nn.Identity())


def gap_layers(config: Any) -> list[int]:
    """Return the layers with a matrix behind them; none for configs of other classes."""
    flags = getattr(config, "gap_operators", None) or []
    return [index for index, flag in enumerate(flags) if flag]


def put_operators(model: PreTrainedModel) -> None:
    """Put a matrix of zeros behind each layer that the config lists and that has none, in place.

    Args:
        model: with the head, or without.
    """
    layers, width = layers_of(model), model.config.hidden_size
    for index in gap_layers(model.config):
        layer: Any = layers[index]
        if not hasattr(layer, "gap_operator"):
            like = next(layer.parameters(), next(model.parameters()))
            stock: Any = type(layer)
            layer.__class__ = _class_at_gap(stock)
            layer.gap_operator = GapOperator(width, width, bias=False).to(like)
            layer.gap_operator.requires_grad_(like.requires_grad)
            nn.init.zeros_(layer.gap_operator.weight)


@cache
def _class_at_gap(stock: Any) -> Any:
    """Return the class of a family's decoder layers with a matrix behind them."""

    @wraps(stock.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = stock.forward(self, *args, **kwargs)
        if isinstance(output, tuple):  # transformers 4, and layers that hand on more than states
            return (output[0] + self.gap_operator(output[0]), *output[1:])
        return output + self.gap_operator(output)

    def reduce(self: Any) -> Any:  # a class that is made here has no name to pickle it by
        return _layer_at_gap, (stock,), self.__dict__

    body = {"forward": forward, "__reduce__": reduce, "__module__": __name__}
    return type(stock.__name__, (stock,), body)


def _layer_at_gap(stock: Any) -> Any:
    """Return a layer without its state yet, as pickle and copy ask for it."""
    kind = _class_at_gap(stock)
    return kind.__new__(kind)


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder layers of a model with the head, or without."""
    base: Any = model.base_model
    lists = (module for module in base.modules() if isinstance(module, nn.ModuleList))
    return next(x for x in lists if len(x) == model.config.num_hidden_layers)


def _make(family: str) -> Any:
    """Make the classes of a family and return that of its causal language models."""
    stock_config = CONFIG_MAPPING[family]
    stock: Any = MODEL_FOR_CAUSAL_LM_MAPPING[stock_config]
    name = f"Prunelight{stock.__name__.removesuffix('ForCausalLM')}"
    here, flags = {"__module__": __name__}, ("drop_attention", "drop_mlp")
    fields: dict[str, Any] = {**here, "model_type": PREFIX + family}
    fields["__annotations__"] = {
        **dict.fromkeys((*flags, "gap_operators"), "list[bool] | None"),
        "sublayer_names": "dict[str, str] | None",
    }
    fields |= dict.fromkeys(fields["__annotations__"])
    config = type(f"{name}Config", (_WithSkips, stock_config), fields)
    body = {**here, "config_class": config}
    stock_base: Any = MODEL_MAPPING[stock_config]
    base = type(f"{name}Model", (_WithDropped, stock_base), body)
    model = type(f"{name}ForCausalLM", (_WithDropped, stock), body)
    for made in (config, base, model):
        globals()[made.__name__] = made
    if conversion_mapping is not None:  # experts have other names on disk
        names = conversion_mapping.get_checkpoint_conversion_mapping(family)
        if names is not None:
            conversion_mapping.register_checkpoint_conversion_mapping(
                PREFIX + family, names, overwrite=True
            )
    if __name__.startswith("prunelight."):  # an exported copy must not register these names
        AutoConfig.register(PREFIX + family, config)
        AutoModel.register(config, base)
        AutoModelForCausalLM.register(config, model)
    return model


class _Classes(dict[str, Any]):
    """Classes of causal language models by family, each made when it is first asked for."""

    def __missing__(self, family: str) -> Any:
        self[family] = _make(family)
        return self[family]


CLASSES = _Classes({family: _make(family) for family in FAMILIES})


def __getattr__(name: str) -> Any:
    """Return a class of a family that FAMILIES does not have, by name."""
    for family, stock in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        begin = f"Prunelight{stock.removesuffix('ForCausalLM')}"
        if name in (f"{begin}{kind}" for kind in ("Config", "Model", "ForCausalLM")):
            CLASSES[family]
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
