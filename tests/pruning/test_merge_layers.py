"""Laws of the merge rules, and of merging as surgery."""

import copy

import pytest
import torch
from tiny import tiny_model, token_windows

import prunelight
from prunelight.callbacks import SlidingLayerMerging, WeightPruning
from prunelight.models.families.layers import decoder_layers
from prunelight.models.families.matrices import matrices
from prunelight.planning.fingerprints import describe_model
from prunelight.planning.plan import Plan, planned_sparsity
from prunelight.planning.steps import MERGES, MergeLayers, RemoveLayers
from prunelight.pruning.merge_layers import (
    check_mergeable,
    merge_layers,
    merged_layer,
    merged_weights,
    projection_names,
)
from prunelight.pruning.remove_layers import remove_layers

WINDOWS = token_windows()


def weights(layer):
    return {name: p.detach().clone() for name, p in layer.named_parameters()}


def equal(x, y, **tolerance):
    return set(x) == set(y) and all(torch.allclose(x[n], y[n], **tolerance) for n in x)


def window(model, low, high):
    return [decoder_layers(model)[i] for i in range(low, high + 1)]


@pytest.mark.parametrize("merge", MERGES)
def test_equal_layers_merge_into_the_same_layer(merge):
    model = tiny_model("qwen2")
    layer = decoder_layers(model)[2]
    same = [layer, copy.deepcopy(layer), copy.deepcopy(layer)]
    found = merged_weights(same, merge, projection_names(model, 2))
    assert equal(found, weights(layer), atol=1e-7)


def test_paper_and_released_code_agree_on_the_projections_of_two_layers():
    model = tiny_model("qwen3")
    names = projection_names(model, 1)
    paper = merged_weights(window(model, 1, 2), "difference_sum", names)
    released = merged_weights(window(model, 1, 2), "released", names)
    assert equal({n: paper[n] for n in names}, {n: released[n] for n in names}, atol=1e-7)
    paper = merged_weights(window(model, 1, 3), "difference_sum", names)
    released = merged_weights(window(model, 1, 3), "released", names)
    assert not torch.allclose(paper[names[0]], released[names[0]], atol=1e-3)


def test_the_released_rule_is_what_its_running_copy_gives():
    model = tiny_model("qwen2")
    layers, names = window(model, 0, 3), projection_names(model, 0)
    running = weights(layers[0])
    for layer in layers:
        for name, parameter in layer.named_parameters():
            if name in names:
                running[name] += parameter.detach() - running[name]
    assert equal(merged_weights(layers, "released", names), running, atol=1e-6)


def test_the_sum_of_differences_moves_norms_and_biases_too():
    model = tiny_model("qwen2")
    layers = window(model, 1, 3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in layers:
            for p in layer.parameters():
                p.add_(torch.randn(p.shape, generator=generator))
    found = merged_weights(layers, "difference_sum")
    a, b, c = map(weights, layers)
    assert equal(found, {n: b[n] + c[n] - a[n] for n in a}, atol=1e-5)
    mean = merged_weights(layers, "mean")
    assert equal(mean, {n: (a[n] + b[n] + c[n]) / 3 for n in a}, atol=1e-6)


@pytest.mark.parametrize("merge", MERGES)
def test_weights_keep_their_dtype(merge):
    layers = window(tiny_model(dtype=torch.bfloat16), 1, 3)
    assert {w.dtype for w in merged_weights(layers, merge).values()} == {torch.bfloat16}


def test_the_highest_layer_stands_for_a_window_as_if_the_others_were_removed():
    model = tiny_model("gemma2")  # kinds of layers alternate
    merged, removed = copy.deepcopy(model), copy.deepcopy(model)
    merge_layers(merged, [[0, 1], [3, 4, 5]], "top")
    remove_layers(removed, [0, 3, 4])
    assert merged.config.to_dict() == removed.config.to_dict()
    with torch.no_grad():
        assert torch.equal(merged(WINDOWS).logits, removed(WINDOWS).logits)
    assert merged_layer(model, [3, 4, 5], "top") is decoder_layers(model)[5]


def test_the_lowest_layer_stands_for_a_window_as_if_the_others_were_removed():
    model = tiny_model("mixtral")  # experts are not mixed, but may stay whole
    merged, removed = copy.deepcopy(model), copy.deepcopy(model)
    with pytest.raises(TypeError, match="experts, which are not aligned"):
        check_mergeable(model, "mean")
    merge_layers(merged, [[0, 1], [3, 4, 5]], "lowest")
    remove_layers(removed, [1, 4, 5])
    with torch.no_grad():
        assert torch.equal(merged(WINDOWS).logits, removed(WINDOWS).logits)


def test_the_lowest_layer_cannot_stand_where_another_kind_belongs():
    with pytest.raises(TypeError, match="layers 0 and 1 of gemma2 cannot be mixed by merge='low"):
        check_mergeable(tiny_model("gemma2"), "lowest")


def plan_of(model, *steps):
    return Plan("by hand", {}, describe_model(model), steps)


def test_steps_count_the_layers_of_the_dense_model():
    model, other = tiny_model(), tiny_model()
    plan = plan_of(model, RemoveLayers((0,)), MergeLayers(((2, 3),), "mean"), RemoveLayers((5,)))
    mean = merged_layer(model, [2, 3], "mean")
    prunelight.apply(model, plan)
    expected = [1, None, 4]
    for layer, index in zip(decoder_layers(model), expected, strict=True):
        wanted = mean if index is None else decoder_layers(other)[index]
        assert equal(weights(layer), weights(wanted))
    assert [layer.self_attn.layer_idx for layer in decoder_layers(model)] == [0, 1, 2]


@pytest.mark.parametrize("merge", ["top", "released", "mean", "lowest"])
def test_planned_zeros_stay_known_where_merging_keeps_them(merge):
    model = tiny_model()
    sparse = WeightPruning(0.5).plan(model, WINDOWS)
    prunelight.apply(model, sparse, WINDOWS)
    merged = plan_of(model, MergeLayers(((1, 2, 3),), merge))
    prunelight.apply(model, merged)
    shares = planned_sparsity([sparse, merged], "model.layers")
    kept = {0, 2, 3} if merge in ("mean", "lowest") else {0, 1, 2, 3}
    assert {int(name.split(".")[2]) for name in shares} == kept
    for name in shares:
        assert (matrices(model)[name].parameter == 0).float().mean() == 0.5


BAD_STEPS = [
    (MergeLayers(((1, 3),)), r"groups: \[1, 3\] must be two or more neighbouring layers"),
    (MergeLayers(((2,),)), r"groups: \[2\] must be two or more"),
    (MergeLayers(((1, 2), (2, 3))), "must not name a layer twice"),
    (MergeLayers(((5, 6),)), r"groups=\[6\] must lie in \[0, 5\]"),
    (MergeLayers(((1, 2),), "sum"), "merge='sum' must be one of top"),
]


@pytest.mark.parametrize("groups", [[1, 2], None, "12", [[1, 2.5]], [None]])
def test_groups_of_the_wrong_type_are_refused(groups):
    with pytest.raises(ValueError, match="groups"):
        Plan.from_dict(
            {
                "format": 1,
                "method": "by hand",
                "arguments": {},
                "model": {},
                "steps": [{"kind": "merge_layers", "groups": groups}],
            }
        )


def test_a_second_step_that_is_bad_leaves_the_first_undone():
    model = tiny_model("gemma2")
    before = describe_model(model)
    plan = plan_of(model, RemoveLayers((0,)), MergeLayers(((2, 3),), "mean"))
    with pytest.raises(TypeError, match="layers 2 and 3 of gemma2 cannot be mixed"):
        prunelight.apply(model, plan)
    assert describe_model(model) == before
    model = tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True)
    before = describe_model(model)
    sparse = WeightPruning(0.5, solver="magnitude").plan(model, WINDOWS)
    with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx"):
        prunelight.apply(model, plan_of(model, *sparse.steps, RemoveLayers((0,))))
    assert describe_model(model) == before


@pytest.mark.parametrize(("step", "message"), BAD_STEPS)
def test_bad_steps_are_refused_and_nothing_is_changed(step, message):
    model = tiny_model()
    before = describe_model(model)
    with pytest.raises(ValueError, match=message):
        prunelight.apply(model, plan_of(model, step))
    assert describe_model(model) == before


def test_a_layer_that_is_gone_cannot_be_merged():
    model = tiny_model()
    plan = plan_of(model, RemoveLayers((2,)), MergeLayers(((1, 2, 3),)))
    with pytest.raises(ValueError, match=r"steps\[1\] .*must not name a layer twice|are gone"):
        prunelight.apply(model, plan)
    plan = plan_of(model, RemoveLayers((3,)), MergeLayers(((2, 3),)))
    with pytest.raises(ValueError, match=r"layers=\[3\] are gone after an earlier step"):
        prunelight.apply(model, plan)


def test_models_whose_layers_depend_on_each_other_are_refused():
    model = tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx"):
        SlidingLayerMerging(num_layers=1).plan(model, WINDOWS)
    with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx"):
        merge_layers(model, [[1, 2]], "top")
    with pytest.raises(TypeError, match=r"layers 1 and 2 .*scaling is 0.17\d+ and would be 0.11"):
        merge_layers(model, [[1, 2]], "mean")


@pytest.mark.parametrize("family", ["llama", "phi3", "glm4", "gpt2", "opt", "bloom", "falcon"])
@pytest.mark.parametrize("merge", MERGES)
def test_fused_projections_and_biases_are_merged_like_any_weight(family, merge):
    model = tiny_model(family)
    check_mergeable(model, merge)
    names = projection_names(model, 1)
    found = merged_weights(window(model, 1, 2), merge, names)
    merged = copy.deepcopy(model)
    merge_layers(merged, [[1, 2]], merge)
    assert equal(weights(decoder_layers(merged)[1]), found)
    with torch.no_grad():
        assert merged(WINDOWS).logits.isfinite().all()
