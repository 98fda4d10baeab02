import math
import mmap
import sys
import time

import pytest
import torch
from tiny import tiny_model, token_windows

import prunelight
from prunelight.evaluation.perplexity import evaluate
from prunelight.evaluation.speed import (
    LatencyProtocol,
    forward_seconds,
    measure_latency,
    measure_speed,
)
from prunelight.evaluation.stages import measure_stage
from prunelight.losses import IGNORED_LABEL
from prunelight.models.families.layers import matrices
from prunelight.models.forward import greedy_tokens
from prunelight.models.sizes import linear_sparsity, parameter_bytes, parameter_count
from prunelight.runtime.devices import free_memory
from prunelight.runtime.measuring import measuring

CPU = torch.device("cpu")


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


# GPT-2 and OPT know 128 positions here, fewer than the usual prompt of 256 tokens.
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_speed_is_positive_also_for_short_contexts(family):
    speed = measure_speed(tiny_model(family), repeats=1)
    assert speed.prefill > 0
    assert speed.decode > 0


def test_a_stage_reports_what_the_single_functions_say():
    model, ids = tiny_model(), token_windows()
    stage, quality = measure_stage("dense", model, ids), evaluate(model, ids)
    assert (stage.name, stage.num_layers) == ("dense", 6)
    assert (stage.perplexity, stage.accuracy) == (quality.perplexity, quality.accuracy)
    assert (stage.parameters, stage.size_bytes) == (parameter_count(model), parameter_bytes(model))


# A tied head; Conv1D; fused experts; a family that is not in the table.
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gpt_neo"])
def test_a_stage_counts_the_zeros_of_decoder_linears_and_of_all_parameters(family):
    model = tiny_model(family, tie_word_embeddings=True)
    model.requires_grad_(False)
    before = sum(int((p == 0).sum()) for p in model.parameters())  # biases and paddings
    found = matrices(model).values()
    for matrix in found:
        matrix.parameter.view(-1)[::4] = 0.0
    weights = sum(matrix.parameter.numel() for matrix in found)
    stage = measure_stage("pruned", model, token_windows())
    assert stage.linear_sparsity == 0.25
    expected = (weights / 4 + before) / parameter_count(model)
    assert stage.sparsity == pytest.approx(expected, rel=1e-9)


def test_a_dense_model_has_no_zeros_in_its_linears():
    assert linear_sparsity(tiny_model()) == 0


def test_a_model_whose_linears_are_not_found_is_reported_without_their_zeros():
    model = tiny_model()
    model.config.model_type = "unheard of"
    model.extra = torch.nn.ModuleList([torch.nn.Identity()] * model.config.num_hidden_layers)
    assert linear_sparsity(model) == 0


def test_a_model_in_four_bits_is_reported_without_its_zeros():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = tiny_model(hidden_size=64)
    attention = model.model.layers[0].self_attn
    packed = bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4")
    packed.load_state_dict(attention.q_proj.state_dict())
    attention.q_proj = packed.to("cpu")
    assert packed.weight.dtype == torch.uint8
    attention.v_proj.weight.data.zero_()
    assert linear_sparsity(model) == 0
    stage = measure_stage("pruned", model, token_windows())
    assert (stage.sparsity, stage.linear_sparsity) == (0, 0)


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


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a phase is known on Linux only")
def test_a_phase_reports_its_time_and_the_memory_allocated_in_it():
    size = 64 * 2**20
    with measuring(CPU) as idle:
        pass
    with measuring(CPU) as busy:
        block = mmap.mmap(-1, size)  # fresh pages: the allocator may have free ones already
        torch.frombuffer(block, dtype=torch.uint8).fill_(1)
        time.sleep(0.05)
    assert busy.seconds >= 0.05 > idle.seconds
    assert busy.peak_bytes - idle.peak_bytes >= size - 2**20  # idle: what the process held anyway


def test_a_phase_that_fails_is_measured_too():
    with pytest.raises(RuntimeError, match="inside"), measuring(CPU) as phase:
        raise RuntimeError("inside")
    assert phase.peak_bytes > 0


def test_free_memory_is_what_this_machine_has():
    assert 0 < free_memory(CPU) < 2**50


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


@pytest.mark.real
def test_a_real_model_predicts_real_text_better_than_chance(smollm2):
    model, tokenizer = smollm2
    text = "The capital of France is Paris. Water boils at one hundred degrees Celsius."
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert 1 < prunelight.perplexity(model, ids) < 100


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
        ({"prompt": " "}, "latency.prompt='' must hold text"),
    ],
)
def test_a_bad_protocol_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LatencyProtocol(**arguments)
