"""Decoder layers without attention or without MLP (LLM-Drop, arXiv:2406.15786), as models.

No stock config can say that a layer has no attention. So each family that supports it has a
registered class here, whose config lists what was dropped: after `import prunelight`,
`AutoModelForCausalLM.from_pretrained` loads it. A dropped sublayer keeps neither weights nor
its norm, computes nothing, and an attention takes no room in the cache. The first attention of each
kind of layer must stay: transformers counts the tokens of the cache there. Assisted generation
crops caches, which in transformers 5.23 fails on an empty one of a sliding window.
"""

# B sequences, T tokens, D hidden

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from prunelight.models.families.architectures import ARCHITECTURES, REGISTERED_PREFIX, sublayers_of
from prunelight.models.families.layers import decoder_layers

SUBLAYERS = ("attention", "mlp")


class DroppedSublayer(nn.Module):
    """Stands where an attention or MLP was: adds nothing to the hidden states."""

    def __init__(self, pair: bool) -> None:
        super().__init__()
        self.pair = pair  # attentions return their weights too

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return a zero, whatever the arguments."""
        zero = hidden_states.new_zeros(())
        return (zero, None) if self.pair else zero


class _WithDropped:
    """What the registered classes add to the class of their family."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # that of the family
        take_out(self)


def dropped(model: PreTrainedModel, name: str) -> set[int]:
    """Return the layers without "attention" or "mlp"; none for models of other classes."""
    flags = getattr(model.config, f"drop_{name}", None) or []
    return {index for index, flag in enumerate(flags) if flag}


def take_out(model: PreTrainedModel) -> None:
    """Take the sublayers that the config lists, and their norms, out of the model, in place."""
    names, layers = sublayers_of(model), decoder_layers(model)
    for name in SUBLAYERS:
        for index in dropped(model, name):
            stand_in = DroppedSublayer(name == "attention")
            setattr(layers[index], getattr(names, name), stand_in)
            setattr(layers[index], getattr(names, f"{name}_norm"), nn.Identity())


def _register() -> dict[str, type[PreTrainedModel]]:
    """Register a config and a model class for each family; returns the models by family."""
    classes = {}
    for family, entry in ARCHITECTURES.items():
        if entry.sublayers is None or not entry.sublayers.droppable:
            continue
        stock_config = CONFIG_MAPPING[family]
        stock: Any = MODEL_FOR_CAUSAL_LM_MAPPING[stock_config]
        name = stock.__name__.removesuffix("ForCausalLM")
        here, flags = {"__module__": __name__}, ("drop_attention", "drop_mlp")
        fields: dict[str, Any] = {**here, "model_type": REGISTERED_PREFIX + family}
        fields |= {"__annotations__": dict.fromkeys(flags, "list[bool] | None")}
        fields |= dict.fromkeys(flags)
        config = type(f"Prunelight{name}Config", (stock_config,), fields)
        body = {**here, "config_class": config}
        model = type(f"Prunelight{name}ForCausalLM", (_WithDropped, stock), body)
        globals()[config.__name__], globals()[model.__name__] = config, model
        AutoConfig.register(REGISTERED_PREFIX + family, config)
        AutoModelForCausalLM.register(config, model)
        classes[family] = model
    return classes


CLASSES = _register()
