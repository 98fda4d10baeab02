"""Decoder layers of different widths, as models: query heads, key-value heads and MLP neurons.

Stock configs have one number of each for all layers. So each family that supports it has a
registered class here, whose config has one number a layer: `layer_attention_heads`,
`layer_key_value_heads` and `layer_intermediate_sizes`. Where such a list is None, the stock field
holds for all layers. Beside a list, the stock field says how wide the dense model was. A layer is
that of its family, built from a config of its own widths.

`biased_projections` names the projections that have a bias which the family's class does not give
them, as paths inside a decoder layer. Each layer has them.

transformers' `per_layer_config` says the same of widths, but the models of these families do not
read it. A config answers that question: transformers asks it for the sizes of caches. A saved
config.json states it too; the lists count, and a statement that differs from them is an error.

This file needs only torch and transformers: it is what `export_remote_code` puts beside a model.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
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

PREFIX = "prunelight_widths_"  # of the model_type

FAMILIES = tuple(  # whose classes are made at once; those of other families at their first use
    family
    for family in (
        *("gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "mixtral", "phi3"),
        *("qwen2", "qwen3", "qwen3_moe", "smollm3"),
    )
    if family in CONFIG_MAPPING
)

# List with a number for each layer -> field of the stock config.
LISTS = {
    "layer_attention_heads": "num_attention_heads",
    "layer_key_value_heads": "num_key_value_heads",
    "layer_intermediate_sizes": "intermediate_size",
}


BIASED = "biased_projections"  # paths inside a decoder layer, or None


class LayerConfig:
    """The config of a model as one decoder layer sees it: with the widths of that layer.

    All other fields are those of the model's config, also when they are set later.

    Args:
        config: of the model.
        widths: fields of the stock config -> their values in this layer.
    """

    def __init__(self, config: Any, widths: dict[str, int]) -> None:
        vars(self).update(_config=config, _widths=widths)

    def __getattr__(self, name: str) -> Any:
        """Return a width of the layer, or what the model's config has."""
        if name.startswith("__"):  # asked while a copy is made, before it has its attributes
            raise AttributeError(name)
        return self._widths[name] if name in self._widths else getattr(self._config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field of the model's config."""
        setattr(self._config, name, value)


class LayerConfigs(list[LayerConfig]):
    """The configs of all layers in order; a kind of layer instead of an index gives the model's."""

    def __init__(self, config: Any) -> None:
        layers = range(config.num_hidden_layers)
        super().__init__(LayerConfig(config, widths_of_layer(config, index)) for index in layers)
        self.config = config

    def __getitem__(self, index: Any) -> Any:
        """Return the config of one layer, or of a kind of layer, whose rotary embeddings ask it."""
        return self.config if isinstance(index, str) else super().__getitem__(index)


class _WithWidths:
    """What the registered config classes add to those of their family."""

    @property
    def per_layer_config(self) -> LayerConfigs:
        """The configs of the layers, which transformers asks for the shapes of a static cache."""
        return LayerConfigs(self)

    @per_layer_config.setter
    def per_layer_config(self, stated: dict[str, dict[str, Any]] | None) -> None:
        """Check that what config.json states is what the lists say; nothing is stored."""
        said = layer_settings(self)
        if stated is not None and {int(index): stated[index] for index in stated} != said:
            raise ValueError(
                f"per_layer_config={stated} differs from {', '.join(LISTS)}, which say {said}; "
                "change both, or delete per_layer_config"
            )


class _OfWidths:
    """What the registered model classes add to those of their family."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]  # that of the family
        for name in LISTS:
            numbers = getattr(config, name)
            if numbers is not None and len(numbers) != config.num_hidden_layers:
                raise ValueError(
                    f"{name} has {len(numbers)} numbers; {config.num_hidden_layers} decoder "
                    "layers need one each"
                )
        layers = layers_of(self)
        for index, layer in enumerate(layers):
            widths = widths_of_layer(config, index)
            layers[index] = type(layer)(LayerConfig(config, widths), index)
            for path in getattr(config, BIASED) or ():
                give_bias(layers[index].get_submodule(path))
        self.init_weights()  # of the layers just made


def give_bias(linear: Any) -> None:
    """Give a projection that has no bias one of zeros, in place."""
    if linear.bias is None:
        bias = linear.weight.new_zeros(linear.out_features)
        linear.bias = nn.Parameter(bias, linear.weight.requires_grad)


def widths_of_layer(config: Any, index: int) -> dict[str, int]:
    """Return the fields of the stock config that have values of their own in a layer."""
    lists = {field: getattr(config, name, None) for name, field in LISTS.items()}
    return {field: numbers[index] for field, numbers in lists.items() if numbers is not None}


def layer_settings(config: Any) -> dict[int, dict[str, Any]]:
    """Return the settings of the layers that differ from the config's, as transformers states them.

    Returns:
        layer -> field -> value, as in `per_layer_config`.
    """
    layers = range(config.num_hidden_layers)
    widths = {index: widths_of_layer(config, index) for index in layers}
    other = {
        index: {name: value for name, value in fields.items() if value != getattr(config, name)}
        for index, fields in widths.items()
    }
    return {index: fields for index, fields in other.items() if fields}


def layers_of(model: Any) -> nn.ModuleList:
    """Return the decoder layers of a model with the head, or without."""
    lists = (module for module in model.base_model.modules() if isinstance(module, nn.ModuleList))
    return next(x for x in lists if len(x) == model.config.num_hidden_layers)


def share_config(model: Any) -> None:
    """Let the modules of each decoder layer see the model's config, with their widths, in place."""
    for index, layer in enumerate(layers_of(model)):
        widths = widths_of_layer(model.config, index)
        config: Any = LayerConfig(model.config, widths) if widths else model.config
        for module in layer.modules():
            if "config" in vars(module):
                module.config = config


def _make(family: str) -> Any:
    """Make the classes of a family and return that of its causal language models."""
    stock_config = CONFIG_MAPPING[family]
    stock: Any = MODEL_FOR_CAUSAL_LM_MAPPING[stock_config]
    name = f"LayerWidths{stock.__name__.removesuffix('ForCausalLM')}"
    here = {"__module__": __name__}
    fields: dict[str, Any] = {**here, "model_type": PREFIX + family}
    fields |= dict.fromkeys((*LISTS, BIASED))
    fields["__annotations__"] = dict.fromkeys(LISTS, "list[int] | None")
    fields["__annotations__"] |= {BIASED: "list[str] | None"}
    config = type(f"{name}Config", (_WithWidths, stock_config), fields)
    body = {**here, "config_class": config}
    stock_base: Any = MODEL_MAPPING[stock_config]
    base = type(f"{name}Model", (_OfWidths, stock_base), body)
    model = type(f"{name}ForCausalLM", (_OfWidths, stock), body)
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
        begin = f"LayerWidths{stock.removesuffix('ForCausalLM')}"
        if name in (f"{begin}{kind}" for kind in ("Config", "Model", "ForCausalLM")):
            CLASSES[family]
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
