"""Layers of different widths: what they compute, what may come before and after, and runs."""

import copy
import json

import lightning.pytorch as pl
import pytest
import torch
from lively_models import inputs_of
from own_models import GROUPS, NEURONS, lively, narrowed, own_model, plan_by_hand, width_step
from runs import make_data, make_module, make_trainer, write_model
from safetensors.torch import load_file
from sliced_models import WINDOWS, sliced
from tiny import tiny_model
from transformers import AutoModelForCausalLM

import prunelight
from prunelight.callbacks import (
    DLP,
    ShortGPT,
    SliceGPT,
    SlidingLayerMerging,
    WeightPruning,
    WidthPruning,
)
from prunelight.models.families.architectures import ARCHITECTURES
from prunelight.models.families.layers import decoder_layers
from prunelight.models.families.matrices import matrices
from prunelight.models.families.own_classes.layer_widths import CLASSES, FAMILIES, LISTS
from prunelight.models.sizes import zero_share
from prunelight.planning.fingerprints import describe_model
from prunelight.planning.plan import Plan
from prunelight.planning.steps import (
    DropSublayers,
    MergeLayers,
    PruneWidth,
    RemoveLayers,
    SliceHidden,
    Sparsify,
)
from prunelight.pruning.merge_layers import merge_layers
from prunelight.recovery.zeros.gradual_zeros import Schedule
from prunelight.scoring.width_scores import width_scores, widths_of

WITH_NEURONS = [family for family in FAMILIES if ARCHITECTURES[family].sublayers.neurons]


@torch.no_grad()
def logits(model, windows=WINDOWS):
    return model(windows, use_cache=False).logits


def switched_off(family, step):
    """A copy of the dense model in which what the step does not keep gives nothing."""
    model = copy.deepcopy(lively(family))
    with torch.no_grad():
        for index, layer in enumerate(decoder_layers(model)):
            columns = layer.self_attn.o_proj.weight.view(32, 2, -1)
            for group in {0, 1} - {*step.heads[str(index)]}:
                columns[:, group] = 0
            if step.neurons:
                gone = [i for i in range(64) if i not in step.neurons[str(index)]]
                layer.mlp.down_proj.weight[:, gone] = 0
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_each_layer_computes_what_is_left_of_it(family, tmp_path):
    step = width_step(family)
    model = narrowed(family)
    expected = logits(switched_off(family, step))
    assert torch.allclose(logits(model), expected, atol=1e-5 * expected.abs().max())
    assert type(model) is CLASSES[family]
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["layer_key_value_heads"] == [*GROUPS]
    assert config["layer_attention_heads"] == [2 * groups for groups in GROUPS]
    has_neurons = family in WITH_NEURONS
    assert config["layer_intermediate_sizes"] == ([*NEURONS] if has_neurons else None)
    assert (config["num_key_value_heads"], config["intermediate_size"]) == (2, 64)
    assert [(w.groups, w.heads) for w in widths_of(model)] == [(groups, 2) for groups in GROUPS]


def test_what_all_layers_share_stands_in_the_stock_field():
    heads = narrowed("llama", width_step("llama", neurons=[48] * 6)).config
    assert (heads.intermediate_size, heads.layer_intermediate_sizes) == (48, None)
    neurons = narrowed("llama", width_step("llama", groups=[1] * 6)).config
    assert (neurons.num_key_value_heads, neurons.layer_key_value_heads) == (1, None)
    assert (neurons.num_attention_heads, neurons.layer_attention_heads) == (2, None)
    assert neurons.head_dim == 8


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_equal_numbers_give_a_stock_model_also_after_different_ones(family, tmp_path):
    model = own_model("widths", family)
    every = range(6)
    step = PruneWidth({str(i): (0,) for i in every}, {str(i): tuple(range(8)) for i in every})
    expected = copy.deepcopy(model)
    for layer in decoder_layers(expected):
        layer.self_attn.o_proj.weight.data[:, 16:] = 0
        layer.mlp.down_proj.weight.data[:, 8:] = 0
    prunelight.apply(model, plan_by_hand(model, step))
    assert torch.allclose(logits(model), logits(expected), atol=1e-5)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model) is type(lively(family))
    assert not set(LISTS) & set(json.loads((tmp_path / "config.json").read_text()))
    assert torch.equal(logits(again), logits(model))


def output_errors(family, model):
    """Share of the output of each layer's MLP that is wrong, layer by layer."""
    errors, dense = [], lively(family)
    found = []
    for one in (dense, model):
        outputs = []
        for layer in decoder_layers(one):
            layer.mlp.register_forward_hook(lambda m, args, out, to=outputs: to.append(out))
        logits(one)
        for layer in decoder_layers(one):
            layer.mlp._forward_hooks.clear()
        found.append(outputs)
    for before, after in zip(*found, strict=True):
        errors.append(((after - before).square().sum() / before.square().sum()).item())
    return errors


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2"])
def test_the_correction_brings_the_outputs_of_every_layer_nearer(family):
    step = width_step(family)
    plain = narrowed(family)
    fitted = copy.deepcopy(lively(family))
    corrected = PruneWidth(step.heads, step.neurons, correction=True)
    windows = torch.cat([WINDOWS] * 2)
    prunelight.apply(fitted, plan_by_hand(fitted, corrected), windows)
    before, after = (output_errors(family, model) for model in (plain, fitted))
    assert before[0] == after[0] == 0, "the first layer keeps all"
    assert all(now < then for now, then in zip(after[1:], before[1:], strict=True))


def test_the_correction_of_a_later_layer_sees_the_layers_before_it_as_they_became():
    model, step = copy.deepcopy(lively("llama")), width_step("llama")
    corrected = PruneWidth(step.heads, step.neurons, correction=True)
    prunelight.apply(model, plan_by_hand(model, corrected), WINDOWS)
    by_hand = copy.deepcopy(model)
    decoder_layers(by_hand)[2] = copy.deepcopy(decoder_layers(lively("llama"))[2])
    x = inputs_of(by_hand, WINDOWS, "mlp.down_proj")[2].double()
    kept, W = list(step.neurons["2"]), decoder_layers(lively("llama"))[2].mlp.down_proj.weight
    gram = x.T @ x
    wide = W.double()
    inner = gram[kept][:, kept]
    missing = wide @ gram[:, kept] - wide[:, kept] @ inner
    inner += 0.01 * inner.diagonal().mean() * torch.eye(len(kept))
    expected = wide[:, kept] + torch.linalg.solve(inner, missing.T).T
    found = decoder_layers(model)[2].mlp.down_proj.weight.double()
    assert torch.allclose(found, expected, atol=1e-4 * expected.abs().max().item())


def test_layers_may_be_removed_before_in_the_same_plan():
    step = width_step("llama", layers=(0, 2, 4, 5))
    model = narrowed("llama", RemoveLayers((1, 3)), step)
    assert model.config.layer_intermediate_sizes == [NEURONS[i] for i in (0, 2, 4, 5)]
    expected = narrowed("llama")
    prunelight.apply(expected, plan_by_hand(expected, RemoveLayers((1, 3))))
    assert torch.equal(logits(model), logits(expected))
    assert model.config.to_dict() == expected.config.to_dict()


def test_layers_are_removed_and_zeros_made_after_it_in_the_same_plan():
    sparse = Sparsify({"model.layers.2.mlp.up_proj": 0.5}, "magnitude")
    model = narrowed("llama", width_step("llama"), RemoveLayers((1,)), sparse)
    assert model.config.layer_key_value_heads == [2, 1, 2, 1, 2]
    weight = decoder_layers(model)[1].mlp.up_proj.weight
    assert weight.shape == (8, 32)
    assert (weight == 0).double().mean() == 0.5


def test_layers_of_different_widths_are_merged_only_where_nothing_is_mixed():
    model = own_model("widths", "llama")
    for merge in ("mean", "difference_sum", "released"):
        with pytest.raises(TypeError, match="layers 0 and 1 .* cannot be mixed"):
            prunelight.apply(model, plan_by_hand(model, MergeLayers(((0, 1),), merge)))
    expected = own_model("widths", "llama")
    prunelight.apply(expected, plan_by_hand(expected, RemoveLayers((0,))))
    merge_layers(model, [(0, 1)], "top")
    assert torch.equal(logits(model), logits(expected))
    plan = SlidingLayerMerging(num_layers=2).plan(model, WINDOWS)
    assert len(decoder_layers(prunelight.apply(model, plan))) == 3


def test_what_no_class_describes_is_refused_before_anything_is_changed():
    model = own_model("widths", "llama")
    with pytest.raises(TypeError, match="prunelight_widths_llama has layers of different widths"):
        SliceGPT(0.25).check(model)
    with pytest.raises(TypeError, match="no class describes layers of different widths, some"):
        ShortGPT(num_layers=1, granularity="mlp").check(model)
    dense = copy.deepcopy(lively("llama"))
    before = describe_model(dense)
    for steps, message in (
        ((width_step("llama"), DropSublayers(mlp=(1,))), "no class describes layers of different"),
        ((DropSublayers(mlp=(1,)), width_step("llama")), "before sublayers are dropped"),
        ((width_step("llama"), SliceHidden((24,) * 13)), "slice_hidden must be the first step"),
        ((width_step("llama"), width_step("llama")), "prune width once"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            prunelight.apply(dense, plan_by_hand(dense, *steps), WINDOWS)
    assert describe_model(dense) == before
    narrow = sliced("llama", True, (32, *[24] * 11, 32))
    for check in (
        lambda: prunelight.apply(narrow, plan_by_hand(narrow, width_step("llama"))),
        lambda: WidthPruning(neuron_ratio=0.5, multiple=8, allocation="global").check(narrow),
    ):
        with pytest.raises(TypeError, match="this model is sliced"):
            check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_intermediate_sizes": [8]}, "layer_intermediate_sizes has 1 numbers; 6 decoder"),
        ({"layer_key_value_heads": [1] * 7}, "layer_key_value_heads has 7 numbers"),
    ],
)
def test_a_config_with_too_few_or_too_many_numbers_is_refused(changes, message):
    config = copy.deepcopy(own_model("widths", "llama").config)
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_stock_model_of_these_families_reads_widths_from_per_layer_config(family):
    """Where one does, it says what our class says, and a stock config should be written instead."""
    config = tiny_model(family).config
    narrow = {"intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    for name, value in narrow.items():
        one = copy.deepcopy(config)
        one.per_layer_config = {1: {name: value}}
        one.allow_global_per_layer_attribute_access = True
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(one)
        shapes = [
            {n: p.shape for n, p in layer.named_parameters()} for layer in decoder_layers(model)
        ]
        assert shapes[1] == shapes[3], f"{family} reads {name}: write a stock config"


# --- the method ------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["wanda", "fluctuation", "taylor"])
def test_all_layers_together_keep_the_highest_shares_of_their_layers_scores(score):
    model = lively("llama")
    shares = {"neuron_ratio": 0.5, "head_ratio": 0.25, "multiple": 8}
    method = WidthPruning(**shares, score=score, allocation="global")
    plan = method.plan(model, WINDOWS)
    (step,), scores = plan.steps, width_scores(model, WINDOWS, score)
    for kind, block, kept in (("heads", 1, step.heads), ("neurons", 8, step.neurons)):
        counts = [len(indices) for indices in kept.values()]
        assert sum(counts) == {"heads": 9, "neurons": 32 * 6}[kind]
        assert all(count % block == 0 and count for count in counts)
        values = []  # of each block: its share, and whether it is kept
        for score_of_layer, count in zip(scores[kind], counts, strict=True):
            shares = (score_of_layer.double() / score_of_layer.double().sum()).sort(descending=True)
            blocks = shares.values.view(-1, block).sum(1).tolist()
            values += [(x, i < count // block) for i, x in enumerate(blocks) if i]
        lowest_kept = min(x for x, is_kept in values if is_kept)
        assert lowest_kept >= max(x for x, is_kept in values if not is_kept)
        for index, count in enumerate(counts):
            best = scores[kind][index].topk(count).indices.sort().values.tolist()
            assert kept[str(index)] == tuple(best)
    assert plan.found["layer_intermediate_sizes"] == [len(x) for x in step.neurons.values()]
    assert plan.found["intermediate_size_before"] == 64
    assert Plan.from_dict(plan.to_dict()) == plan


def test_uniform_is_what_it_was_and_global_keeps_as_much():
    model = lively("llama")
    (uniform,) = WidthPruning(neuron_ratio=0.5, multiple=8).plan(model, WINDOWS).steps
    (default,) = (
        WidthPruning(neuron_ratio=0.5, multiple=8, allocation="uniform").plan(model, WINDOWS).steps
    )
    spread = WidthPruning(neuron_ratio=0.5, multiple=8, allocation="global").plan(model, WINDOWS)
    assert uniform == default
    assert not uniform.leaves_own_class
    assert spread.steps[0].leaves_own_class
    kept = [sum(map(len, step.neurons.values())) for step in (uniform, spread.steps[0])]
    assert kept[0] == kept[1]
    shares = [
        sum(p.scores["share_of_neurons_score_kept"])
        for p in (WidthPruning(neuron_ratio=0.5, multiple=8).plan(model, WINDOWS), spread)
    ]
    assert shares[1] > shares[0], "its aim"


def test_a_number_of_heads_that_the_config_class_refuses_for_all_becomes_uneven():
    # Llama's config wants hidden_size=32 to be a multiple of the number of heads.
    model = tiny_model(num_attention_heads=8, num_key_value_heads=8, head_dim=4)
    method = WidthPruning(num_key_value_heads=7, allocation="global")
    (step,) = method.plan(model, WINDOWS).steps
    counts = [len(indices) for indices in step.heads.values()]
    assert sum(counts) in (41, 42)
    assert len(set(counts)) > 1
    prunelight.apply(model, plan_by_hand(model, PruneWidth(step.heads)))
    assert type(model) is CLASSES["llama"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"intermediate_size": 128}, "=128 must be at most the model's 64; lower it, or multiple"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 must be at most the model's 2; lower"),
        ({"neuron_ratio": 0.5, "multiple": 128}, "=128 must be at most the model's 64; lower it"),
        ({"neuron_ratio": 0.5, "allocation": "best"}, "must be one of uniform, global, flap, dlp"),
    ],
)
def test_widths_that_the_layers_do_not_have_are_refused_before_any_forward(
    arguments, message, monkeypatch
):
    model = tiny_model()
    monkeypatch.setattr(type(model), "forward", None)
    with pytest.raises(ValueError, match=message):
        WidthPruning(**{"allocation": "global", **arguments}).plan(model, WINDOWS)


def test_code_is_exported_only_where_a_class_of_ours_is_left():
    with pytest.raises(ValueError, match="export_remote_code=True has no effect with allocation"):
        WidthPruning(neuron_ratio=0.5, export_remote_code=True)
    with pytest.raises(ValueError, match="export_remote_code=True has no effect with granularity"):
        ShortGPT(num_layers=1, export_remote_code=True)


def test_a_model_of_different_widths_is_narrowed_again_by_both_allocations():
    model = own_model("widths", "llama")
    spread = WidthPruning(neuron_ratio=0.5, multiple=8, allocation="global").plan(model, WINDOWS)
    counts = spread.found["layer_intermediate_sizes"]
    assert sum(counts) == 112, "half of 224"
    assert all(a <= b for a, b in zip(counts, NEURONS, strict=True))
    uniform = WidthPruning(neuron_ratio=0.9, num_key_value_heads=1, multiple=4).plan(model, WINDOWS)
    assert uniform.found["intermediate_size"] == 4
    prunelight.apply(model, uniform, WINDOWS)
    assert type(model) is type(lively("llama"))
    with pytest.raises(ValueError, match="intermediate_size=16 must be at most the model's 8"):
        WidthPruning(intermediate_size=16, multiple=8).check(own_model("widths", "llama"))


# --- runs ------------------------------------------------------------------------------------

WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}


def by_layer(**changes):
    return WidthPruning(
        **{
            "neuron_ratio": 0.25,
            "head_ratio": 0.2,
            "multiple": 8,
            "allocation": "global",
            **changes,
        }
    )


def fit(name, root, *callbacks, ckpt_path=None, **arguments):
    pl.seed_everything(0, verbose=False)
    trainer = make_trainer(root, *callbacks)
    module, data = make_module(name, **arguments), make_data(name, root)
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return AutoModelForCausalLM.from_pretrained(root / "final")


@pytest.mark.parametrize("recovery", ["lora", "full"])
def test_zeros_grow_in_layers_of_different_widths_and_a_resume_gives_the_same(recovery, tmp_path):
    name = write_model(tmp_path / "tiny")
    methods = lambda: (by_layer(), DLP(0.5, schedule=Schedule(1, 5, every=2)))
    final = fit(name, tmp_path, *methods(), recovery=recovery)
    assert type(final) is CLASSES["llama"]
    zeros = zero_share(matrix.parameter for matrix in matrices(final).values())
    assert zeros == pytest.approx(0.5, abs=1 / 16)
    whole = load_file(tmp_path / "final" / "model.safetensors")
    checkpoint = tmp_path / "checkpoints" / "epoch=0.ckpt"
    fit(name, tmp_path, *methods(), recovery=recovery, ckpt_path=checkpoint)
    parts = load_file(tmp_path / "final" / "model.safetensors")
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    report = (tmp_path / "report.md").read_text()
    assert "import prunelight  # its class" in report
    assert "of 64 neurons kept in every layer" in report


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_adapters_are_trained_over_quantized_layers_of_different_widths(kind, tmp_path):
    pytest.importorskip("bitsandbytes", reason="pip install 'prunelight[quantization]'")
    name = write_model(tmp_path / "tiny", **WIDE)
    method = by_layer(neuron_ratio=0.3, multiple=64, head_ratio=0.25, export_remote_code=True)
    final = fit(name, tmp_path, method, WeightPruning(0.5), quantization=kind)
    assert type(final) is CLASSES["llama"]
    assert sum(final.config.layer_intermediate_sizes) == 512
    assert sum(final.config.layer_key_value_heads) in (4, 5)
    stages = json.loads((tmp_path / "report.json").read_text())["stages"]
    assert [stage["name"] for stage in stages] == ["dense", "pruned", "quantized", "recovered"]
    assert stages[-1]["perplexity"] < stages[1]["perplexity"]
    zeros = zero_share(matrix.parameter for matrix in matrices(final).values())
    assert zeros == pytest.approx(0.5, abs=0.01)
    for directory in (tmp_path / "final", *tmp_path.glob("pruned-*")):
        assert (directory / "layer_widths.py").is_file()


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (lambda: [by_layer(), SliceGPT(0.25)], "SliceGPT slices hidden states, and no class"),
        (lambda: [SliceGPT(0.25), by_layer()], "WidthPruning comes after SliceGPT, and cannot"),
        (
            lambda: [by_layer(), ShortGPT(num_layers=1, granularity="mlp")],
            "ShortGPT drops sublayers or puts matrices at gaps, and no class describes",
        ),
    ],
)
def test_runs_that_no_class_could_describe_end_at_once(methods, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        fit(write_model(tmp_path / "tiny"), tmp_path, *methods())


def test_widths_that_4_bits_cannot_take_end_a_run_at_once(tmp_path):
    pytest.importorskip("bitsandbytes", reason="pip install 'prunelight[quantization]'")
    name = write_model(tmp_path / "tiny", **WIDE)
    with pytest.raises(ValueError, match="multiple=8 must be a multiple of 64 .*; set multiple=64"):
        fit(name, tmp_path, by_layer(), quantization="nf4")


def test_a_run_that_exports_code_ends_well_where_equal_numbers_leave_a_stock_model(tmp_path):
    name = write_model(tmp_path / "tiny")
    method = WidthPruning(head_ratio=0.5, allocation="global", export_remote_code=True)
    final = fit(name, tmp_path, method)
    assert type(final).__name__ == "LlamaForCausalLM"
    assert not list((tmp_path / "final").glob("*.py"))


def test_dropped_sublayers_are_exported_by_a_run(tmp_path):
    name = write_model(tmp_path / "tiny")
    fit(name, tmp_path, ShortGPT(num_layers=2, granularity="mlp", export_remote_code=True))
    assert (tmp_path / "final" / "dropped_sublayers.py").is_file()
