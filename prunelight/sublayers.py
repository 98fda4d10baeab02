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

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from prunelight.architecture import (
    ARCHITECTURES,
    REGISTERED_PREFIX,
    decoder_layers,
    is_sliced,
    layer_matrices,
    sublayers_of,
)

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
        _take_out(self)


def dropped(model: PreTrainedModel, name: str) -> set[int]:
    """Return the layers without "attention" or "mlp"; none for models of other classes."""
    flags = getattr(model.config, f"drop_{name}", None) or []
    return {index for index, flag in enumerate(flags) if flag}


def _take_out(model: PreTrainedModel) -> None:
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


def check_droppable(model: PreTrainedModel) -> None:
    """Raise TypeError if the family has no registered class, or weights are quantized or sliced."""
    if is_sliced(model):
        raise TypeError("this model is sliced: its sublayers cannot be dropped; drop, or slice")
    if not sublayers_of(model).droppable:
        raise TypeError(
            f"{model.config.model_type} has norms after its sublayers, which cannot be dropped "
            f"alone; families that can: {', '.join(sorted(CLASSES))}"
        )
    layer_matrices(model, 0)  # refuses quantized weights


def check_leading(
    model: PreTrainedModel, removed: Collection[int] = (), attention: Collection[int] = ()
) -> None:
    """Raise ValueError unless the first attention of each kind of layer stays: it leads the cache.

    Args:
        model: as it is now.
        removed: layers that are removed.
        attention: layers that lose their attention, beside those that have none.
    """
    gone = dropped(model, "attention") | set(attention)
    if leading := sorted(leading_attentions(model, removed) & gone):
        raise ValueError(
            f"attention={leading} must stay: it is the first that is left of its kind, and the "
            "cache counts its tokens there"
        )


def leading_attentions(model: PreTrainedModel, removed: Collection[int] = ()) -> set[int]:
    """Return the layers whose attention leads the cache: the first that is left of each kind."""
    total = model.config.num_hidden_layers
    kinds = getattr(model.config, "layer_types", None) or ["all"] * total
    left = [i for i in range(total) if i not in removed]
    return {next(i for i in left if kinds[i] == kinds[other]) for other in left}


def fixed_sublayers(model: PreTrainedModel, name: str) -> set[int]:
    """Return the layers whose "attention" or "mlp" cannot be dropped: gone, or leads the cache."""
    return dropped(model, name) | (leading_attentions(model) if name == "attention" else set())


@torch.no_grad()
def drop_sublayers(
    model: PreTrainedModel, attention: Collection[int], mlp: Collection[int]
) -> PreTrainedModel:
    """Drop sublayers in place; the model and its config become those of the registered class.

    Without layers the model stays what it is. Raises what `check_droppable` and `check_leading` do.
    """
    check_droppable(model)
    check_leading(model, attention=attention)
    if not (attention or mlp):
        return model
    config: Any = model.config
    for name, layers in zip(SUBLAYERS, (attention, mlp), strict=True):
        gone = dropped(model, name) | set(layers)
        setattr(config, f"drop_{name}", [i in gone for i in range(config.num_hidden_layers)])
    made: Any = CLASSES[config.model_type.removeprefix(REGISTERED_PREFIX)]
    config.__class__, config.model_type = made.config_class, made.config_class.model_type
    config.architectures = [made.__name__]
    model.__class__ = made
    _take_out(model)
    return model
