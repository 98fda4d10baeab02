"""Width pruning: what is kept, the correction, and stock models as results."""

import copy

import pytest
import torch
from lively_models import inputs_of
from tiny import tiny_model, token_windows

import prunelight
from prunelight.callbacks import SlidingLayerMerging, WeightPruning, WidthPruning
from prunelight.models.families.architectures import ARCHITECTURES
from prunelight.models.families.layers import decoder_layers
from prunelight.models.saving import verify
from prunelight.planning.fingerprints import describe_model
from prunelight.planning.plan import Plan
from prunelight.planning.steps import DropSublayers, PruneWidth, RemoveLayers
from prunelight.scoring.width_scores import SCORES, allowed_groups, width_scores

WINDOWS = token_windows(8, 32)
FAMILIES = [name for name, entry in ARCHITECTURES.items() if entry.sublayers]
WITH_NEURONS = [name for name in FAMILIES if ARCHITECTURES[name].sublayers.neurons]


def uneven(family="llama", **changes):
    """A model whose biases and norms differ from entry to entry."""
    model = tiny_model(family, **changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in decoder_layers(model).parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def pruned(model, **arguments):
    model = copy.deepcopy(model)
    plan = WidthPruning(multiple=8, **arguments).plan(model, WINDOWS)
    return prunelight.apply(model, plan, WINDOWS), plan


def switch_off(model, plan):
    """Return a copy in which what the plan does not keep gives nothing, by zeroed columns."""
    (step,), model = plan.steps, copy.deepcopy(model)
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads // config.num_key_value_heads * head_dim
    with torch.no_grad():
        for index, layer in enumerate(decoder_layers(model)):
            for group in set(range(config.num_key_value_heads)) - set(
                step.heads.get(str(index), range(config.num_key_value_heads))
            ):
                layer.self_attn.o_proj.weight[:, group * width : (group + 1) * width] = 0
            kept = step.neurons.get(str(index))
            if kept is not None:
                gone = [i for i in range(config.intermediate_size) if i not in kept]
                layer.mlp.down_proj.weight[:, gone] = 0
    return model


def logits(model):
    with torch.no_grad():
        return model(WINDOWS, use_cache=False).logits


# Taylor looks at every projection of a family, the others at the two that all have.
@pytest.mark.parametrize(
    ("family", "score"), [*((f, "taylor") for f in FAMILIES), *(("phi3", s) for s in SCORES[1:])]
)
def test_a_narrow_model_computes_what_is_left_and_reloads_as_a_stock_one(family, score, tmp_path):
    model = uneven(family)
    share = {"neuron_ratio": 0.3} if family in WITH_NEURONS else {}
    narrow, plan = pruned(model, head_ratio=0.5, score=score, correction=False, **share)
    expected = logits(switch_off(model, plan))
    assert torch.allclose(logits(narrow), expected, atol=1e-5 * expected.abs().max())
    assert narrow.config.num_key_value_heads == 1
    assert narrow.config.num_attention_heads == 2
    assert narrow.config.intermediate_size == (48 if share else 64)
    assert type(narrow) is type(model)
    narrow.save_pretrained(tmp_path)
    assert "cached generation" in verify(narrow, tmp_path)
    assert Plan.from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize("score", SCORES)
def test_each_layer_keeps_its_best(score):
    model = tiny_model()
    plan = WidthPruning(intermediate_size=24, num_key_value_heads=1, score=score, multiple=8).plan(
        model, WINDOWS
    )
    scores, (step,) = width_scores(model, WINDOWS, score), plan.steps
    for index in range(6):
        best = scores["neurons"][index].topk(24).indices.tolist()
        assert step.neurons[str(index)] == tuple(sorted(best))
        assert step.heads[str(index)] == (int(scores["heads"][index].argmax()),)
        share = plan.scores["share_of_neurons_score_kept"][index]
        assert share == pytest.approx(
            (scores["neurons"][index][best].sum() / scores["neurons"][index].sum()).item()
        )


def output_error(model, narrow):
    """Squared error of the first layer's MLP and attention output, as shares of their size."""
    found = []
    for path in ("self_attn", "mlp"):
        outputs = []
        for one in (model, narrow):
            module = decoder_layers(one)[0].get_submodule(path)
            handle = module.register_forward_hook(
                lambda m, args, out, to=outputs: to.append(
                    out[0] if isinstance(out, tuple) else out
                )
            )
            logits(one)
            handle.remove()
        dense, now = outputs
        found.append(((now - dense).square().sum() / dense.square().sum()).item())
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gemma2"])
def test_the_correction_brings_the_outputs_nearer(family):
    model = tiny_model(family)
    plain, _ = pruned(model, neuron_ratio=0.5, head_ratio=0.5, correction=False)
    fitted, _ = pruned(model, neuron_ratio=0.5, head_ratio=0.5)
    before, after = output_error(model, plain), output_error(model, fitted)
    assert after[0] < before[0]
    if family == "gemma2":  # the MLP's input has changed with the attention by then
        return
    assert after[1] < before[1]


def test_the_correction_is_the_damped_least_squares_solution():
    model = tiny_model()
    narrow, plan = pruned(model, neuron_ratio=0.5)
    kept = list(plan.steps[0].neurons["0"])
    gone = [i for i in range(64) if i not in kept]
    x = inputs_of(model, WINDOWS, "mlp.down_proj")[0]
    weight = decoder_layers(model)[0].mlp.down_proj.weight.double()
    gram = x.T @ x
    own = gram[kept][:, kept]
    own = own + 0.01 * own.diagonal().mean() * torch.eye(len(kept), dtype=torch.float64)
    expected = weight[:, kept] + weight[:, gone] @ gram[gone][:, kept] @ torch.linalg.inv(own)
    found = decoder_layers(narrow)[0].mlp.down_proj.weight.double()
    assert torch.allclose(found, expected, atol=1e-5)


def test_the_correction_fits_projections_that_have_a_bias():
    model = uneven(attention_bias=True, mlp_bias=True)
    plain, _ = pruned(model, neuron_ratio=0.5, head_ratio=0.5, correction=False)
    fitted, _ = pruned(model, neuron_ratio=0.5, head_ratio=0.5)
    assert output_error(model, fitted)[0] < output_error(model, plain)[0]
    bias = decoder_layers(model)[0].self_attn.o_proj.bias
    assert torch.equal(decoder_layers(fitted)[0].self_attn.o_proj.bias, bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("score", SCORES)
def test_half_precision_is_pruned_like_single(dtype, score):
    narrow, plan = pruned(tiny_model(dtype=dtype), neuron_ratio=0.5, head_ratio=0.5, score=score)
    assert {p.dtype for p in narrow.parameters()} == {dtype}
    assert logits(narrow).isfinite().all()
    single = WidthPruning(neuron_ratio=0.5, head_ratio=0.5, score=score, multiple=8).plan(
        tiny_model(), WINDOWS
    )
    pairs = zip(plan.steps[0].neurons.values(), single.steps[0].neurons.values(), strict=True)
    common = [len({*a} & {*b}) / len(a) for a, b in pairs]
    assert sum(common) / len(common) > 0.9


def test_the_correction_leaves_zeros_of_an_earlier_step_alone():
    model = tiny_model()
    sparse = WeightPruning(0.5).plan(model, WINDOWS)
    prunelight.apply(model, sparse, WINDOWS)
    narrow, plan = pruned(model, neuron_ratio=0.5)
    kept = list(plan.steps[0].neurons["0"])
    before = decoder_layers(model)[0].mlp.down_proj.weight[:, kept]
    after = decoder_layers(narrow)[0].mlp.down_proj.weight
    assert torch.equal(after == 0, before == 0)
    assert not torch.equal(after, before)


def test_keeping_everything_changes_nothing():
    model = tiny_model()
    same, plan = pruned(model, neuron_ratio=0.0, num_key_value_heads=2)
    assert torch.equal(logits(same), logits(model))
    assert plan.scores["share_of_neurons_score_kept"] == pytest.approx([1.0] * 6)


def test_depth_then_width_in_one_plan_counts_the_layers_of_the_dense_model():
    model = tiny_model()
    neurons = {str(i): tuple(range(i, i + 8)) for i in (0, 1, 2, 4)}
    steps = (RemoveLayers((3, 5)), PruneWidth(neurons=neurons))
    narrow = prunelight.apply(
        copy.deepcopy(model), Plan("by hand", {}, describe_model(model), steps)
    )
    last = decoder_layers(narrow)[3].mlp.down_proj.weight
    assert torch.equal(last, decoder_layers(model)[4].mlp.down_proj.weight[:, 4:12])


def test_depth_then_width_as_two_methods():
    model = tiny_model()
    for method in (SlidingLayerMerging(num_layers=2), WidthPruning(neuron_ratio=0.25, multiple=16)):
        prunelight.apply(model, method.plan(model, WINDOWS), WINDOWS)
    assert (model.config.num_hidden_layers, model.config.intermediate_size) == (4, 48)
    assert logits(model).isfinite().all()


def test_heads_are_rounded_to_what_the_config_class_accepts():
    # 8 groups of one head: Llama accepts numbers that divide hidden_size=32.
    model = tiny_model(num_attention_heads=8, num_key_value_heads=8, head_dim=4)
    assert allowed_groups(model) == [1, 2, 4, 8]
    plan = WidthPruning(head_ratio=0.3).plan(model, WINDOWS)
    assert plan.found == {"num_key_value_heads": 4, "num_key_value_heads_before": 8}
    assert allowed_groups(tiny_model("mistral", num_attention_heads=8)) == [1, 2]


def test_a_ratio_that_removes_nothing_warns(caplog):
    WidthPruning(head_ratio=0.1, neuron_ratio=0.05, multiple=32).plan(tiny_model(), WINDOWS)
    assert "head_ratio=0.1 removes none of 2" in caplog.text
    assert "neuron_ratio=0.05 removes none of 64" in caplog.text


def test_neurons_are_rounded_down_where_the_nearest_multiple_is_more_than_there_are():
    plan = WidthPruning(neuron_ratio=0.01, multiple=24).plan(tiny_model(), WINDOWS)
    assert plan.found["intermediate_size"] == 48


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing to prune"),
        ({"neuron_ratio": 1.0}, r"neuron_ratio=1.0 must lie in \[0, 1\)"),
        ({"head_ratio": -0.1}, "head_ratio=-0.1 must lie in"),
        ({"neuron_ratio": 0.1, "intermediate_size": 64}, "give one of the two"),
        ({"head_ratio": 0.1, "num_key_value_heads": 1}, "give one of the two"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0 must be at least 1"),
        ({"intermediate_size": 1000}, "=1000 must be a multiple of 64; take 1024, or set multiple"),
        ({"neuron_ratio": 0.1, "score": "hessian"}, "must be one of taylor, wanda, fluctuation"),
        ({"neuron_ratio": 0.1, "multiple": 0}, "multiple=0 must be at least 1"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        WidthPruning(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"intermediate_size": 128}, "intermediate_size=128 must be at most the model's 64"),
        ({"neuron_ratio": 0.5, "multiple": 128}, "at most the model's 64; lower it, or multiple"),
        ({"num_key_value_heads": 3}, "=3 cannot be kept of the 2 groups of 2 query heads"),
    ],
)
def test_widths_that_the_model_cannot_give_are_refused_before_any_forward(
    arguments, message, monkeypatch
):
    model = tiny_model()
    monkeypatch.setattr(type(model), "forward", None)
    with pytest.raises(ValueError, match=message):
        WidthPruning(**arguments).plan(model, WINDOWS)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("mixtral", "mixtral has experts, whose neurons cannot be pruned; prune heads"),
        ("gpt2", "attention and MLP of gpt2 cannot be pruned apart"),
    ],
)
def test_families_without_neurons_that_are_known_are_refused(family, message):
    with pytest.raises(TypeError, match=message):
        WidthPruning(neuron_ratio=0.5, multiple=8).plan(tiny_model(family), WINDOWS)


ONE_GROUP = PruneWidth({str(i): (0,) for i in range(6)})


@pytest.mark.parametrize("first", [DropSublayers(mlp=(1,)), ONE_GROUP])
def test_width_is_pruned_once_in_a_plan_and_before_sublayers_are_dropped(first):
    model = tiny_model()
    before = describe_model(model)
    steps = (first, ONE_GROUP)
    with pytest.raises(ValueError, match="prune width once, and before sublayers are dropped"):
        prunelight.apply(model, Plan("by hand", {}, before, steps))
    assert describe_model(model) == before
    assert type(model).__name__ == "LlamaForCausalLM"


def steps_of(**kept):
    return {name: {str(i): x for i in range(6)} for name, x in kept.items()}


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (PruneWidth(neurons={"0": (1, 2)}), r"must name each layer that is left; .*\['1', '2'"),
        (PruneWidth(neurons={"7": (1,)}), r"neurons=\[7\] must lie in"),
        (PruneWidth(**steps_of(neurons=(1, 64))), r"different whole numbers in \[0, 63\]"),
        (PruneWidth(**steps_of(heads=(1, 1))), r"different whole numbers in \[0, 1\]"),
        (PruneWidth(heads={"0": (), "1": (0,), "2": ()}), "heads keeps none in layers 0, 2; each"),
        (PruneWidth(correction=True), "heads and neurons are both empty"),
        (PruneWidth(**steps_of(heads=(1,)), correction=True), "needs calibration windows; pass"),
    ],
)
def test_bad_steps_are_refused_and_nothing_is_changed(step, message):
    model = tiny_model()
    before = describe_model(model)
    with pytest.raises(ValueError, match=message):
        prunelight.apply(model, Plan("by hand", {}, before, (step,)))
    assert describe_model(model) == before


@pytest.mark.parametrize("value", [[1], {"a": [1]}, {"0": [1.5]}, {"0": "12"}])
def test_a_step_of_the_wrong_types_is_refused(value):
    with pytest.raises(ValueError, match="heads"):
        PruneWidth(heads=value)
