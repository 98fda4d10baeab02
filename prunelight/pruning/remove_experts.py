"""Removes experts of mixture-of-experts layers in place; the result is a stock model.

The stacks of experts lose entries, and the router the same rows, of its bias or correction too. A
router that normalizes before it picks gives the experts left larger gates. Which tensors are cut,
and along which dimension, is read off the config, see `models/families/experts/layout.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunelight.models.families.config_fields import decoder_config
from prunelight.models.families.experts.layout import Experts, config_with, experts_of
from prunelight.models.families.layers import decoder_layers, layers_path
from prunelight.models.families.outline import is_shape, outline
from prunelight.planning.steps import RemoveExperts
from prunelight.pruning.step_kind import StepContext, StepKind


def check_experts(
    model: PreTrainedModel, step: RemoveExperts, removed: Collection[int] = ()
) -> Experts:
    """Check a step against a model; return the experts of the model.

    Args:
        model: with all layers that the step's plan counts.
        step: which experts go.
        removed: layers that earlier steps of the plan remove.

    Raises:
        ValueError: if an expert does not exist, fewer are left than a token takes, groups would
            lose unequal numbers, or a layer with experts that is left is not named.
        TypeError: if the model has no experts that can be removed, see `experts_of`.
    """
    experts = experts_of(model)
    left = [layer for layer in experts.layers if layer not in removed]
    differing = sorted({*step.named} ^ {*left})
    if differing:
        without = sorted({*step.named} - {*left})
        why = f"layers {without} have none" if without else f"see layers {differing}"
        raise ValueError(f"experts must name each layer that is left and has experts; {why}")
    for layer, gone in step.experts.items():
        experts.check_removed(int(layer), gone)
    return experts


@torch.no_grad()
def remove_experts(model: PreTrainedModel, removed: Mapping[int, Collection[int]]) -> None:
    """Remove experts of decoder layers in place, with their part of the router, and cut the config.

    Args:
        model: with stacked experts.
        removed: decoder layer, as the model counts it now -> experts that go.

    Raises:
        ValueError: see `check_experts`.
        TypeError: see `experts_of`.
    """
    step = RemoveExperts({str(layer): tuple(gone) for layer, gone in removed.items()})
    step.check(len(decoder_layers(model)))
    experts, layers = check_experts(model, step), decoder_layers(model)
    if not step.num_experts:
        return
    for layer, tensors in experts.tensors.items():
        gone = set(removed[layer])
        kept = torch.tensor([expert for expert in range(experts.count) if expert not in gone])
        for name, dim in tensors.items():
            path, _, own = name.rpartition(".")
            _cut(layers[layer].get_submodule(path), own, dim, kept)
    _describe(model, experts, experts.count - step.num_experts)


def _cut(module: nn.Module, name: str, dim: int, kept: Tensor) -> None:
    """Keep some entries of a parameter or buffer along a dimension, in place."""
    stored: Any = getattr(module, name)
    cut = stored.detach().index_select(dim, kept.to(stored.device))
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(cut, stored.requires_grad)
    else:
        module._buffers[name] = cut


def _describe(model: PreTrainedModel, experts: Experts, count: int) -> None:
    """Write the number of experts into the config, and into all modules that keep it."""
    path = layers_path(model)
    dense = outline(type(model), model.config, path)
    fewer = outline(type(model), config_with(model.config, experts.config_field, count), path)
    places: list[tuple[nn.Module, Any, Any]] = [(model, dense.rest, fewer.rest)]
    places += zip(decoder_layers(model), dense.layers, fewer.layers, strict=True)
    for root, before, after in places:
        for name, value in after.items():
            if value != before.get(name, value) and not is_shape(value):
                module_path, _, attribute = name.rpartition(".")
                module = root.get_submodule(module_path)
                if attribute in vars(module):
                    setattr(module, attribute, value)
    setattr(decoder_config(model.config), experts.config_field, count)


def _check(model: PreTrainedModel, step: RemoveExperts, context: StepContext) -> None:
    if any(isinstance(earlier, RemoveExperts) for earlier in context.earlier):
        raise ValueError("remove experts once in a plan, so that their numbers stay clear")
    check_experts(model, step, context.removed)


def _carry_out(model: PreTrainedModel, step: RemoveExperts, context: StepContext) -> None:
    layers = context.renumber(step.named)
    remove_experts(model, dict(zip(layers, step.experts.values(), strict=True)))


REMOVE_EXPERTS = StepKind(_check, _carry_out)
