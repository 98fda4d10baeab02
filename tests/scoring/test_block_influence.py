"""Block Influence, and what holds for it and the angular distance alike."""

import copy
import math
import weakref

import pytest
import torch
from lively_models import hooks, lively_model, padded
from tiny import NUM_LAYERS, token_windows
from transformers import AutoConfig, AutoModelForCausalLM

from prunelight.calibration.shared_windows import MICRO_BATCH_TOKENS
from prunelight.calibration.statistics import MeanCosine
from prunelight.models.families.layers import decoder_layers
from prunelight.scoring.angular_distance import angular_distances
from prunelight.scoring.block_influence import block_influence, block_influences

WINDOWS = token_windows(4, 16)
PADDING = 4
SCORES = {
    "block_influence": lambda model, windows: block_influences(model, windows).mean,
    "angular": lambda model, windows: angular_distances(model, windows, 2),
}
every_score = pytest.mark.parametrize("score", SCORES.values(), ids=list(SCORES))


@pytest.fixture(scope="module")
def model():
    """Read-only: scoring changes nothing (end_to_end/test_families.py)."""
    return lively_model()


def random_states(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def put_in_place(layer, function):
    """Make a decoder layer compute another function of its hidden states."""
    layer.forward = lambda hidden_states, **_: function(hidden_states)


# --- Block Influence of two tensors -----------------------------------------------------------


@pytest.mark.parametrize(("factor", "score"), [(1, 0), (3, 0), (0.01, 0), (-1, 2), (-7, 2)])
def test_rescaling_scores_zero_and_negation_two(factor, score):
    states = random_states(50, 32)
    # The cosine of parallel vectors is 1 up to float32.
    assert block_influence(states, factor * states).item() == pytest.approx(score, abs=1e-6)


def test_orthogonal_states_score_one():
    x, y = torch.eye(8)[:4], torch.eye(8)[4:]
    assert block_influence(x, y).item() == 1


def test_block_influence_does_not_depend_on_the_norms_of_tokens():
    x, y = random_states(50, 32), random_states(50, 32, seed=1)
    scale = torch.logspace(-3, 3, 50)[:, None]
    expected = block_influence(x, y).item()
    assert block_influence(scale * x, y.flip(0).flip(0) / scale).item() == pytest.approx(
        expected, abs=1e-6
    )


def test_block_influence_is_computed_in_float32():
    states = torch.full((4, 64), 300.0, dtype=torch.float16)  # its square overflows float16
    score = block_influence(states, states)
    assert score.dtype == torch.float32
    assert score.item() == pytest.approx(0, abs=1e-6)


def test_states_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"inputs \(4, 8\) and outputs \(5, 8\) must have one"):
        block_influence(torch.ones(4, 8), torch.ones(5, 8))


# --- the accumulator --------------------------------------------------------------------------


def test_the_mean_cosine_in_parts_is_that_of_the_whole():
    x, y = random_states(6, 10, 8), random_states(6, 10, 8, seed=1)
    mask = random_states(6, 10, seed=2) > 0
    whole, parts = MeanCosine(), MeanCosine()
    whole.update(x, y, mask, None)
    for start in range(0, 6, 2):
        part = slice(start, start + 2)
        parts.update(x[part], y[part], mask[part], None)
    whole.settle()
    parts.settle()
    assert parts.count == whole.count == mask.sum()
    # Sums in float64, in another order.
    assert parts.result() == pytest.approx(whole.result(), abs=1e-12)
    assert parts.first_result() == pytest.approx(whole.first_result(), abs=1e-12)
    assert whole.result() == pytest.approx(1 - block_influence(x[mask], y[mask]).item(), abs=1e-6)


def test_massive_activations_do_not_overflow_a_half_precision_model():
    states = torch.full((1, 2, 64), 30_000.0, dtype=torch.float16)
    mean = MeanCosine()
    mean.update(states, states, None, None)
    assert mean.result() == pytest.approx(1, abs=1e-6)


def test_a_mean_over_no_tokens_is_refused():
    with pytest.raises(ValueError, match="0 tokens were counted; ignore fewer tokens"):
        MeanCosine().result()


# --- scores of a model ------------------------------------------------------------------------


@pytest.mark.parametrize(("factor", "influence"), [(3, 0), (-2, 2)])
def test_a_layer_that_only_rescales_or_negates_is_recognised(factor, influence):
    model = lively_model()
    put_in_place(decoder_layers(model)[3], lambda hidden_states: factor * hidden_states)
    scores = block_influences(model, WINDOWS)
    assert scores.mean[3] == pytest.approx(influence, abs=1e-6)
    assert scores.first_token[3] == pytest.approx(influence, abs=1e-6)
    assert all(0.01 < s < 1.9 for i, s in enumerate(scores.mean) if i != 3)
    assert angular_distances(model, WINDOWS, 1)[3] == pytest.approx(influence / 2, abs=1e-6)


def test_the_last_layer_is_scored_before_the_final_norm():
    model = lively_model()
    put_in_place(decoder_layers(model)[-1], lambda hidden_states: hidden_states)
    with torch.no_grad():
        model.model.norm.weight.copy_(torch.linspace(-2, 2, 32))
    assert block_influences(model, WINDOWS).mean[-1] == pytest.approx(0, abs=1e-6)
    assert angular_distances(model, WINDOWS, 1)[-1] == 0


@every_score
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_padding_changes_no_score(model, score, left):
    # A mask changes the kernel and padding on the left the positions, of which only the
    # differences matter to rotary embeddings: equal up to rounding.
    found = score(model, padded(WINDOWS, left=left))
    assert found == pytest.approx(score(model, WINDOWS), abs=1e-5)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_the_first_token_is_found_behind_padding(model, left):
    found = block_influences(model, padded(WINDOWS, left=left)).first_token
    expected = block_influences(model, WINDOWS).first_token
    assert found == pytest.approx(expected, abs=1e-5)


@every_score
def test_what_stands_in_the_padding_does_not_matter(model, score):
    windows = padded(WINDOWS)
    other = {**windows, "input_ids": windows["input_ids"].clone()}
    other["input_ids"][:, -PADDING:] = token_windows(4, PADDING, seed=5)
    assert score(model, other) == score(model, windows)


@every_score
def test_a_mask_of_ones_is_no_mask(model, score):
    masked = {"input_ids": WINDOWS, "attention_mask": torch.ones_like(WINDOWS)}
    assert score(model, masked) == score(model, {"input_ids": WINDOWS}) == score(model, WINDOWS)


@every_score
def test_a_sequence_that_is_all_padding_does_not_count(model, score):
    windows = padded(WINDOWS)
    windows["attention_mask"][1] = 0
    without = {name: values[[0, 2, 3]] for name, values in windows.items()}
    assert score(model, windows) == pytest.approx(score(model, without), abs=1e-6)


@every_score
def test_windows_without_any_token_are_refused(model, score):
    empty = {"input_ids": WINDOWS, "attention_mask": torch.zeros_like(WINDOWS)}
    with pytest.raises(ValueError, match="0 tokens were counted"):
        score(model, empty)


def test_ignoring_every_token_is_refused(model):
    with pytest.raises(ValueError, match="0 tokens were counted; ignore fewer tokens"):
        block_influences(model, WINDOWS, ignore_first_tokens=16)


@pytest.mark.parametrize("windows", [WINDOWS, padded(WINDOWS, left=True)], ids=["plain", "padded"])
def test_the_first_and_the_other_tokens_make_up_the_mean(model, windows):
    every = block_influences(model, windows)
    others = block_influences(model, windows, ignore_first_tokens=1)
    length = WINDOWS.shape[1]
    for mean, first, rest in zip(every.mean, every.first_token, others.mean, strict=True):
        # The same cosines in float64 sums.
        assert length * mean == pytest.approx(first + (length - 1) * rest, abs=1e-9)
    assert others.first_token == every.first_token
    assert others.mean != every.mean


def test_ignored_tokens_still_take_part_in_the_forward(model):
    ignored = block_influences(model, WINDOWS, ignore_first_tokens=4).mean
    cut = block_influences(model, WINDOWS[:, 4:]).mean
    assert ignored != pytest.approx(cut, abs=1e-4)


@every_score
def test_scores_do_not_depend_on_the_order_of_windows(model, score):
    assert score(model, WINDOWS.flip(0)) == pytest.approx(score(model, WINDOWS), abs=1e-6)


@every_score
def test_scores_do_not_depend_on_the_micro_batches(model, score):
    windows = token_windows(22, 100)
    assert windows.numel() > MICRO_BATCH_TOKENS  # two micro-batches, the second one smaller
    alone = torch.tensor([score(model, window[None]) for window in windows])
    assert score(model, windows) == pytest.approx(alone.mean(dim=0).tolist(), abs=1e-6)


def test_sequences_weigh_by_their_tokens(model):
    windows = padded(WINDOWS[:2])
    windows["attention_mask"][0, 1:] = 0  # 1 and 16 tokens
    short, long = block_influences(model, WINDOWS[:1, :1]), block_influences(model, WINDOWS[1:2])
    found = block_influences(model, windows)
    expected = [(a + 16 * b) / 17 for a, b in zip(short.mean, long.mean, strict=True)]
    firsts = [(a + b) / 2 for a, b in zip(short.first_token, long.first_token, strict=True)]
    assert found.mean == pytest.approx(expected, abs=1e-5)  # a mask changes the kernel
    assert found.first_token == pytest.approx(firsts, abs=1e-5)


@every_score
def test_a_bfloat16_model_scores_like_the_float32_one(model, score):
    half = lively_model(dtype=torch.bfloat16)
    # bfloat16 has 8 bits: each state is off by up to 0.4 %, over six layers.
    assert score(half, WINDOWS) == pytest.approx(score(model, WINDOWS), abs=0.02)


# --- faults -----------------------------------------------------------------------------------


@every_score
@pytest.mark.parametrize(("value", "name"), [(math.nan, "NaN"), (math.inf, "Inf")])
def test_the_layer_that_makes_nan_or_inf_is_named(score, value, name):
    model = lively_model()
    with torch.no_grad():
        decoder_layers(model)[2].mlp.down_proj.weight[0, 0] = value
    message = rf"{name} in the hidden states after decoder layer 2 \(dtype torch.float32\); load"
    with pytest.raises(ValueError, match=message):
        score(model, WINDOWS)


@every_score
@pytest.mark.parametrize("fails", [False, True], ids=["success", "error"])
@pytest.mark.parametrize("family", ["llama", "rwkv"])
def test_modes_cache_hooks_and_weights_are_restored(score, fails, family):
    model = lively_model(family).train()
    decoder_layers(model)[1].eval()
    model.config.use_cache = True
    if fails:
        with torch.no_grad():
            next(p for p in decoder_layers(model)[4].parameters() if p.ndim == 2)[0, 0] = math.nan
    weights = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    if fails:
        with pytest.raises(ValueError, match="NaN in the hidden states after decoder layer 4"):
            score(model, WINDOWS)
    else:
        score(model, WINDOWS)
    assert [module.training for module in model.modules()] == modes
    assert model.config.use_cache is True
    assert hooks(model) == [0] * len(hooks(model))
    assert torch.is_grad_enabled()
    after = model.state_dict()
    assert all(torch.equal(after[n].nan_to_num(), weights[n].nan_to_num()) for n in weights)


def test_a_config_without_a_cache_stays_without():
    config = AutoConfig.for_model("openai-gpt", vocab_size=128, n_embd=16, n_layer=3, n_head=2)
    model = AutoModelForCausalLM.from_config(config)
    before = config.to_dict()
    assert "use_cache" not in before
    assert len(block_influences(model, WINDOWS).mean) == 3
    assert model.config.to_dict() == before


@every_score
def test_dropout_is_off_while_scoring(score):
    model = lively_model("gpt2").train()  # its dropout is 0.1
    assert score(model, WINDOWS) == score(model.eval(), WINDOWS)


@every_score
def test_at_most_two_hidden_states_are_alive_at_a_time(score):
    model, states, alive = lively_model(), [], []

    def count(_, inputs, output):
        states.append(weakref.ref(output))
        alive.append(sum(state() is not None for state in states))

    for layer in decoder_layers(model):
        layer.register_forward_hook(count)
    score(model, WINDOWS)
    assert len(alive) == NUM_LAYERS
    assert max(alive) <= 2  # input and output of one layer


@every_score
def test_the_head_is_not_run(score):
    model, calls = lively_model(), []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    score(model, WINDOWS)
    assert calls == []
