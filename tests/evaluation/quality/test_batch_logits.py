"""A streamed model's logits, whose layers walk many micro-batches at a time, are the model's own.

The CPU is asked for as cpu:0, which is another place than cpu: layers go there and come back.
"""

import copy
import logging

import pytest
import torch
from lively_models import between, lively_model, padded
from tiny import FAMILIES, tiny_model, token_windows

from prunelight.calibration import layer_walk
from prunelight.calibration.windows import micro_batches
from prunelight.evaluation.quality import batch_logits as module
from prunelight.evaluation.quality.batch_logits import batch_logits
from prunelight.models.families.layers import decoder_layers
from prunelight.models.placement import move_if_it_fits

WINDOWS = token_windows(11, 16)  # micro-batches of two windows: five, and one of one window
NO_TEXT = padded(WINDOWS)
NO_TEXT["attention_mask"][4:8] = 0  # a part of nothing but padding


def streamed(model):
    return move_if_it_fits(copy.deepcopy(model), torch.device("cpu:0"), offload=True)


def logits(model, windows, *, skipped=()):
    """Logits (N, T, V) of the windows whose micro-batch is not skipped, 0 on padding."""
    found, length = [], 20 if isinstance(windows, dict) else 16
    with batch_logits(model, windows, tokens=2 * length, label="text") as compute:
        for number, batch in enumerate(micro_batches(model, windows, tokens=2 * length)):
            if number not in skipped:
                mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
                found.append(compute(number, batch) * mask[..., None])
    return torch.cat(found)


@pytest.mark.parametrize("part", [20, 80, 65536])  # one micro-batch, two, all
@pytest.mark.parametrize(
    "windows", [WINDOWS, padded(WINDOWS, left=True), NO_TEXT], ids=["plain", "left", "no text"]
)
def test_they_are_those_of_the_model_on_its_device(windows, part, monkeypatch):
    monkeypatch.setattr(module, "PART_TOKENS", part)
    model = lively_model()
    assert torch.allclose(logits(streamed(model), windows), logits(model, windows), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_of_every_family(family):
    model = tiny_model(family)
    expected = logits(model, WINDOWS)
    # RWKV's states are not halved between layers: other rounding.
    assert torch.allclose(logits(streamed(model), WINDOWS), expected, 1e-3, 1e-3)


def test_without_a_warning_that_ids_look_like_padding(caplog):
    model = streamed(lively_model("gpt2"))
    model.config.pad_token_id = 0
    transformers = logging.getLogger("transformers")
    transformers.addHandler(caplog.handler)
    try:
        logits(model, WINDOWS.clamp_min(1))
    finally:
        transformers.removeHandler(caplog.handler)
    assert "padding" not in caplog.text


def test_with_states_that_the_device_has_no_room_for(monkeypatch):
    model = lively_model()
    monkeypatch.setattr(layer_walk, "free_memory", lambda _: 0)
    assert torch.allclose(logits(streamed(model), WINDOWS), logits(model, WINDOWS), atol=1e-5)


def test_where_some_micro_batches_are_not_asked_for(monkeypatch):
    monkeypatch.setattr(module, "PART_TOKENS", 64)  # two micro-batches
    model = lively_model()
    skipped = (0, 1, 2)  # the first of a part among them
    found, expected = (logits(x, WINDOWS, skipped=skipped) for x in (streamed(model), model))
    assert torch.allclose(found, expected, atol=1e-5)


def test_of_a_model_whose_layers_cannot_be_run_alone_which_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(module, "PART_TOKENS", 64)
    model = between(lively_model(), lambda x, _: (1.5 * x, None))
    found = logits(move_if_it_fits(model, torch.device("cpu:0"), offload=True), WINDOWS)
    assert caplog.text.count("each micro-batch brings all layers to the device") == 1
    assert torch.allclose(found, logits(model, WINDOWS), atol=1e-5)


def test_each_layer_is_called_once_for_a_micro_batch_and_all_is_as_before(monkeypatch):
    monkeypatch.setattr(module, "PART_TOKENS", 64)
    model = streamed(lively_model()).train()
    calls, mlp = [], decoder_layers(model)[3].mlp
    handle = mlp.register_forward_hook(lambda *_: calls.append(1))
    logits(model, WINDOWS)
    handle.remove()
    assert len(calls) == 6
    assert model.training
    assert {str(weight.device) for weight in model.parameters()} == {"cpu"}
