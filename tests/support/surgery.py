"""Models before and after surgery: what they hold, and whether two are the same."""

import torch
from transformers import AutoModelForCausalLM

from prunelight.models.families.layers import decoder_layers
from prunelight.planning.fingerprints import describe_model
from prunelight.planning.plan import Plan
from prunelight.planning.steps import RemoveLayers


def plan_that_removes(model, *steps):
    return Plan(
        method="by hand",
        arguments={},
        model=describe_model(model),
        steps=tuple(RemoveLayers(layers) for layers in steps),
    )


def snapshot(model):
    """Return what must not change: config, weights, indices and the layers themselves."""
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return model.config.to_dict(), weights, layer_indices(model), list(decoder_layers(model))


def check_unchanged(model, before):
    config, weights, indices, layers = before
    assert model.config.to_dict() == config
    assert list(model.state_dict()) == list(weights)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert layer_indices(model) == indices
    assert all(now is then for now, then in zip(decoder_layers(model), layers, strict=True))


def check_equal(model, other):
    assert model.config.to_dict() == other.config.to_dict()
    weights = other.state_dict()
    assert set(model.state_dict()) == set(weights)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert layer_indices(model) == layer_indices(other)


def layer_indices(model):
    """Return the set of indices that each layer's modules hold for the cache."""
    return [
        {
            getattr(module, name)
            for module in layer.modules()
            for name in ("layer_idx", "layer_id")
            if hasattr(module, name)
        }
        for layer in decoder_layers(model)
    ]


def reloaded(model, directory):
    model.save_pretrained(directory)
    return AutoModelForCausalLM.from_pretrained(directory)
