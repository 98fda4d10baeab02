"""Greedy generation with the cache."""

import pytest
import torch
from tiny import tiny_model, token_windows

from prunelight.models.forward import greedy_tokens


@pytest.mark.parametrize("family", ["llama", "mistral", "mamba"])
def test_greedy_generation_with_the_cache_equals_a_full_forward_each_step(family):
    model, ids = tiny_model(family), token_windows(2, 6)
    expected = ids
    with torch.no_grad():
        for _ in range(5):
            logits = model(expected, use_cache=False).logits
            # min_new_tokens forbids the end token until enough tokens are there.
            logits[:, -1, 2] = -torch.inf
            best = logits[:, -1].argmax(-1, keepdim=True)
            expected = torch.cat([expected, best], dim=1)
    assert torch.equal(greedy_tokens(model, ids, 5), expected)


def test_greedy_generation_is_deterministic_and_keeps_the_prompt():
    model, ids = tiny_model().train(), token_windows(2, 6)
    first, second = greedy_tokens(model, ids, 7), greedy_tokens(model, ids, 7)
    assert torch.equal(first, second)
    assert first.shape == (2, 13)
    assert torch.equal(first[:, :6], ids)
    assert model.training
