"""The head in chunks: every family learns the same, and keeps its head as it was."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from runs import make_module
from tiny import FAMILIES, UNKNOWN_FAMILIES, VOCABULARY, tiny_model, token_windows

from prunelight.recovery.distillation.objective import Distillation, Objective


def loss_and_gradients(model, windows, *, chunked):
    model.requires_grad_(True).zero_grad()
    objective = Objective("lm", Distillation(), chunked=chunked)
    objective.start(model)
    loss = objective(model, {"input_ids": windows, "labels": windows})
    loss.backward()
    return loss.item(), [None if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("family", [*FAMILIES, *UNKNOWN_FAMILIES])
def test_every_family_learns_the_same_with_chunks(family, caplog):
    windows = token_windows(3, 14)
    model = tiny_model(family)
    chunked, ours = loss_and_gradients(model, windows, chunked=True)
    assert "no effect" not in caplog.text
    assert "forward" not in vars(model.get_output_embeddings()), "the head is as it was"
    whole, theirs = loss_and_gradients(model, windows, chunked=False)
    assert chunked == pytest.approx(whole, rel=1e-6)
    for name, ours_, theirs_ in zip(dict(model.named_parameters()), ours, theirs, strict=True):
        assert (ours_ is None) == (theirs_ is None), name
        if ours_ is not None:  # float32 sums in another order
            assert (ours_ - theirs_).norm() <= 1e-5 * theirs_.norm() + 1e-7, name


def test_a_scale_that_is_not_known_leads_to_whole_logits_and_a_warning(caplog):
    model = tiny_model()
    model.config.logits_scaling = 4.0  # the model does not do what its config says
    windows = token_windows(3, 14)
    found = loss_and_gradients(model, windows, chunked=True)
    assert "chunked_loss=True has no effect: the logits of llama" in caplog.text
    assert found[0] == loss_and_gradients(model, windows, chunked=False)[0]


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_with_lora_is_taken_in_chunks_too(tied, caplog):
    windows = token_windows(3, 14)
    found = []
    for chunked in (True, False):
        model = tiny_model(tie_word_embeddings=tied)
        torch.manual_seed(0)
        targets = ["lm_head", "q_proj"]
        adapted = get_peft_model(
            model,
            LoraConfig(task_type="CAUSAL_LM", target_modules=targets, init_lora_weights=False),
        )
        objective = Objective("lm", Distillation(), chunked=chunked)
        objective.start(adapted)
        loss = objective(adapted, {"input_ids": windows, "labels": windows})
        loss.backward()
        gradients = {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}
        assert any("lm_head" in name for name in gradients)
        found.append({"loss": loss.detach(), **gradients})
    assert "no effect" not in caplog.text
    for name, ours in found[0].items():
        torch.testing.assert_close(ours, found[1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_an_error_in_the_forward_leaves_the_head_as_it_was():
    model = tiny_model()
    objective = Objective("lm", Distillation())
    objective.start(model)
    windows = torch.full((1, 4), VOCABULARY)
    with pytest.raises(IndexError):
        objective(model, {"input_ids": windows, "labels": windows})
    assert "forward" not in vars(model.lm_head)


def test_the_module_takes_chunks_by_default_and_hands_the_choice_on():
    assert make_module("x").objective.chunked
    assert not make_module("x", chunked_loss=False).objective.chunked
