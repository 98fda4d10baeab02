"""Laws of MLPs that stand in for removed layers: `heal="mlp"`."""

import logging

import pytest
import torch
from tiny import tiny_model, token_windows

import prunelight
from prunelight.callbacks import SLEB, ShortenedLlama, ShortGPT
from prunelight.models.families.layers import decoder_layers
from prunelight.planning.steps import DropSublayers, Heal, RemoveLayers

WINDOWS = token_windows(128, 64)  # 8 micro-batches


def test_one_layer_of_each_run_stays_without_its_attention():
    plan = ShortGPT(layers=[1, 2, 4], heal="mlp").plan(tiny_model(), WINDOWS)
    assert plan.steps == (RemoveLayers((2,)), DropSublayers((1, 4)), Heal((1, 4), "layer"))


@pytest.mark.parametrize("method", [SLEB, ShortenedLlama])
def test_methods_that_search_leave_them_too(method):
    plan = method(num_layers=2, heal="mlp").plan(tiny_model(), WINDOWS[:8])
    without = method(num_layers=2).plan(tiny_model(), WINDOWS[:8])
    dropped = [step for step in plan.steps if isinstance(step, DropSublayers)]
    gone = {layer for step in plan.steps for layer in step.removed}
    assert gone | {*dropped[0].attention} == {*without.steps[0].layers}


def test_the_stand_in_alone_changes_and_does_what_the_run_did():
    dense = tiny_model()
    plan = ShortGPT(layers=[2, 3], heal="mlp").plan(dense, WINDOWS)
    outcomes = []
    model = prunelight.apply(tiny_model(), plan, WINDOWS, outcomes=outcomes)
    assert outcomes[-1]["epochs"][0] > 0
    assert outcomes[-1]["error_after"][0] < outcomes[-1]["error_before"][0]
    old = [layer for index, layer in enumerate(decoder_layers(dense)) if index != 3]
    for index, (mine, before) in enumerate(zip(decoder_layers(model), old, strict=True)):
        names = dict(mine.named_parameters())
        same = [torch.equal(names[name], dict(before.named_parameters())[name]) for name in names]
        assert any("attn" in name for name in names) == (index != 2)
        assert all(same) == (index != 2)


def test_the_result_reloads_and_generates(tmp_path, tiny_tokenizer):
    plan = ShortGPT(layers=[2, 3], heal="mlp").plan(tiny_model(), WINDOWS)
    model = prunelight.apply(tiny_model(), plan, WINDOWS)
    prunelight.save(model, tiny_tokenizer, tmp_path / "saved")
    loaded, _ = prunelight.load(tmp_path / "saved", dtype="float32")
    ids = WINDOWS[:2, :8]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    options = {"max_new_tokens": 6, "do_sample": False}
    cached = model.generate(ids, **options)
    assert torch.equal(cached, model.generate(ids, **options, use_cache=False))


def test_a_run_whose_attention_leads_the_cache_keeps_none(caplog):
    with caplog.at_level(logging.WARNING):
        plan = ShortGPT(layers=[0, 1, 4], heal="mlp").plan(tiny_model(), WINDOWS)
    assert plan.steps[:2] == (RemoveLayers((0, 1)), DropSublayers((4,)))
    assert "no MLP stands in for layers [0, 1]" in caplog.text


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        (ShortGPT, {"ratio": 0.5, "granularity": "mlp"}, "stand in for whole layers"),
        (ShortGPT, {"parameter_ratio": 0.2}, "give num_layers or ratio"),
        (ShortGPT, {"ratio": 0.5, "loads_in": ["vLLM"]}, "needs a stock class"),
        (ShortenedLlama, {"ratio": 0.5, "loads_in": ["vLLM"]}, "needs a stock class"),
    ],
)
def test_arguments_that_contradict_it_are_refused(method, arguments, message):
    with pytest.raises(ValueError, match=message):
        method(**arguments, heal="mlp")


def test_a_family_whose_attention_cannot_go_alone_is_refused_before_scores():
    with pytest.raises(TypeError, match="norms after its sublayers"):
        ShortGPT(num_layers=2, heal="mlp").check_calibration(tiny_model("gemma2"), WINDOWS)
