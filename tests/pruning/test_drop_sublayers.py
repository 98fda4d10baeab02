"""Dropped attention and MLP sublayers: which ones, what is left, and that it loads again."""

import copy
import subprocess
import sys

import pytest
import torch
from tiny import tiny_model, token_windows
from transformers import AutoConfig, AutoModelForCausalLM

import prunelight
from prunelight.callbacks import DLP, ShortGPT, WidthPruning
from prunelight.models.families.layers import decoder_layers
from prunelight.models.families.matrices import matrices
from prunelight.models.families.own_classes.dropped_sublayers import CLASSES
from prunelight.models.saving import verify
from prunelight.planning.fingerprints import describe_model
from prunelight.planning.plan import Plan
from prunelight.planning.steps import DropSublayers, MergeLayers, RemoveLayers
from prunelight.pruning.drop_sublayers import drop_sublayers
from prunelight.pruning.remove_layers import remove_layers
from prunelight.recovery.lora import LoRA, attach_lora, merge_lora

WINDOWS = token_windows()


def lively(family, **changes):
    model = tiny_model(family, **changes)
    with torch.no_grad():
        for parameter in decoder_layers(model).parameters():
            if parameter.ndim >= 2:
                parameter.mul_(5)
    return model


@pytest.fixture(scope="module", params=CLASSES)
def family(request):
    return request.param


def states_between(model):
    """Before each layer, between its sublayers, and after it, by hooks of this test's own."""
    found = []
    handles = []
    for layer in decoder_layers(model):
        norm = layer.post_attention_layernorm
        handles.append(layer.register_forward_pre_hook(lambda m, args: found.append([args[0]])))
        handles.append(norm.register_forward_pre_hook(lambda m, args: found[-1].append(args[0])))
        handles.append(layer.register_forward_hook(lambda m, args, out: found[-1].append(out)))
    with torch.no_grad():
        model(WINDOWS, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def test_the_scores_are_those_of_a_plain_computation(family):
    model = lively(family)
    plan = ShortGPT(num_layers=3, granularity="sublayer").plan(model, WINDOWS)
    for name, (before, after) in {"attention": (0, 1), "mlp": (1, 2)}.items():
        expected = [
            1 - torch.cosine_similarity(s[before].double(), s[after].double(), dim=-1).mean().item()
            for s in states_between(model)
        ]
        assert plan.scores[f"{name}_influence"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("granularity", ["attention", "mlp", "sublayer"])
def test_the_lowest_sublayers_that_may_go_are_dropped(family, granularity):
    model = lively(family)
    callback = ShortGPT(num_layers=3, granularity=granularity, protected=[-1])
    plan = callback.plan(model, WINDOWS)
    names = ("attention", "mlp") if granularity == "sublayer" else (granularity,)
    fixed = {("attention", 0)} | {(name, 5) for name in names}
    kinds = getattr(model.config, "layer_types", None) or ["all"]
    fixed |= {("attention", kinds.index(kind)) for kind in kinds}
    free = [(n, i) for n in names for i in range(6) if (n, i) not in fixed]
    chosen = sorted(free, key=lambda part: plan.scores[f"{part[0]}_influence"][part[1]])[:3]
    (step,) = plan.steps
    assert {(n, i) for n in names for i in getattr(step, n)} == set(chosen)
    assert Plan.from_dict(plan.to_dict()) == plan


def test_a_dropped_sublayer_adds_nothing_and_keeps_no_weights(family):
    model = lively(family)
    by_hand = copy.deepcopy(model)
    for index in (4, 5):
        attention = decoder_layers(by_hand)[index].self_attn
        attention.forward = lambda hidden_states, **kwargs: (0 * hidden_states, None)
    for index in (1, 4):
        mlp = decoder_layers(by_hand)[index].mlp
        mlp.forward = lambda hidden_states: 0 * hidden_states
    layers = decoder_layers(model)
    norms = [layers[i].input_layernorm for i in (4, 5)]
    norms += [layers[i].post_attention_layernorm for i in (1, 4)]
    gone = [layers[i].self_attn for i in (4, 5)] + [layers[i].mlp for i in (1, 4)] + norms
    saved = sum(p.numel() for module in gone for p in module.parameters())
    before = model.num_parameters()
    dropped = drop_sublayers(model, [4, 5], [1, 4])
    assert dropped is model
    assert model.num_parameters() == before - saved
    with torch.no_grad():
        found = model(WINDOWS, use_cache=False).logits
        assert torch.equal(found, by_hand(WINDOWS, use_cache=False).logits)


def test_the_result_loads_as_a_registered_class_and_generates(family, tmp_path):
    model = drop_sublayers(lively(family), [4, 5], [1, 4])
    model.save_pretrained(tmp_path)
    assert "cached generation" in verify(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is CLASSES[family] is type(model)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.model_type == f"prunelight_{family}"
    assert config.drop_attention == [False] * 4 + [True] * 2
    assert config.drop_mlp == [False, True, False, False, True, False]
    prompt = WINDOWS[:2]
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    cached = loaded.generate(prompt, **options)
    assert torch.equal(cached, loaded.generate(prompt, use_cache=False, **options))
    beams = loaded.generate(prompt, num_beams=3, **options)
    assert torch.equal(beams, loaded.generate(prompt, num_beams=3, use_cache=False, **options))


FRESH = """
import sys
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except ValueError as error:
    print(error)
import prunelight
print("then:", type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__module__)
"""


def test_a_fresh_process_needs_prunelight_and_says_so(tmp_path):
    drop_sublayers(lively("llama"), [4], []).save_pretrained(tmp_path)
    command = [sys.executable, "-c", FRESH, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    refused, _, loaded = done.stdout.partition("then:")
    assert "prunelight_llama" in refused
    assert loaded.strip() == "prunelight.models.families.own_classes.dropped_sublayers", done.stderr


def test_layers_can_be_removed_and_sublayers_dropped_again_afterwards(family):
    model = drop_sublayers(lively(family), [5], [1])
    steps = (RemoveLayers((0, 4)), DropSublayers(attention=(2,), mlp=(2,)))
    prunelight.apply(model, Plan("by hand", {}, describe_model(model), steps))
    assert model.config.drop_attention == [False, True, False, True]
    assert model.config.drop_mlp == [True, True, False, False]
    assert len(decoder_layers(model)) == 4
    # Dropped before: never chosen a second time.
    again = ShortGPT(num_layers=2, granularity="mlp").plan(model, WINDOWS)
    assert again.steps[0].mlp == (2, 3)


def test_the_attention_that_leads_once_layers_are_gone_must_stay():
    model = tiny_model("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=3)
    before = describe_model(model)
    plan = Plan("by hand", {}, before, (RemoveLayers((3,)), DropSublayers(attention=(4,))))
    with pytest.raises(ValueError, match=r"attention=\[4\] must stay"):
        prunelight.apply(model, plan)
    assert describe_model(model) == before


def test_removal_that_would_leave_no_attention_to_lead_the_cache_is_refused():
    model = drop_sublayers(tiny_model(), [1], [])
    before = describe_model(model)
    with pytest.raises(ValueError, match=r"attention=\[1\] must stay"):
        remove_layers(model, [0])
    for steps in (
        (RemoveLayers((0,)),),
        (MergeLayers(((0, 1),)),),
    ):
        with pytest.raises(ValueError, match=r"attention=\[1\] must stay"):
            prunelight.apply(model, Plan("by hand", {}, before, steps))
    assert describe_model(model) == before
    model = tiny_model()
    plan = Plan("x", {}, describe_model(model), (DropSublayers((1,)), RemoveLayers((0,))))
    with pytest.raises(ValueError, match=r"attention=\[1\] must stay"):
        prunelight.apply(model, plan)
    assert type(model).__name__ == "LlamaForCausalLM"


def test_decoding_by_hand_and_a_static_cache_give_what_no_cache_gives(family):
    model = drop_sublayers(lively(family), [4, 5], [1])
    ids = WINDOWS[:2]
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        first = model(ids[:, :9], use_cache=True)
        rest = model(ids[:, 9:], past_key_values=first.past_key_values, use_cache=True).logits
    assert torch.allclose(rest, expected[:, 9:], atol=1e-4 * expected.abs().max())
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    static = model.generate(ids, cache_implementation="static", **options)
    assert torch.equal(static, model.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize("name", ["llama", "phi3", "qwen3_moe"])
def test_what_is_left_can_be_sparsified_and_adapted(name):
    model = drop_sublayers(lively(name), [4, 5], [1])
    left = set(matrices(model))
    assert not {n for n in left if ".5.self_attn" in n or ".1.mlp" in n}
    prunelight.apply(model, DLP(0.5).plan(model, WINDOWS), WINDOWS)
    with torch.no_grad():
        before = model(WINDOWS, use_cache=False).logits
    merged = merge_lora(attach_lora(model, LoRA()))
    assert type(merged) is CLASSES[name]
    with torch.no_grad():
        assert torch.allclose(merged(WINDOWS, use_cache=False).logits, before, atol=1e-5)


def test_no_sublayers_dropped_leave_a_model_that_computes_the_same():
    model = lively("llama")
    with torch.no_grad():
        before = model(WINDOWS).logits
    plan = ShortGPT(num_layers=0, granularity="mlp").plan(model, WINDOWS)
    prunelight.apply(model, plan)
    assert type(model).__name__ == "LlamaForCausalLM", "stock transformers can load it"
    with torch.no_grad():
        assert torch.equal(model(WINDOWS).logits, before)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("gemma2", "gemma2 has norms after its sublayers"),
        ("gpt2", "attention and MLP of gpt2 cannot be pruned apart; families that can: gemma"),
        ("mamba", "attention and MLP of mamba cannot"),
    ],
)
def test_families_without_a_class_are_refused_by_name(family, message):
    with pytest.raises(TypeError, match=message):
        ShortGPT(num_layers=1, granularity="mlp").plan(tiny_model(family), WINDOWS)
    with pytest.raises(TypeError, match=message):
        drop_sublayers(tiny_model(family), [], [1])


def test_the_attention_that_leads_the_cache_must_stay():
    model = tiny_model("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=3)
    with pytest.raises(ValueError, match=r"attention=\[0, 3\] must stay"):
        drop_sublayers(model, [0, 1, 3], [])
    assert model.config.model_type == "qwen2"
    with pytest.raises(ValueError, match="only 4 of 6 are not protected"):
        ShortGPT(num_layers=5, granularity="attention").check(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"granularity": "head"}, "granularity='head' must be one of layer, attention"),
        ({"granularity": "mlp", "score": "angular"}, "compares whole layers"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ShortGPT(num_layers=1, **arguments)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (DropSublayers(attention=(6,)), r"attention=\[6\] must lie in \[0, 5\]"),
        (DropSublayers(mlp=(1, 1)), "must not name a layer twice"),
    ],
)
def test_bad_steps_are_refused(step, message):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        prunelight.apply(model, Plan("by hand", {}, describe_model(model), (step,)))


def test_width_comes_before_dropping():
    model = drop_sublayers(tiny_model(), [5], [])
    with pytest.raises(TypeError, match="prune its width first, then drop"):
        WidthPruning(neuron_ratio=0.5).plan(model, WINDOWS)
