"""Tokens a second, and latency by a protocol."""

import time

import pytest
import torch
from tiny import tiny_model, token_windows

from prunelight.evaluation.speed import (
    Architecture,
    LatencyProtocol,
    compare_latency,
    forward_seconds,
    measure_latency,
    measure_speed,
)


# GPT-2 and OPT know 128 positions here, fewer than the usual prompt of 256 tokens.
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_speed_is_positive_also_for_short_contexts(family):
    speed = measure_speed(tiny_model(family), repeats=1)
    assert speed.prefill > 0
    assert speed.decode > 0


def test_forward_seconds_grow_with_the_number_of_windows():
    model, batches = tiny_model(), []

    def slow(module, args, kwargs):  # so that the machine's noise does not count
        batches.append(len(kwargs["input_ids"]))
        time.sleep(0.1)

    model.register_forward_pre_hook(slow, with_kwargs=True)
    few = forward_seconds(model, token_windows(64, 128))
    many = forward_seconds(model, token_windows(160, 128))
    # 16 windows a micro-batch: 4 and 10 of them, of which three run each time.
    assert batches == [16] * 6
    assert few >= 0.4
    assert many >= 1.0


def test_latency_is_measured_by_the_protocol(tiny_tokenizer, monkeypatch):
    lengths, model = [], tiny_model()
    plain = type(model).generate

    def generate(self, ids, **options):
        tokens = plain(self, ids, **options)
        lengths.append((*ids.shape, tokens.shape[1]))
        return tokens

    monkeypatch.setattr(type(model), "generate", generate)
    protocol = LatencyProtocol("w5 w6 w7", num_tokens=9, batch_size=2, num_warmup=2, num_runs=3)
    found = measure_latency(model, tiny_tokenizer, protocol)
    assert lengths == [(2, 3, 12)] * 5  # forced: an end of text does not stop it
    assert found.latency_seconds > 0
    assert found.latency_deviation >= 0
    assert found.throughput == pytest.approx(2 * 9 / found.latency_seconds)


def test_a_generation_longer_than_the_model_allows_is_refused(tiny_tokenizer):
    protocol = LatencyProtocol("w5", num_tokens=128)
    with pytest.raises(ValueError, match="seq_len=129 must be at most 128"):
        measure_latency(tiny_model(), tiny_tokenizer, protocol)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_tokens": 0}, "latency.num_tokens=0 must be at least 1"),
        ({"batch_size": 0}, "latency.batch_size=0 must be at least 1"),
        ({"num_warmup": -1}, "latency.num_warmup=-1 must be at least 0"),
        ({"num_runs": 1}, "latency.num_runs=1 must be at least 2"),
        ({"prompt": " "}, "latency.prompt=' ' must not be empty"),
    ],
)
def test_a_bad_protocol_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LatencyProtocol(**arguments)


def slowed(seconds):
    """Return a tiny model each of whose forwards takes so many seconds longer."""
    model = tiny_model()
    model.register_forward_pre_hook(lambda module, args: time.sleep(seconds))
    return model


def test_latency_is_compared_in_turn(tiny_tokenizer):
    protocol = LatencyProtocol("w5 w6", num_tokens=2, num_warmup=0, num_runs=5)
    latency, factor = compare_latency(slowed(0.03), slowed(0.15), tiny_tokenizer, protocol)
    assert latency.latency_seconds >= 2 * 0.03
    assert 0.15 < factor.median < 0.7


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "rwkv"])
def test_a_model_is_built_again_from_its_architecture_without_touching_random_numbers(family):
    model = tiny_model(family, dtype=torch.bfloat16)
    before = torch.get_rng_state()
    built = Architecture.of(model).build(torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)
    assert type(built) is type(model)
    shapes = [{n: (x.shape, x.dtype) for n, x in m.named_parameters()} for m in (model, built)]
    assert shapes[0] == shapes[1]
    assert measure_speed(built, repeats=1).decode > 0
