"""A stage of a run: quality, size and zeros of a model, told together."""

from dataclasses import replace

import pytest
import torch
from tiny import tiny_model, token_windows

from prunelight.evaluation.perplexity import evaluate
from prunelight.evaluation.speed import Architecture
from prunelight.evaluation.stages import Beside, measure_stage
from prunelight.models.families.matrices import dense_weights, matrices
from prunelight.models.sizes import linear_sparsity, parameter_bytes, parameter_count


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
    # Routers stay dense, and count as weights of the layers.
    dense = sum(model.get_parameter(name).numel() for name in dense_weights(model))
    assert stage.linear_sparsity == pytest.approx(weights / 4 / (weights + dense), rel=1e-9)
    assert (stage.linear_sparsity == 0.25) == (family != "mixtral")
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


def test_a_stage_beside_the_dense_model_has_its_clock_times_the_factor():
    dense, small = tiny_model(), tiny_model(num_hidden_layers=2)
    first = measure_stage("dense", dense, token_windows())
    assert first.factors == {}
    drifted = replace(first, prefill_tokens_per_second=1e9, decode_tokens_per_second=1e3)
    beside = Beside(drifted, Architecture.of(dense))
    stage = measure_stage("pruned", small, token_windows(), beside=beside)
    median, low, high = stage.factors["prefill_tokens_per_second"]
    assert low <= median <= high
    assert stage.prefill_tokens_per_second == pytest.approx(1e9 * median)
    # What has its shape is as fast.
    same = measure_stage("recovered", small, token_windows(), beside=beside, timed=stage)
    assert same.factors == stage.factors
    assert same.decode_tokens_per_second == stage.decode_tokens_per_second
