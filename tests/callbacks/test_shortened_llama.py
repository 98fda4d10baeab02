"""Shortened LLaMA: scores of single layers, against plain computations."""

import copy

import pytest
import torch
from lively_models import lively, nll_without
from tiny import tiny_model, token_windows

from prunelight.callbacks import ShortenedLlama

WINDOWS = token_windows(4, 16)


@pytest.fixture(scope="module")
def model():
    """Read-only: planning changes nothing."""
    return lively(tiny_model(num_hidden_layers=8))


def test_perplexity_scores_are_those_of_models_without_the_layer(model):
    plan = ShortenedLlama(num_layers=3).plan(model, WINDOWS)
    dense = nll_without(model, [], WINDOWS)
    expected = [nll_without(model, [i], WINDOWS) - dense for i in range(8)]
    assert plan.scores["perplexity"] == pytest.approx(expected, abs=1e-5)
    order = sorted(range(8), key=expected.__getitem__)
    assert list(plan.steps[0].layers) == sorted(order[:3])


@pytest.mark.parametrize("masked", [False, True])
def test_taylor_scores_are_those_of_one_plain_backward(model, masked):
    other = copy.deepcopy(model)
    labels, windows = WINDOWS.clone(), WINDOWS
    if masked:
        mask = torch.ones_like(WINDOWS)
        mask[0, 9:] = 0
        labels[mask == 0] = -100
        windows = {"input_ids": WINDOWS, "attention_mask": mask}
    logits = other(WINDOWS, attention_mask=windows["attention_mask"] if masked else None).logits
    torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    ).backward()
    expected = [
        sum((p * p.grad).abs().sum().item() for p in layer.parameters())
        for layer in other.model.layers
    ]
    plan = ShortenedLlama(num_layers=1, score="taylor", protected=[]).plan(model, windows)
    assert plan.scores["taylor"] == pytest.approx(expected, rel=1e-4)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_taylor_gives_back_gradients_and_what_is_trained(model):
    other = copy.deepcopy(model)
    frozen, trained = other.model.embed_tokens.weight, other.model.norm.weight
    frozen.requires_grad_(False)
    trained.grad = torch.ones_like(trained)
    layer = other.model.layers[0].mlp.up_proj.weight
    layer.requires_grad_(False)
    ShortenedLlama(num_layers=1, score="taylor", protected=[]).plan(other, WINDOWS)
    assert not frozen.requires_grad
    assert not layer.requires_grad
    assert torch.equal(trained.grad, torch.ones_like(trained))


def test_magnitude_needs_no_forward(model, monkeypatch):
    monkeypatch.setattr(type(model), "forward", None)
    plan = ShortenedLlama(num_layers=2, score="magnitude", protected=[0]).plan(model, WINDOWS)
    expected = [sum(p.abs().sum().item() for p in x.parameters()) for x in model.model.layers]
    assert plan.scores["magnitude"] == pytest.approx(expected, rel=1e-5)


def test_gradients_that_are_nan_are_named(model):
    broken = copy.deepcopy(model)
    broken.model.layers[3].mlp.down_proj.weight.data.fill_(3e38)
    broken.model.layers[3].post_attention_layernorm.weight.data.fill_(1e30)  # overflows
    with pytest.raises(ValueError, match="the gradient of .* is NaN or Inf"):
        ShortenedLlama(num_layers=1, score="taylor", protected=[]).plan(broken, WINDOWS)


def test_the_ends_are_spared_as_far_as_there_are_any(model):
    plan = ShortenedLlama(num_layers=2, score="magnitude").plan(model, WINDOWS)
    assert plan.steps[0].layers == (4, 5)
    with pytest.raises(ValueError, match="only 0 of 3 are not protected"):
        ShortenedLlama(num_layers=1, score="taylor").check(tiny_model(num_hidden_layers=3))
