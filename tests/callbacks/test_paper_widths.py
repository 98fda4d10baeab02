"""The width baselines of the papers: FLAP, Wanda-sp and LLM-Pruner's range of layers."""

import copy
import itertools

import pytest
import torch
from lively_models import inputs_of
from own_models import lively, own_model, plan_by_hand
from tiny import NUM_LAYERS, tiny_model, token_windows
from transformers import AutoModelForCausalLM
from uneven_models import uneven_model

import prunelight
from prunelight.callbacks import ShortGPT, WeightPruning, WidthPruning
from prunelight.callbacks.width_pruning import _allowed_counts
from prunelight.comparison.amounts.matching import ladder, nearest
from prunelight.comparison.methods import entrants_of
from prunelight.models.families.layers import decoder_layers
from prunelight.models.families.own_classes.layer_widths import BIASED, CLASSES
from prunelight.models.saving import verify
from prunelight.models.sizes import parameter_count
from prunelight.planning.plan import Plan
from prunelight.planning.sparsity_shares import spend_budget
from prunelight.planning.steps import PruneWidth, RemoveLayers
from prunelight.scoring.width_scores import standardised_scores, width_scores

WINDOWS = token_windows(8, 32)
GROUP_WIDTH = 16  # columns of o_proj: 2 query heads of width 8
OUTPUTS = {"heads": "self_attn.o_proj", "neurons": "mlp.down_proj"}
FLAP = {"score": "fluctuation", "allocation": "flap", "correction": "bias", "multiple": 1}


@torch.no_grad()
def logits(model, windows=WINDOWS):
    return model(windows, use_cache=False).logits


def apply(model, method, windows=WINDOWS):
    plan = method.plan(model, windows)
    return prunelight.apply(copy.deepcopy(model), plan, windows), plan


# --- scores ----------------------------------------------------------------------------------


@torch.no_grad()
def plain_columns(model, kind, score):
    """Score of each column of the output projection of each layer, by loops in float64."""
    layers = []
    for layer, x in zip(
        decoder_layers(model), inputs_of(model, WINDOWS, OUTPUTS[kind]), strict=True
    ):
        weight = layer.get_submodule(OUTPUTS[kind]).weight.double()
        columns = []
        for j in range(weight.shape[1]):
            mean = sum(x[:, j].tolist()) / len(x)
            variance = sum((value - mean) ** 2 for value in x[:, j].tolist()) / len(x)
            norm = sum(value**2 for value in x[:, j].tolist()) ** 0.5
            column = weight[:, j].tolist()
            if score == "fluctuation":
                columns.append(variance * sum(w**2 for w in column))
            else:
                columns.append(sum(abs(w) * norm for w in column))
        layers.append(columns)
    return layers


def in_groups(columns, kind):
    width = GROUP_WIDTH if kind == "heads" else 1
    return [columns[start : start + width] for start in range(0, len(columns), width)]


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("score", ["wanda", "fluctuation"])
def test_scores_are_those_of_a_plain_loop(kind, score):
    model = lively("llama")
    found = width_scores(model, WINDOWS, score)[kind]
    for scores, columns in zip(found, plain_columns(model, kind, score), strict=True):
        expected = [sum(group) for group in in_groups(columns, kind)]
        assert scores.tolist() == pytest.approx(expected, rel=1e-5)


def plain_standardised(model, kind):
    layers = []
    for columns in plain_columns(model, kind, "fluctuation"):
        mean = sum(columns) / len(columns)
        deviation = (sum((x - mean) ** 2 for x in columns) / (len(columns) - 1)) ** 0.5
        scores = [(x - mean) / deviation for x in columns]
        layers.append([sum(group) / len(group) for group in in_groups(scores, kind)])
    return layers


@pytest.mark.parametrize("kind", OUTPUTS)
def test_standardised_scores_are_those_of_a_plain_loop(kind):
    model = lively("llama")
    found = standardised_scores(model, WINDOWS)[kind]
    for scores, expected in zip(found, plain_standardised(model, kind), strict=True):
        assert scores.tolist() == pytest.approx(expected, abs=1e-5)


# --- one budget ------------------------------------------------------------------------------


def parameters_of_a_group(kind, hidden=32):
    """Weights of a group of 2 query heads of width 8, or of a neuron."""
    return hidden * (2 * 16 + 2 * 8) if kind == "heads" else hidden * 3


@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_groups_and_neurons_of_all_layers_are_ranked_in_one_list(ratio):
    model = lively("llama")
    plan = WidthPruning(ratio, ratio, **FLAP).plan(model, WINDOWS)
    (step,) = plan.steps
    ranked, total = [], 0
    for kind in OUTPUTS:
        for layer, scores in enumerate(plain_standardised(model, kind)):
            best = max(range(len(scores)), key=scores.__getitem__)
            for i, score in enumerate(scores):
                size = parameters_of_a_group(kind)
                total += size
                ranked.append((i != best, -score, kind, layer, i, size))  # the best one stays
    ranked.sort()
    sums = [0, *itertools.accumulate(entry[-1] for entry in ranked)]
    number = min(range(len(sums)), key=lambda n: abs(sums[n] - (1 - ratio) * total))
    expected = {entry[2:5] for entry in ranked[:number]}
    found = {
        (kind, int(layer), i)
        for kind, kept in (("heads", step.heads), ("neurons", step.neurons))
        for layer, indices in kept.items()
        for i in indices
    }
    assert found == expected
    assert abs(sums[number] - (1 - ratio) * total) <= parameters_of_a_group("heads") / 2
    assert len({len(kept) for kept in step.neurons.values()}) > 1
    for kind, kept in (("heads", step.heads), ("neurons", step.neurons)):
        plain = plain_standardised(model, kind)
        lowest = [min(plain[int(layer)][i] for i in indices) for layer, indices in kept.items()]
        assert plan.scores[f"lowest_{kind}_score_kept"] == pytest.approx(lowest, abs=1e-5)
    assert Plan.from_dict(plan.to_dict()) == plan


def test_heads_may_go_for_neurons_where_the_ratio_of_heads_is_zero():
    model = lively("qwen2")
    plan = WidthPruning(0.4, 0.0, **FLAP).plan(model, WINDOWS)
    (step,) = plan.steps
    groups = sum(map(len, step.heads.values()))
    neurons = sum(map(len, step.neurons.values()))
    removed = (12 - groups) * (32 * 48 + 32) + (384 - neurons) * 96  # qwen2 has biases of rows
    assert groups < 12
    assert removed == pytest.approx(0.4 * 384 * 96, abs=(32 * 48 + 32) / 2)
    alone = WidthPruning(0.4, **FLAP).plan(model, WINDOWS).steps[0]
    assert not alone.heads
    assert sum(map(len, alone.neurons.values())) == round(0.6 * 384)


def test_neurons_go_in_blocks_where_a_multiple_is_asked_for():
    plan = WidthPruning(0.4, 0.25, **{**FLAP, "multiple": 8}).plan(lively("llama"), WINDOWS)
    assert {len(kept) % 8 for kept in plan.steps[0].neurons.values()} == {0}


@pytest.mark.parametrize("budget", [30.0, 47.0, 55.5, 100.0])
def test_a_budget_is_spent_on_the_highest_scores_from_the_first_block_on(budget):
    scores, sizes = [[5.0, 1.0, -1.0], [0.0, -2.0], [3.0, 2.0, 1.5, -4.0]], [10.0, 10.0, 5.0]
    counts = spend_budget(scores, sizes, budget)
    # In the order of their scores, after the first of each: 2.0, 1.5, 1.0, -1.0, -2.0, -4.0.
    steps = [(2, 5), (2, 5), (0, 10), (0, 10), (1, 10), (2, 5)]
    expected, kept = [1, 1, 1], 25.0
    for index, size in steps:
        if abs(kept + size - budget) <= abs(kept - budget):
            expected[index] += 1
            kept += size
        else:
            break
    assert counts == expected


def test_a_budget_below_one_block_each_is_refused():
    with pytest.raises(ValueError, match="budget=10 must exceed the 20 of one block each"):
        spend_budget([[1.0], [2.0]], [10.0, 10.0], 10)


def test_equal_numbers_of_heads_that_no_config_accepts_become_uneven():
    scores = [[3.0, 2.0, 1.0], [3.0, 2.0, 0.5], [3.0, 2.0, 0.7]]
    assert _allowed_counts([3, 3, 3], scores, [1, 2]) == [3, 2, 3]
    assert _allowed_counts([2, 2, 2], scores, [1, 2]) == [2, 2, 2]
    assert _allowed_counts([3, 1, 3], scores, [1, 2]) == [3, 1, 3]
    assert _allowed_counts([3], scores[:1], [1]) == [1]


# --- the bias --------------------------------------------------------------------------------


@torch.no_grad()
def with_constant_parts(family):
    """A model in which some inputs of each output projection are constant, and those parts."""
    model = copy.deepcopy(
        tiny_model(
            family, **({"attention_bias": True, "mlp_bias": True} if family == "llama" else {})
        )
    )
    generator = torch.Generator().manual_seed(0)
    for layer in decoder_layers(model):
        for parameter in layer.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.mul_(5)
        layer.self_attn.v_proj.weight[:8] = 0  # of the first group; its bias is left
        if family == "llama":
            for name in ("gate_proj", "up_proj"):
                layer.mlp.get_submodule(name).weight[8:16] = 0
    return model, {"neurons": set(range(8, 16))} if family == "llama" else {}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_inputs_that_are_constant_are_removed_without_a_change(family):
    model, constant = with_constant_parts(family)
    number = {"intermediate_size": 56} if constant else {}
    arguments = {"num_key_value_heads": 1, "score": "fluctuation", "multiple": 8, **number}
    narrow, plan = apply(model, WidthPruning(correction="bias", **arguments))
    assert set(plan.steps[0].heads.values()) == {(1,)}
    for kept in plan.steps[0].neurons.values():
        assert not {*kept} & constant["neurons"]
    expected = logits(model)
    assert torch.allclose(logits(narrow), expected, atol=1e-5 * expected.abs().max())
    plain, _ = apply(model, WidthPruning(correction=False, **arguments))
    assert not torch.allclose(logits(plain), expected, atol=1e-2 * expected.abs().max())


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_the_bias_is_the_mean_of_what_is_gone_in_the_dense_model(family):
    model = lively(family)
    narrow, plan = apply(model, WidthPruning(0.5, 0.5, correction="bias", multiple=8))
    for kind, path in OUTPUTS.items():
        kept = getattr(plan.steps[0], kind)
        for index, x in enumerate(inputs_of(model, WINDOWS, path)):
            weight = decoder_layers(model)[index].get_submodule(path).weight.double()
            width = GROUP_WIDTH if kind == "heads" else 1
            gone = [j for j in range(len(weight[0])) if j // width not in kept[str(index)]]
            expected = weight[:, gone] @ x.mean(0)[gone]
            bias = decoder_layers(narrow)[index].get_submodule(path).bias
            assert torch.allclose(bias.double(), expected, atol=1e-5 * expected.abs().max().item())


def test_a_second_bias_is_added_to_the_first():
    model = lively("llama")
    once, _ = apply(model, WidthPruning(0.25, correction="bias", multiple=8))
    twice, plan = apply(once, WidthPruning(0.25, correction="bias", multiple=8))
    x = inputs_of(once, WINDOWS, "mlp.down_proj")[0]
    linear = decoder_layers(once)[0].mlp.down_proj
    gone = [j for j in range(48) if j not in plan.steps[0].neurons["0"]]
    expected = linear.bias.double() + linear.weight[:, gone].double() @ x.mean(0)[gone]
    assert torch.allclose(decoder_layers(twice)[0].mlp.down_proj.bias.double(), expected, atol=1e-5)
    assert getattr(twice.config, BIASED) == ["mlp.down_proj"]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3", "mixtral"])
def test_a_model_with_biases_reloads_as_it_was(family, tmp_path):
    share = {} if family == "mixtral" else {"neuron_ratio": 0.3}  # of experts
    narrow, _ = apply(copy.deepcopy(lively(family)), WidthPruning(head_ratio=0.3, **FLAP, **share))
    assert type(narrow) is CLASSES[family]
    narrow.save_pretrained(tmp_path)
    assert "cached generation" in verify(narrow, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(narrow))
    kinds = ["mlp.down_proj", "self_attn.o_proj"] if share else ["self_attn.o_proj"]
    assert getattr(again.config, BIASED) == kinds


def test_biases_stay_when_widths_are_pruned_again_or_layers_removed():
    biased, _ = apply(lively("llama"), WidthPruning(0.25, correction="bias", multiple=8))
    assert type(biased) is CLASSES["llama"], "no stock class has the bias of one projection alone"
    narrower, _ = apply(biased, WidthPruning(0.5, multiple=8, correction=False))
    assert type(narrower) is CLASSES["llama"]
    bias = decoder_layers(biased)[2].mlp.down_proj.bias
    assert bool(bias.any())
    assert torch.equal(decoder_layers(narrower)[2].mlp.down_proj.bias, bias)
    shorter, _ = apply(biased, ShortGPT(layers=[1]))
    assert torch.equal(decoder_layers(shorter)[1].mlp.down_proj.bias, bias)
    assert getattr(shorter.config, BIASED) == ["mlp.down_proj"]


def test_a_plan_of_layers_then_widths_with_biases_is_rehearsed_and_carried_out():
    model = lively("llama")
    neurons = {str(i): tuple(range(i, i + 8)) for i in (0, 1, 2, 4)}
    steps = (RemoveLayers((3, 5)), PruneWidth(neurons=neurons, correction="bias"))
    narrow = prunelight.apply(copy.deepcopy(model), plan_by_hand(model, *steps), WINDOWS)
    assert all(bool(layer.mlp.down_proj.bias.any()) for layer in decoder_layers(narrow))
    sparse, _ = apply(narrow, WeightPruning(0.5))
    assert bool(decoder_layers(sparse)[0].mlp.down_proj.bias.any())


def test_padding_is_no_part_of_the_mean():
    model = lively("llama")
    mask = torch.ones_like(WINDOWS)
    mask[:, 24:] = 0
    whole = {"input_ids": WINDOWS, "attention_mask": mask}
    method = WidthPruning(0.5, correction="bias", multiple=8)
    plan = method.plan(model, whole)
    padded = prunelight.apply(copy.deepcopy(model), plan, whole)
    short = prunelight.apply(copy.deepcopy(model), plan, WINDOWS[:, :24])
    ours, theirs = (decoder_layers(m)[5].mlp.down_proj.bias for m in (padded, short))
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_classes_that_hold_no_bias_are_refused_before_any_forward():
    model = own_model("sliced", "llama")
    with pytest.raises(TypeError, match="no class of it has biases of output projections; set cor"):
        WidthPruning(0.25, correction="bias", multiple=8).check(model)
    step = PruneWidth(neurons={str(i): (0,) for i in range(6)}, correction="bias")
    with pytest.raises(
        TypeError, match="class of prunelight_sliced_llama holds no bias of its out"
    ):
        prunelight.apply(model, plan_by_hand(model, step), WINDOWS)


# --- a range of layers -----------------------------------------------------------------------

SKIPS = {"skip_first": 1, "skip_last": 2}


@pytest.mark.parametrize("correction", [False, True, "bias"])
@pytest.mark.parametrize("allocation", ["uniform", "global", "dlp", "flap"])
def test_skipped_layers_stay_whole_and_the_ratio_counts_over_all(allocation, correction):
    model = uneven_model()
    score = "fluctuation" if allocation == "flap" else "wanda"
    arguments = {"allocation": allocation, "correction": correction, "score": score}
    method = WidthPruning(0.25, multiple=4, **arguments, **SKIPS)
    narrow, plan = apply(model, method)
    counts = [len(kept) for kept in plan.steps[0].neurons.values()]
    assert [counts[i] for i in (0, 4, 5)] == [64] * 3
    assert sum(counts) == 0.75 * 64 * NUM_LAYERS
    assert plan.found["layer_intermediate_sizes"] == counts
    assert allocation != "uniform" or counts[1:4] == [32] * 3
    for index in (0, 4, 5):
        before, after = (decoder_layers(m)[index].state_dict() for m in (model, narrow))
        assert all(torch.equal(after[name], weight) for name, weight in before.items())
        assert not any(bool(after[name].any()) for name in after.keys() - before.keys())


def test_heads_of_a_range_need_no_number_that_the_config_accepts():
    model = tiny_model(num_attention_heads=8, num_key_value_heads=8, head_dim=4)
    narrow, plan = apply(model, WidthPruning(head_ratio=0.25, skip_first=1, skip_last=1))
    # 12 of 48 groups go, from 4 layers: 3 each, and 5 heads do not divide hidden_size=32.
    assert [len(kept) for kept in plan.steps[0].heads.values()] == [8, 5, 5, 5, 5, 8]
    assert logits(narrow).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"skip_first": 6}, "skip_first=6 and skip_last=0 leave none of the 6 decoder layers"),
        ({"skip_first": 3, "skip_last": 3}, "leave none of the 6 decoder layers to prune; lower"),
        (
            {"neuron_ratio": 0.6, **SKIPS},
            "cannot lose 0.6 of all neurons, at most 0.438; lower neu",
        ),
        ({"neuron_ratio": None, "head_ratio": 0.5, **SKIPS}, "0.5 of all heads, at most 0.25; low"),
        (
            {"neuron_ratio": None, "intermediate_size": 24, **SKIPS},
            "lower intermediate_size=24, or",
        ),
        (
            {"neuron_ratio": 0.6, "multiple": 1, **SKIPS, **FLAP},
            "neuron_ratio=0.6 would leave 0 pa",
        ),
        ({"neuron_ratio": None, "num_key_value_heads": 3, **SKIPS}, "=3 must be at most the model"),
    ],
)
def test_ranges_that_cannot_lose_so_much_are_refused_before_any_forward(
    arguments, message, monkeypatch
):
    model = tiny_model()
    monkeypatch.setattr(type(model), "forward", None)
    with pytest.raises(ValueError, match=message):
        WidthPruning(**{"neuron_ratio": 0.25, "multiple": 8, **arguments}).plan(model, WINDOWS)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"skip_first": -1}, ValueError, "skip_first=-1 must be at least 0"),
        ({"skip_last": 1.5}, TypeError, "skip_last=1.5 must be a whole number"),
        ({"skip_last": True}, TypeError, "skip_last=True must be a whole number"),
        ({"correction": "biases"}, ValueError, "must be one of bias; did you mean bias"),
        ({"correction": 1.5}, TypeError, "correction=1.5 must be true or false or one of bias"),
        ({"allocation": "flap"}, ValueError, "not score='wanda'; set score='fluctuation', or all"),
        ({"allocation": "flap", "score": "taylor"}, ValueError, "ranks standardised fluctuations"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        WidthPruning(0.25, **arguments)


@pytest.mark.parametrize("correction", ["mean", None, 1.5])
def test_a_step_knows_its_corrections(correction):
    with pytest.raises(ValueError, match=r"correction=.* must be one of True, False, bias"):
        PruneWidth(neurons={"0": (0,)}, correction=correction)


def test_a_step_with_a_bias_needs_windows_and_leaves_our_class():
    model = tiny_model()
    step = PruneWidth(neurons={str(i): (0,) for i in range(6)}, correction="bias")
    assert step.leaves_own_class
    with pytest.raises(ValueError, match="correction=bias needs calibration windows; pass them"):
        prunelight.apply(model, plan_by_hand(model, step))
    WidthPruning(0.25, correction="bias", export_remote_code=True)  # has an effect


# --- contests --------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [{}, {"head_ratio": 0.25}])
def test_a_contest_counts_what_a_range_of_layers_loses(heads):
    settings = {"class_path": "prunelight.callbacks.WidthPruning"}
    (one,) = entrants_of([{**settings, "init_args": {"multiple": 4, **SKIPS, **heads}}])
    model = tiny_model()
    before = parameter_count(model)
    rung = nearest(one, model, 0.15)
    narrow, _ = apply(model, one.make(rung.arguments))
    assert 1 - parameter_count(narrow) / before == pytest.approx(rung.share, abs=1e-9)
    (none,) = entrants_of([{**settings, "init_args": {"skip_first": 6}}])
    with pytest.raises(ValueError, match="leave none of the 6 decoder layers"):
        ladder(none, model)


def test_a_contest_gives_flap_the_budget_of_neurons_also_for_heads():
    arguments = {**FLAP, "head_ratio": 0.0, "correction": False}
    (one,) = entrants_of(
        [{"class_path": "prunelight.callbacks.WidthPruning", "init_args": arguments}]
    )
    model = tiny_model()
    rung = nearest(one, model, 0.2)
    narrow, _ = apply(model, one.make(rung.arguments))
    removed = parameter_count(model) - parameter_count(narrow)
    assert removed == pytest.approx(rung.share * parameter_count(model), abs=32 * 48 / 2)
