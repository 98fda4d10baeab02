"""Scores of experts: those of a loop over tokens, and what a token gets adds up to the layer's."""

import pytest
import torch
from expert_models import IDLE, MIXTURES, WINDOWS, make_idle, mixture, naive_scores
from tiny import tiny_model, token_windows
from tiny_families import tiny_family

from prunelight.models.families.experts.layout import experts_of
from prunelight.models.families.experts.routed import check_scorable
from prunelight.models.families.layers import decoder_layers
from prunelight.scoring.experts.expert_scores import expert_scores


@pytest.mark.parametrize("family", MIXTURES)
def test_scores_are_those_of_a_loop_over_tokens(family):
    model = mixture(family)
    naive = naive_scores(model, WINDOWS)
    reap, frequency = expert_scores(model, WINDOWS), expert_scores(model, WINDOWS, "frequency")
    assert set(reap) == set(naive)
    for layer, (scores, shares) in naive.items():
        torch.testing.assert_close(reap[layer], torch.tensor(scores), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(frequency[layer], torch.tensor(shares))
        assert frequency[layer].sum().item() == pytest.approx(2)  # a token takes two


def test_padding_does_not_count():
    model, ids = mixture("mixtral"), token_windows(3, 12)
    mask = torch.ones_like(ids)
    mask[0, 7:], mask[1, :4] = 0, 0
    naive = naive_scores(model, ids, mask)
    scores = expert_scores(model, {"input_ids": ids, "attention_mask": mask})
    for layer, (expected, _) in naive.items():
        torch.testing.assert_close(scores[layer], torch.tensor(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_that_no_token_takes_score_zero(family):
    for scores in expert_scores(make_idle(mixture(family)), WINDOWS).values():
        assert scores[[*IDLE]].tolist() == [0, 0]
        assert (scores > 0).sum() >= 2


def test_the_model_is_unchanged_and_runs_in_every_implementation_of_experts_alike():
    model = mixture("gpt_oss")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    model.set_experts_implementation("eager")
    eager = expert_scores(model, WINDOWS)
    model.set_experts_implementation("grouped_mm")
    grouped = expert_scores(model, WINDOWS)
    for layer in eager:
        torch.testing.assert_close(eager[layer], grouped[layer], rtol=1e-4, atol=1e-6)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_infinite_outputs_are_refused():
    model = mixture("mixtral")
    decoder_layers(model)[2].mlp.experts.down_proj.data[0] = torch.inf
    with pytest.raises(ValueError, match=r"experts in decoder layer 2 are NaN or Inf; load"):
        expert_scores(model, WINDOWS)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("llama4_text", r"cannot be scored: Llama4TextExperts is not called as experts\(hidden"),
        ("jetmoe", r"layer 0 of jetmoe has several sets of experts"),
        ("longcat_flash", r"no experts that can be removed: .*n_routed_experts: mlp\.experts"),
        ("zaya", r"no experts that can be removed: .*balancing_biases"),
    ],
)
def test_families_that_cannot_be_scored_say_why_in_one_line(family, reason):
    model = tiny_family(family)
    with pytest.raises(TypeError, match=reason) as caught:
        check_scorable(model, experts_of(model))
    assert "\n" not in str(caught.value)


def test_a_model_without_experts_is_refused():
    with pytest.raises(TypeError, match="llama has no experts whose weights are stacked"):
        expert_scores(tiny_model(), WINDOWS)


@pytest.mark.parametrize(
    "family",
    [
        *("mixtral", "deepseek_v3", "gpt_oss", "glm4_moe", "granitemoe", "nemotron_h", "phimoe"),
        *(
            pytest.param(name, marks=pytest.mark.sweep)
            for name in ("aria_text", "hunyuan_v1_moe", "jamba", "lfm2_moe", "olmoe", "qwen2_moe")
        ),
    ],
)
def test_gate_times_output_of_its_experts_is_what_the_layer_gives_a_token(family):
    """What REAP weighs is what the module adds up, for gates and outputs of any family."""
    model = tiny_family(family)
    experts = experts_of(model)
    check_scorable(model, experts)
    layer, path = next(iter(experts.holders.items()))
    module, checked = decoder_layers(model)[layer].get_submodule(path), []

    def compare(_, args, kwargs, output):
        hidden, indices, gates = [*args, *kwargs.values()]
        one = torch.ones_like(gates[:, :1])
        parts = [
            module.forward(hidden, indices[:, k : k + 1], one) * gates[:, k : k + 1]
            for k in range(indices.shape[1])
        ]
        torch.testing.assert_close(sum(parts), output, rtol=1e-4, atol=1e-5)
        checked.append(layer)

    handle = module.register_forward_hook(compare, with_kwargs=True)
    with torch.no_grad():
        model(token_windows(2, 8) % 90, use_cache=False)
    handle.remove()
    assert checked == [layer]
