"""Perplexity and accuracy of a model on windows."""

import math

import pytest
import torch
from tiny import COMMON, tiny_model, token_windows
from transformers import AutoConfig, AutoModelForCausalLM

import prunelight
from prunelight.evaluation.perplexity import evaluate
from prunelight.evaluation.speed import (
    forward_seconds,
)
from prunelight.evaluation.stages import measure_stage
from prunelight.losses import IGNORED_LABEL
from prunelight.models.forward import greedy_tokens
from prunelight.models.sizes import longest_sequence


@torch.no_grad()
def losses(model, ids):
    """Negative log-likelihood of every token but the first of each row, in float64."""
    log_probabilities = model(ids).logits[:, :-1].double().log_softmax(-1)
    return -log_probabilities.gather(-1, ids[:, 1:, None])[..., 0]


def padded(ids, count, side):
    pad, ones = ids.new_zeros(len(ids), count), torch.ones_like(ids)
    parts = [(ids, ones), (pad, pad)] if side == "right" else [(pad, pad), (ids, ones)]
    keys = ("input_ids", "attention_mask")
    return {
        key: torch.cat(tensors, dim=1)
        for key, tensors in zip(keys, zip(*parts, strict=True), strict=True)
    }


def test_perplexity_is_exp_of_the_mean_loss_over_all_windows():
    model, ids = tiny_model(), token_windows(5, 16)
    expected = math.exp(losses(model, ids).mean().item())
    assert prunelight.perplexity(model, ids) == pytest.approx(expected, rel=1e-6)  # float32 losses


def test_micro_batches_have_no_influence():
    model, ids = tiny_model(), token_windows(24, 100)  # three micro-batches of 1,024 tokens
    expected = math.exp(losses(model, ids).mean().item())
    assert prunelight.perplexity(model, ids) == pytest.approx(expected, rel=1e-6)  # float32 losses


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_has_no_influence(side):
    model, ids = tiny_model(), token_windows()
    plain, found = evaluate(model, ids), evaluate(model, padded(ids, 5, side))
    assert found.tokens == plain.tokens == 4 * 15
    # Another length, other kernels: float32 rounding through 6 layers.
    assert found.perplexity == pytest.approx(plain.perplexity, rel=1e-5)


def test_labels_are_used_where_they_are_given():
    model, ids = tiny_model(), token_windows()
    labels = ids.masked_fill(torch.arange(16) < 10, IGNORED_LABEL)
    found = evaluate(model, {"input_ids": ids, "labels": labels})
    assert found.tokens == 4 * 6
    expected = math.exp(losses(model, ids)[:, 9:].mean().item())
    assert found.perplexity == pytest.approx(expected, rel=1e-6)  # float32 losses


def test_accuracy_of_a_models_own_greedy_text_is_one():
    model = tiny_model()
    ids = greedy_tokens(model, token_windows(1, 4), 8)
    labels = ids.masked_fill(torch.arange(12) < 4, IGNORED_LABEL)
    assert evaluate(model, {"input_ids": ids, "labels": labels}).accuracy == 1


@pytest.mark.parametrize("windows", [torch.rand(2, 4), torch.ones(4, dtype=torch.long)])
def test_windows_that_are_no_token_ids_are_refused(windows):
    for function in (prunelight.perplexity, evaluate, forward_seconds):
        with pytest.raises(ValueError, match="must be token ids of shape"):
            function(tiny_model(), windows)


def test_measuring_leaves_the_model_as_it_was():
    model, ids = tiny_model().train(), token_windows()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.config.use_cache = True
    measure_stage("dense", model, ids)
    forward_seconds(model, ids)
    assert model.training
    assert model.config.use_cache is True
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


LEARNED = {
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt2": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 3]], "window_size": 8},
    "biogpt": {},
    "bert": {"is_decoder": True},
    "roberta": {"is_decoder": True},  # its first position comes after the padding's row
    "codegen": {"n_ctx": 128, "rotary_dim": 8},  # no table: its limit is of the config
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128, "expansion_ratio": 2},
}


@pytest.mark.parametrize("family", LEARNED)
def test_text_longer_than_learned_positions_is_refused(family):
    config = AutoConfig.for_model(family, **{**COMMON, **LEARNED[family]})
    model = AutoModelForCausalLM.from_config(config).eval()
    limit = longest_sequence(model)
    assert limit == (127 if family == "roberta" else 128)
    assert prunelight.perplexity(model, token_windows(1, limit)) > 1
    with pytest.raises(ValueError, match=f"seq_len={limit + 1} must be at most {limit}, which"):
        prunelight.perplexity(model, token_windows(1, limit + 1))


def test_rotary_positions_go_on_beyond_their_length():
    model = tiny_model(max_position_embeddings=16)
    assert prunelight.perplexity(model, token_windows(1, 24)) > 1


@pytest.mark.parametrize("token", [-1, 128])
def test_an_id_without_embedding_is_refused(token):
    windows = token_windows()
    windows[2, 3] = token
    with pytest.raises(ValueError, match=rf"token id {token} must lie in \[0, 127\]"):
        prunelight.perplexity(tiny_model(), windows)
