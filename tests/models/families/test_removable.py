"""Which decoder layers can go: known from the config alone, before any weight or forward."""

import itertools

import pytest
import torch
from tiny import NUM_LAYERS, tiny_model
from tiny_families import tiny_family
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from prunelight.models.families import shorter_config
from prunelight.models.families.layers import decoder_layers
from prunelight.models.families.outline import outline
from prunelight.models.families.removable import removable_layers
from prunelight.planning.layer_choice import lowest_scores

# family -> layers that must stay while all others can go in any combination.
FIXED = {
    "llama": set(),
    "mixtral": set(),
    "bart": set(),  # the number of layers is in decoder_layers
    "prophetnet": set(),  # in num_decoder_layers, and num_hidden_layers cannot be set
    "longcat_flash": set(),  # layer i holds the caches 2 i and 2 i + 1
    "afmoe": set(),  # num_dense_layers counts layers without experts
    "llama4_text": set(),  # moe_layers lists layers by their index
    "recurrent_gemma": set(),  # block_types is repeated over the layers
    "rwkv": set(),  # the norm of the embeddings stays in the first block
    "gpt_neox_japanese": {5},  # only the last attention has a bias
    "modernbert-decoder": {0},  # the first layer has no norm
    "olmo_hybrid": {3},  # the only layer with full attention
}


@pytest.mark.parametrize("family", FIXED)
def test_layers_that_must_stay_are_known_with_the_reason(family):
    removable = removable_layers(tiny_family(family))
    assert removable.free
    assert set(removable.fixed) == FIXED[family]
    for layer, reason in removable.fixed.items():
        assert reason
        with pytest.raises(ValueError, match=rf"layers \[{layer}\] of .* cannot be removed: "):
            removable.check([layer])


@pytest.mark.parametrize("family", ["diffllama", "jamba", "beam", "minimax"])
def test_where_layers_depend_on_their_place_the_best_set_that_fits_is_chosen(family):
    """The choice is the best of all sets of two layers, tried one by one."""
    removable = removable_layers(tiny_family(family))
    assert not removable.free
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(removable.total, generator=generator).tolist()
    pairs = itertools.combinations(range(removable.total), 2)
    valid = [pair for pair in pairs if not removable.fault(pair)]
    if not valid:
        with pytest.raises(ValueError, match="2 layers of .* cannot be removed .*can go"):
            removable.choose(scores, 2)
        return
    best = min(valid, key=lambda pair: sum(scores[i] for i in pair))
    assert removable.choose(scores, 2) == list(best)


def test_a_family_whose_layers_count_the_layers_can_lose_none():
    removable = removable_layers(tiny_family("minicpm3"))
    with pytest.raises(ValueError, match="none of its layers can go; .*residual_scale is .* would"):
        removable.choose([0.0] * NUM_LAYERS, 1)


HYBRIDS = ("qwen3_next", "bamba", "lfm2", "kimi_linear", "nemotron_h", "recurrent_gemma", "zamba2")


@pytest.mark.parametrize("family", HYBRIDS)
def test_one_layer_with_attention_stays_beside_a_recurrence(family):
    """transformers counts the tokens of the cache there: generation would fail without one."""
    removable = removable_layers(tiny_family(family))
    kinds = removable.models.kinds()
    attention = [i for i, kind in enumerate(kinds) if "attention" in kind or kind == "hybrid"]
    attention = [i for i in attention if kinds[i] != "linear_attention"]
    with pytest.raises(ValueError, match="no layer would be left that counts the tokens"):
        removable.check(attention)
    scores = [0.0 if i in attention else 1.0 for i in range(removable.total)]
    chosen = removable.choose(scores, len(attention))
    assert set(attention) - set(chosen)
    assert max(attention) in removable.needed or max(attention) in removable.fixed


def test_too_deep_a_removal_says_how_many_layers_can_go():
    removable = removable_layers(tiny_family("olmo_hybrid"))
    with pytest.raises(ValueError, match=r"3 of 6 layers can go, all but \[0, 3, 5\]; without"):
        removable.choose([0.0] * NUM_LAYERS, 5, protected=[0])


@pytest.mark.parametrize(("family", "carried"), [("zaya", "layer 3 reads"), ("hy_v4", "reads")])
def test_a_layer_that_reads_more_than_hidden_states_keeps_the_layer_it_reads_from(family, carried):
    removable = removable_layers(tiny_family(family))
    source = max(removable.sources.values())
    with pytest.raises(ValueError, match=f"{carried}.* what layer .* beside its hidden states"):
        removable.check([2 if family == "zaya" else source])
    assert removable.choose([float(-i) for i in range(6)], 1) == [5]


@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text"])
def test_layers_whose_keys_and_values_others_share_stay(family):
    removable = removable_layers(tiny_family(family))
    assert {2, 3} <= set(removable.fixed)  # the last of each kind before the layers that share
    assert removable.models.rules.rules == {"num_kv_shared_layers": "layers at the end"}
    assert removable.choose([0.0] * NUM_LAYERS, 2) == [0, 1]


def test_two_streams_of_hidden_states_are_refused():
    with pytest.raises(TypeError, match="reformer hand on two streams"):
        removable_layers(tiny_family("reformer"))


def test_windows_that_cannot_go_are_left_out():
    removable = removable_layers(tiny_family("olmo_hybrid"))
    scores = [0.5, 0.4, 0.1, 0.2, 0.3]  # of the windows 0-1, 1-2, 2-3, 3-4 and 4-5
    assert removable.choose_window(scores, 2) == [4, 5]
    with pytest.raises(ValueError, match="no window of 4 neighbouring layers"):
        removable.choose_window([0.0] * 3, 4)


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (LlamaForCausalLM, LlamaConfig()),
        (Gemma3ForCausalLM, Gemma3TextConfig(num_hidden_layers=48)),
    ],
)
def test_few_outlines_tell_that_all_layers_of_a_large_model_can_go(
    model_class, config, monkeypatch
):
    """One outline of a model of 7 billion weights takes some 30 ms on an idle core."""
    with torch.device("meta"):
        model = model_class(config)
    outlines = []

    def counted(*arguments):
        outlines.append(arguments)
        return outline(*arguments)

    monkeypatch.setattr(shorter_config, "outline", counted)
    removable = removable_layers(model)
    removable.choose([float(i) for i in range(removable.total)], 8)
    assert len(outlines) <= 8
    assert removable.free
    assert removable.fixed == {}
    assert len(outlines) <= 16


@pytest.mark.parametrize("seed", range(4))
def test_choices_under_a_constraint_are_the_best_of_all(seed):
    """Against brute force: each choice of which layer may stay above how many chosen ones."""
    generator = torch.Generator().manual_seed(seed)
    total, count = 7, 3
    scores = torch.rand(total, generator=generator).tolist()
    fits = (torch.rand(total, count + 1, generator=generator) < 0.8).tolist()

    def allowed(chosen):
        below = [sum(c < i for c in chosen) for i in range(total)]
        return all(fits[i][below[i]] for i in range(total) if i not in chosen)

    valid = [c for c in itertools.combinations(range(total), count) if allowed(c)]
    best = min(valid, key=lambda c: sum(scores[i] for i in c))
    assert lowest_scores(scores, count, fits=fits) == list(best)


def test_nothing_of_the_model_is_read_or_changed():
    model = tiny_model("gemma3_text")
    forwards = []
    decoder_layers(model)[0].register_forward_hook(lambda *_: forwards.append(1))
    before = {name: p.clone() for name, p in model.named_parameters()}
    config = model.config.to_dict()
    removable_layers(model).choose([0.0] * NUM_LAYERS, 3)
    assert forwards == []
    assert model.config.to_dict() == config
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
