"""Multiply-adds, weights read and bytes of the cache, counted on the model itself."""

import copy
from contextlib import suppress
from dataclasses import replace

import own_models
import pytest
import tiny
import torch
from tiny import NUM_LAYERS, tiny_model
from tiny_families import FAMILIES, tiny_family
from torch.utils.flop_counter import FlopCounterMode

from prunelight.evaluation.serving.shape import shape_cost
from prunelight.models.forward import evaluating, generate_tokens
from prunelight.models.sizes import parameter_count

TOKENS = 24
D, I, V = 32, 64, tiny.VOCABULARY  # noqa: E741

# Families whose own generation fails on a tiny model, and why.
NOT_GENERATING = {
    "blt": "its configuration has no number of layers",
    "xlstm": "its cells take other head widths than the tiny ones",
}

# Families that torch's counter does not count, or not in full, and why.
NOT_COUNTED = {
    "dbrx": "the counter follows gradients, and fails without them",
    "xlnet": "the counter follows gradients, and fails without them",
    "inkling2_text": "its eager attention is fused on a CPU too, which torch has no formula for",
}


def ids(tokens=TOKENS):
    return torch.arange(3, 3 + tokens)[None] % V


def counted_by_torch(model, new_tokens):
    """Multiply-adds of a generation, by torch's counter and with products written out."""
    plain = copy.deepcopy(model)
    for kind in ("attn", "experts"):
        with suppress(AttributeError, ValueError):
            getattr(plain, f"set_{kind}_implementation")("eager")
    with evaluating(plain), FlopCounterMode(display=False) as counter:
        generate_tokens(plain, ids(), new_tokens)
    return counter.get_total_flops() // 2


def check_against_torch(model):
    cost, first = shape_cost(model, prompt_tokens=TOKENS), counted_by_torch(model, 1)
    assert cost.prefill_multiply_adds == first
    assert cost.decode_multiply_adds == counted_by_torch(model, 2) - first
    assert 0 < cost.decode_decoder_multiply_adds <= cost.decode_multiply_adds


@pytest.mark.parametrize("family", [*tiny.FAMILIES, *tiny.UNKNOWN_FAMILIES])
def test_multiply_adds_are_those_that_torch_counts(family):
    check_against_torch(tiny_model(family))


@pytest.mark.sweep
@pytest.mark.parametrize("family", [x for x in FAMILIES if x not in NOT_GENERATING | NOT_COUNTED])
def test_multiply_adds_of_every_family_are_those_that_torch_counts(family):
    check_against_torch(tiny_family(family))


@pytest.mark.parametrize("family", NOT_COUNTED)
def test_a_family_that_torch_does_not_count_is_counted(family):
    cost = shape_cost(tiny_family(family), prompt_tokens=TOKENS)
    assert 0 < cost.decode_decoder_multiply_adds < cost.prefill_decoder_multiply_adds
    assert cost.cache_bytes > 0


@pytest.mark.parametrize(("kind", "family"), own_models.EVERY)
def test_multiply_adds_of_our_classes_are_those_that_torch_counts(kind, family):
    check_against_torch(own_models.own_model(kind, family))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_llama_costs_what_its_equations_say(kv_heads):
    cost = shape_cost(tiny_model(num_key_value_heads=kv_heads), prompt_tokens=TOKENS)
    kv_width = kv_heads * D // 4
    linears = NUM_LAYERS * (2 * D * D + 2 * D * kv_width + 3 * D * I)
    assert cost.prefill_decoder_multiply_adds == TOKENS * linears + NUM_LAYERS * 2 * TOKENS**2 * D
    assert cost.prefill_multiply_adds - cost.prefill_decoder_multiply_adds == D * V  # last token
    assert cost.decode_decoder_multiply_adds == linears + NUM_LAYERS * 2 * (TOKENS + 1) * D
    assert cost.cache_bytes_per_token == NUM_LAYERS * 2 * kv_width * 4
    assert cost.cache_bytes == TOKENS * cost.cache_bytes_per_token


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "mamba", "rwkv"])
@pytest.mark.parametrize("removed", [1, 3])
def test_removing_layers_removes_their_share_of_work_and_cache(family, removed):
    left = NUM_LAYERS - removed
    dense, small = (
        shape_cost(tiny_model(family, num_hidden_layers=n), prompt_tokens=TOKENS)
        for n in (NUM_LAYERS, left)
    )
    for name in (
        "prefill_decoder_multiply_adds",
        "decode_decoder_multiply_adds",
        "cache_bytes",
        "cache_bytes_per_token",
    ):
        assert NUM_LAYERS * getattr(small, name) == left * getattr(dense, name)
    assert small.prefill_decoder_multiply_adds > 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_half_the_neurons_take_half_the_multiply_adds_of_the_mlp(family):
    name = "n_inner" if family == "gpt2" else "intermediate_size"
    none, half, whole = (
        shape_cost(tiny_model(family, **{name: width}), prompt_tokens=TOKENS)
        for width in (8, 36, 64)
    )
    steps = (
        whole.decode_multiply_adds - half.decode_multiply_adds,
        half.decode_multiply_adds - none.decode_multiply_adds,
    )
    assert steps[0] == steps[1] == NUM_LAYERS * 28 * D * (2 if family == "gpt2" else 3)
    assert whole.cache_bytes == half.cache_bytes


def test_a_token_reads_the_experts_that_it_chooses_and_no_others():
    models = [tiny_model("mixtral", num_local_experts=n, num_experts_per_tok=2) for n in (4, 8)]
    few, many = (shape_cost(model, prompt_tokens=TOKENS) for model in models)
    expert = 3 * D * I
    routers = NUM_LAYERS * 4 * D
    assert many.parameters - few.parameters == NUM_LAYERS * 4 * expert + routers
    assert many.parameters_per_token - few.parameters_per_token == routers
    assert many.decode_multiply_adds - few.decode_multiply_adds == routers
    three = tiny_model("mixtral", num_local_experts=4, num_experts_per_tok=3)
    more = shape_cost(three, prompt_tokens=TOKENS)
    assert more.parameters == few.parameters
    assert more.parameters_per_token - few.parameters_per_token == NUM_LAYERS * expert


@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
def test_every_way_to_compute_experts_costs_the_same(experts):
    model = tiny_model("mixtral", num_local_experts=4)
    usual = shape_cost(model, prompt_tokens=TOKENS)
    model.set_experts_implementation(experts)
    assert shape_cost(model, prompt_tokens=TOKENS) == usual


@pytest.mark.parametrize("tied", [False, True])
def test_a_token_reads_one_row_of_the_embeddings_and_the_whole_head(tied):
    model = tiny_model(tie_word_embeddings=tied)
    cost = shape_cost(model, prompt_tokens=TOKENS)
    rotary = model.model.rotary_emb.inv_freq.numel()
    layers = parameter_count(model.model.layers) + parameter_count(model.model.norm)
    assert cost.parameters_per_token == layers + V * D + D + rotary
    assert cost.weight_bytes_per_token == 4 * cost.parameters_per_token
    assert cost.disk_bytes == 4 * cost.parameters
    assert cost.memory_bytes == 4 * (cost.parameters + 2 * rotary)  # and as they were first


def test_half_precision_halves_bytes_and_no_multiply_adds():
    full = shape_cost(tiny_model(), prompt_tokens=TOKENS)
    half = shape_cost(tiny_model(dtype=torch.bfloat16), prompt_tokens=TOKENS)
    assert half.decode_multiply_adds == full.decode_multiply_adds
    assert 2 * half.cache_bytes == full.cache_bytes
    assert 2 * half.disk_bytes == full.disk_bytes


def test_a_full_window_takes_no_more_bytes_with_the_next_token():
    long = shape_cost(tiny_model("mistral", sliding_window=8), prompt_tokens=TOKENS)
    short = shape_cost(tiny_model("mistral", sliding_window=8), prompt_tokens=4)
    assert long.cache_bytes_per_token == 0
    assert short.cache_bytes_per_token == NUM_LAYERS * 2 * 16 * 4
    assert long.cache_bytes == 7 * short.cache_bytes_per_token  # the next token is the eighth


@pytest.mark.parametrize("family", ["mamba", "mamba2", "rwkv"])
def test_a_state_does_not_grow(family):
    short, long = (shape_cost(tiny_model(family), prompt_tokens=n) for n in (8, 32))
    assert short.cache_bytes == long.cache_bytes > 0
    assert short.cache_bytes_per_token == 0


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "qwen3", "gpt2", "bloom"])
def test_the_cache_has_the_bytes_of_the_real_one(family):
    model = tiny_model(family)
    cost = shape_cost(model, prompt_tokens=TOKENS)
    with torch.no_grad():
        cache = model(ids(), use_cache=True).past_key_values
        before = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        model(ids(1), past_key_values=cache, use_cache=True)
        after = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert (cost.cache_bytes, cost.cache_bytes_per_token) == (before, after - before)


def test_multi_head_latent_attention_caches_what_its_class_keeps():
    model = tiny_family("deepseek_v3")
    cost = shape_cost(model, prompt_tokens=TOKENS)
    with torch.no_grad():
        cache = model(ids(), use_cache=True).past_key_values
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cost.cache_bytes == kept
    assert cost.cache_bytes_per_token == kept / TOKENS


def test_zeros_change_only_the_number_of_nonzeros():
    model = tiny_model()
    dense = shape_cost(model, prompt_tokens=TOKENS)
    model.model.layers[0].mlp.up_proj.weight.data[:16] = 0
    assert shape_cost(model, prompt_tokens=TOKENS) == replace(
        dense, nonzeros=dense.nonzeros - 16 * D
    )


def test_packed_weights_count_as_the_products_that_they_stand_for():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = tiny_model(hidden_size=64)
    usual = shape_cost(model, prompt_tokens=TOKENS)
    attention = model.model.layers[0].self_attn
    packed = bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4")
    packed.load_state_dict(attention.q_proj.state_dict())
    attention.q_proj = packed.to("cpu")
    cost = shape_cost(model, prompt_tokens=TOKENS)
    assert cost.prefill_multiply_adds == usual.prefill_multiply_adds
    assert cost.decode_multiply_adds == usual.decode_multiply_adds
    saved = 64 * 64 * 4 - 64 * 64 // 2
    assert cost.weight_bytes_per_token == usual.weight_bytes_per_token - saved
    assert cost.nonzeros is None


def test_counting_leaves_the_model_as_it_was():
    model = tiny_model().train()
    with torch.no_grad():
        before = model(ids()).logits
    state = {name: value.clone() for name, value in model.state_dict().items()}
    shape_cost(model, prompt_tokens=TOKENS)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(ids()).logits, before)


def test_the_usual_prompt_is_clipped_to_the_context():
    assert shape_cost(tiny_model()).prompt_tokens == 126
    assert shape_cost(tiny_model(max_position_embeddings=512)).prompt_tokens == 256


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (0, ValueError, "prompt_tokens=0 must be at least 1"),
        (127, ValueError, "seq_len=129 must be at most 128, which the model allows"),
        ("many", TypeError, "prompt_tokens='many' must be"),
    ],
)
def test_a_bad_length_is_refused(tokens, error, message):
    with pytest.raises(error, match=message):
        shape_cost(tiny_model(), prompt_tokens=tokens)
