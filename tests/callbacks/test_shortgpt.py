"""ShortGPT's decisions: which layers a plan removes, and what is refused."""

import copy
from itertools import pairwise

import pytest
import torch
from tiny import NUM_LAYERS, VOCABULARY, tiny_model, token_windows

import prunelight
from prunelight.callbacks import ShortGPT
from prunelight.models.families.layers import decoder_layers
from prunelight.models.sizes import depth_unit_sizes, parameter_count
from prunelight.planning.fingerprints import describe_model, describe_windows
from prunelight.planning.steps import RemoveLayers

WINDOWS = token_windows()


def shuffled_model():
    """A llama whose layers differ, so that the least important ones are not simply the last."""
    model = tiny_model()
    with torch.no_grad():
        factors = (4, 1, 6, 0.5, 5, 2)
        for layer, factor in zip(decoder_layers(model), factors, strict=True):
            for parameter in layer.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(factor)
    return model


@pytest.fixture(scope="module")
def model():
    """Read-only: planning changes nothing (end_to_end/test_families.py)."""
    return shuffled_model()


def removed(plan):
    (step,) = plan.steps
    assert isinstance(step, RemoveLayers)
    return list(step.layers)


def layer_by_layer(model):
    """Return the state before layer 0 and after every layer, by calling the layers ourselves."""
    hidden_states = model.model.embed_tokens(WINDOWS)
    positions = torch.arange(WINDOWS.shape[1])[None]
    rotary = model.model.rotary_emb(hidden_states, positions)
    states = [hidden_states]
    with torch.no_grad():
        for layer in model.model.layers:
            states.append(layer(states[-1], position_embeddings=rotary, attention_mask=None))
    return [state.double() for state in states]


def cosine(x, y):
    return (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))


def test_the_removed_layers_are_those_of_a_plain_computation(model):
    states = layer_by_layer(model)
    scores = [1 - cosine(x, y).mean().item() for x, y in pairwise(states)]
    order = sorted(range(NUM_LAYERS), key=scores.__getitem__)
    assert sorted(order[:3]) != [3, 4, 5]  # the choice is not trivial
    for count in range(NUM_LAYERS):
        plan = ShortGPT(num_layers=count).plan(model, WINDOWS)
        assert removed(plan) == sorted(order[:count])
        assert plan.scores["block_influence"] == pytest.approx(scores, abs=1e-6)


def test_the_angular_window_is_that_of_a_plain_computation(model):
    states = layer_by_layer(model)
    for count in range(1, NUM_LAYERS):
        angles = [
            cosine(states[i][:, -1], states[i + count][:, -1]).arccos().mean().item() / torch.pi
            for i in range(NUM_LAYERS - count + 1)
        ]
        start = angles.index(min(angles))
        plan = ShortGPT(num_layers=count, score="angular").plan(model, WINDOWS)
        assert removed(plan) == list(range(start, start + count))
        assert plan.scores["angular_distance"] == pytest.approx(angles, abs=1e-6)


def test_relative_magnitude_is_that_of_a_plain_computation(model):
    states = layer_by_layer(model)
    for ignored in (0, 3):
        scores = [
            ((y - x).norm(dim=-1) / y.norm(dim=-1))[:, ignored:].mean().item()
            for x, y in pairwise(states)
        ]
        method = ShortGPT(num_layers=3, score="relative_magnitude", ignore_first_tokens=ignored)
        plan = method.plan(model, WINDOWS)
        assert plan.scores["relative_magnitude"] == pytest.approx(scores, rel=1e-5)
        assert removed(plan) == sorted(sorted(range(NUM_LAYERS), key=scores.__getitem__)[:3])


def test_the_shallowest_layers_go_first_in_sequence_and_the_deepest_in_reverse(model):
    for count in range(NUM_LAYERS):
        plans = [
            ShortGPT(num_layers=count, score=score).plan(model, WINDOWS)
            for score in ("sequential", "reverse")
        ]
        assert removed(plans[0]) == list(range(count))
        assert removed(plans[1]) == list(range(NUM_LAYERS - count, NUM_LAYERS))


def test_random_layers_are_those_of_the_seed_alone(model):
    choices = [
        [
            removed(ShortGPT(num_layers=count, score="random", seed=seed).plan(model, windows))
            for count in range(NUM_LAYERS)
            for windows in (WINDOWS, WINDOWS.flip(1))
        ]
        for seed in (0, 0, 1, 2)
    ]
    assert choices[0] == choices[1]
    assert len({str(choice) for choice in choices}) == 3
    for few, more in pairwise(choices[0]):
        assert set(few) <= set(more)  # the larger choice goes on with the smaller one


@pytest.mark.parametrize("score", ["sequential", "reverse", "random"])
def test_a_score_without_data_says_so_in_the_plan(model, score):
    seed = {"seed": 3} if score == "random" else {}
    plan = ShortGPT(num_layers=2, score=score, **seed).plan(model, WINDOWS)
    assert plan.found == {"calibration_used": False}
    assert set(plan.scores) == {score}
    assert ShortGPT(**plan.arguments).plan(model, WINDOWS) == plan
    assert "calibration_used" not in ShortGPT(num_layers=2).plan(model, WINDOWS).found


@pytest.mark.parametrize("score", ["relative_magnitude", "sequential", "reverse", "random"])
def test_every_score_keeps_protected_layers_and_the_pattern_of_an_engine(score):
    seed = {"seed": 0} if score == "random" else {}
    model = tiny_model("smollm3", num_hidden_layers=8)  # llama.cpp: every fourth layer has no RoPE
    method = ShortGPT(num_layers=4, score=score, protected=[0, -1], loads_in=["llama.cpp"], **seed)
    gone = removed(method.plan(model, WINDOWS))
    assert not {0, 7} & set(gone)
    assert [model.config.no_rope_layers[i] for i in range(8) if i not in gone] == [1, 1, 1, 0]


def test_layers_by_hand_are_removed_and_nothing_is_scored(model):
    plan = ShortGPT(layers=[-1, 2]).plan(model, WINDOWS)
    assert removed(plan) == [2, 5]
    assert (plan.scores, plan.found) == ({}, {"calibration_used": False})
    assert removed(ShortGPT(layers=[]).plan(model, WINDOWS)) == []
    by_score = ShortGPT(num_layers=3).plan(model, WINDOWS)
    assert ShortGPT(layers=removed(by_score)).plan(model, WINDOWS).steps == by_score.steps
    assert ShortGPT(layers=[-1, 2]).layers_left(NUM_LAYERS) == 4


@pytest.mark.parametrize("name", ["attention", "mlp"])
def test_sublayers_by_hand_are_dropped(model, name):
    (step,) = ShortGPT(layers=[-1, 2], granularity=name).plan(model, WINDOWS).steps
    assert step.dropped_sublayers[name] == (2, 5)
    assert sum(map(len, step.dropped_sublayers.values())) == 2


def test_layers_by_hand_that_an_engine_needs_are_refused():
    model = tiny_model("smollm3", num_hidden_layers=8)
    method = ShortGPT(layers=[3], loads_in=["llama.cpp"])
    with pytest.raises(ValueError, match="llama.cpp"):
        method.check(model)
    ShortGPT(layers=[0, 1, 2, 3], loads_in=["llama.cpp"]).check(model)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("granularity", ["layer", "attention", "mlp"])
def test_a_share_of_all_parameters_is_met_to_half_a_layer(granularity, tied):
    model = tiny_model(tie_word_embeddings=tied)
    before = parameter_count(model)
    unit = max(depth_unit_sizes(model, granularity)) / before
    for share in (0.0, 0.05, 0.12, 0.2):
        method = ShortGPT(parameter_ratio=share, granularity=granularity)
        plan = method.plan(model, WINDOWS)
        pruned = prunelight.apply(copy.deepcopy(model), plan, WINDOWS)
        # A sublayer takes the norm before it along, which is not counted.
        norms = 0 if granularity == "layer" else NUM_LAYERS * 32 / before
        assert abs(1 - parameter_count(pruned) / before - share) <= unit / 2 + norms


def test_a_share_of_parameters_is_smaller_than_that_of_layers(model):
    by_layers = removed(ShortGPT(ratio=0.4).plan(model, WINDOWS))
    by_parameters = removed(ShortGPT(parameter_ratio=0.4).plan(model, WINDOWS))
    assert len(by_parameters) > len(by_layers)  # embeddings stay
    assert ShortGPT(parameter_ratio=0.5).layers_left(NUM_LAYERS) == NUM_LAYERS


def test_a_share_that_removes_nothing_warns(model, caplog):
    ShortGPT(parameter_ratio=0.001).check(model)
    assert "parameter_ratio=0.001 removes none of 6 decoder layers" in caplog.text


def test_ratio_and_num_layers_make_the_same_decision(model):
    by_ratio, by_number = (
        ShortGPT(**arguments).plan(model, WINDOWS)
        for arguments in ({"ratio": 0.33}, {"num_layers": 2})
    )
    assert by_ratio.steps == by_number.steps
    assert by_ratio.scores == by_number.scores


@pytest.mark.parametrize("score", ["block_influence", "angular"])
def test_the_same_call_gives_the_same_plan(model, score):
    callback = ShortGPT(num_layers=2, score=score)
    assert callback.plan(model, WINDOWS) == callback.plan(model, WINDOWS)


@pytest.mark.parametrize("score", ["block_influence", "angular"])
def test_removing_no_layers_is_a_plan(model, score):
    plan = ShortGPT(num_layers=0, score=score).plan(model, WINDOWS)
    assert removed(plan) == []
    plan.check(model)


def test_a_plan_records_what_it_was_made_from(model):
    plan = ShortGPT(ratio=0.5, ignore_first_tokens=1, protected=[-1]).plan(model, WINDOWS)
    assert plan.method == "ShortGPT"
    assert plan.arguments == {
        "ratio": 0.5,
        "num_layers": None,
        "score": "block_influence",
        "ignore_first_tokens": 1,
        "protected": [-1],
        "granularity": "layer",
        "export_remote_code": False,
        "loads_in": None,
        "layers": None,
        "parameter_ratio": None,
        "seed": None,
        "heal": "none",
    }
    assert ShortGPT(**plan.arguments).plan(model, WINDOWS) == plan
    assert plan.model == describe_model(model)
    assert plan.calibration == describe_windows(WINDOWS)
    assert set(plan.scores) == {"block_influence", "block_influence_first_token"}
    assert all(len(scores) == NUM_LAYERS for scores in plan.scores.values())


def test_a_mask_of_ones_is_no_mask(model):
    masked = {"input_ids": WINDOWS, "attention_mask": torch.ones_like(WINDOWS)}
    callback = ShortGPT(num_layers=2)
    assert callback.plan(model, masked) == callback.plan(model, WINDOWS)


@pytest.mark.parametrize("score", ["block_influence", "angular"])
def test_protected_layers_are_kept(model, score):
    free = removed(ShortGPT(num_layers=2, score=score).plan(model, WINDOWS))
    protected = [free[0], free[1] - NUM_LAYERS]
    plan = ShortGPT(num_layers=2, score=score, protected=protected).plan(model, WINDOWS)
    assert len(removed(plan)) == 2
    assert not set(removed(plan)) & set(free)
    prunelight.apply(shuffled_model(), plan)


def test_ties_go_to_the_lower_index():
    model = tiny_model()
    with torch.no_grad():
        for layer in decoder_layers(model):  # every layer hands on its input
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    for score in ("block_influence", "angular"):
        assert removed(ShortGPT(num_layers=2, score=score).plan(model, WINDOWS)) == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing says how many .*: give exactly one of ratio, num_layers, layers, parameter_"),
        ({"layers": [1], "parameter_ratio": 0.1}, r"layers=\[1\] and parameter_ratio=0.1: give"),
        ({"parameter_ratio": 20}, r"parameter_ratio=20 must lie in \[0, 1\); 0.2 is 20 %"),
        ({"num_layers": 1, "score": "random"}, "seed=None .*score='random' needs a seed"),
        ({"num_layers": 1, "seed": 1}, "seed=1 with score='block_influence': .*no other score"),
        ({"num_layers": 1, "score": "random", "seed": -1}, "seed=-1 must be at least 0"),
        ({"layers": [1], "score": "reverse"}, r"score='reverse' has no effect with layers=\[1\]"),
        ({"layers": [1], "granularity": "sublayer"}, "does not say which sublayer goes"),
        ({"layers": [1], "ignore_first_tokens": 1}, r"no effect with layers=\[1\], without data"),
        (
            {"num_layers": 1, "score": "sequential", "ignore_first_tokens": 1},
            "ignore_first_tokens=1 has no effect with score='sequential', without data",
        ),
        (
            {"num_layers": 1, "score": "relative_magnitude", "granularity": "mlp"},
            "score='relative_magnitude' compares whole layers, not granularity='mlp'",
        ),
        ({"ratio": 0.2, "num_layers": 1}, "ratio=0.2 and num_layers=1: give exactly one"),
        ({"ratio": -0.2}, r"ratio=-0.2 must lie in \[0, 1\)"),
        ({"ratio": 1.0}, r"ratio=1.0 must lie in \[0, 1\)"),
        ({"ratio": 20}, r"ratio=20 must lie in \[0, 1\); 0.2 is 20 %"),
        ({"num_layers": -1}, "num_layers=-1 must be at least 0"),
        ({"ratio": 0.2, "score": "magic"}, "score='magic' must be one of block_influence, angular"),
        ({"ratio": 0.2, "ignore_first_tokens": -1}, "ignore_first_tokens=-1 must be at least 0"),
        (
            {"ratio": 0.2, "score": "angular", "ignore_first_tokens": 1},
            "ignore_first_tokens=1 has no effect with score='angular'",
        ),
    ],
)
def test_arguments_out_of_range_are_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        ShortGPT(**arguments)


def every_layer():
    return list(range(NUM_LAYERS))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 0.99}, "ratio=0.99 would remove 6 of 6 decoder layers"),
        ({"num_layers": 6}, "num_layers=6 would remove 6 of 6 decoder layers"),
        ({"num_layers": 1, "protected": every_layer()}, "only 0 of 6 are not protected"),
        (
            {"num_layers": 1, "score": "angular", "protected": every_layer()},
            "every window of 1 contiguous layers contains a protected one",
        ),
        (
            {"num_layers": 3, "score": "angular", "protected": [2, 3]},
            "every window of 3 contiguous layers contains a protected one",
        ),
        (
            {"layers": [6]},
            r"layers=\[6\] must lie in \[-6, 5\] .*has 6 decoder layers; name others",
        ),
        ({"layers": [2, 3, -4]}, r"layers=\[2, 3, -4\] names layer 2 twice, as 2 and as -4; name"),
        ({"layers": [1, 1]}, "names layer 1 twice, as 1 and as 1"),
        ({"layers": [0, -1], "protected": [5]}, r"and protected=\[5\] both name \[5\]"),
        ({"layers": every_layer()}, "would remove 6 of 6 decoder layers; at least one must stay"),
        ({"layers": [0], "granularity": "attention"}, r"the attention of layers \[0\] cannot go"),
        ({"parameter_ratio": 0.95}, "parameter_ratio=0.95 is out of reach: 5 of 6 layers hold 0."),
        ({"num_layers": 1, "protected": [6]}, r"protected=\[6\] must lie in \[-6, 5\]"),
        (
            {"num_layers": 2, "score": "angular", "protected": [-7]},
            r"protected=\[-7\] must lie in \[-6, 5\]",
        ),
    ],
)
def test_arguments_that_do_not_fit_the_model_are_refused_before_any_data(model, arguments, message):
    callback = ShortGPT(**arguments)
    with pytest.raises(ValueError, match=message):
        callback.check(model)
    with pytest.raises(ValueError, match=message):
        callback.plan(model, torch.zeros(0))  # the arguments are checked first


@pytest.mark.parametrize("family", ["llama", "gpt2", "rwkv"])
def test_windows_longer_than_the_model_allows_are_refused(family):
    model = tiny_model(family, max_position_embeddings=16)
    ShortGPT(num_layers=1).plan(model, token_windows(1, 16))
    with pytest.raises(ValueError, match="seq_len=17 must be at most 16, which the model allows"):
        ShortGPT(num_layers=1).plan(model, token_windows(1, 17))


@pytest.mark.parametrize("token", [VOCABULARY, -100])
def test_token_ids_that_the_model_does_not_have_are_refused(model, token):
    windows = WINDOWS.clone()
    windows[1, 3] = token
    with pytest.raises(ValueError, match=rf"token id {token} must lie in \[0, 127\]"):
        ShortGPT(num_layers=1).plan(model, windows)


@pytest.mark.parametrize(
    "windows",
    [WINDOWS[0], WINDOWS[None], WINDOWS.float(), WINDOWS[:0], {"input_ids": WINDOWS[:, :0]}],
)
def test_windows_of_a_wrong_shape_or_type_are_refused(model, windows):
    with pytest.raises(ValueError, match=r"must be token ids of shape \(num_samples, seq_len\)"):
        ShortGPT(num_layers=1).plan(model, windows)


def test_a_mask_of_another_shape_is_refused(model):
    windows = {"input_ids": WINDOWS, "attention_mask": torch.zeros(4, 8, dtype=torch.long)}
    with pytest.raises(ValueError, match=r"attention_mask of shape \(4, 8\) must have .*\(4, 16\)"):
        ShortGPT(num_layers=1).plan(model, windows)


def test_layers_go_that_leave_the_pattern_that_an_engine_knows():
    model = tiny_model("smollm3", num_hidden_layers=8)  # llama.cpp: every fourth layer has no RoPE
    plain = ShortGPT(num_layers=4).plan(model, WINDOWS)
    kept = ShortGPT(num_layers=4, loads_in=["llama.cpp"]).plan(model, WINDOWS)
    rope = model.config.no_rope_layers
    left = [rope[i] for i in range(8) if i not in kept.steps[0].layers]
    assert left == [1, 1, 1, 0]
    influence = plain.scores["block_influence"]
    assert sum(influence[i] for i in kept.steps[0].layers) >= sum(
        influence[i] for i in plain.steps[0].layers
    )


def test_an_engine_that_cannot_take_the_result_is_named_before_any_data():
    with pytest.raises(ValueError, match="loads_in"):
        ShortGPT(num_layers=1, loads_in=["an engine"])
    model = tiny_model("smollm3")
    with pytest.raises(ValueError, match="engine='CTranslate2': .*has no converter"):
        ShortGPT(num_layers=1, loads_in=["CTranslate2"]).check(model)
