"""Removing experts: unused ones change nothing, and the result is a stock model."""

import copy

import pytest
import torch
from expert_models import IDLE, MIXTURES, NUM_EXPERTS, WINDOWS, make_idle, mixture
from tiny import tiny_model
from tiny_families import tiny_family
from transformers import AutoModelForCausalLM

import prunelight
from prunelight.models.families.experts.layout import experts_of
from prunelight.models.forward import greedy_tokens
from prunelight.planner.counting import planned_size
from prunelight.planning.fingerprints import describe_model
from prunelight.planning.plan import Plan
from prunelight.planning.steps import RemoveExperts, RemoveLayers, Sparsify
from prunelight.pruning.remove_experts import remove_experts


def step_of(model, gone=IDLE):
    return RemoveExperts({str(layer): tuple(gone) for layer in experts_of(model).layers})


def plan_of(model, *steps):
    return Plan("by hand", {}, describe_model(model), steps)


@torch.no_grad()
def logits(model, ids=WINDOWS):
    return model(ids, use_cache=False).logits


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_that_no_token_takes_change_no_logits(family):
    model = make_idle(mixture(family))
    dense = logits(model)
    prunelight.apply(model, plan_of(model, step_of(model)))
    assert experts_of(model).count == NUM_EXPERTS - len(IDLE)
    # Kernels add in another order where fewer experts are stacked.
    torch.testing.assert_close(logits(model), dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", MIXTURES)
def test_other_experts_change_logits(family):
    model = make_idle(mixture(family))
    dense = logits(model)
    prunelight.apply(model, plan_of(model, step_of(model, (0, 2))))
    assert (logits(model) - dense).abs().max() > 1e-3


@pytest.mark.parametrize("family", MIXTURES)
def test_removing_no_expert_changes_nothing(family):
    model = mixture(family)
    dense = logits(model)
    prunelight.apply(model, plan_of(model, step_of(model, ())))
    assert torch.equal(logits(model), dense)


@pytest.mark.parametrize("family", MIXTURES)
def test_the_result_reloads_as_the_stock_class_and_generates(family, tmp_path):
    model = mixture(family)
    stock, before = type(model), sum(p.numel() for p in model.parameters())
    plan = plan_of(model, step_of(model))
    size = planned_size(model, plan)
    prunelight.apply(model, plan)
    assert size.before == before
    assert size.after == sum(p.numel() for p in model.parameters()) < before
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is stock
    stored, reloaded = model.state_dict(), again.state_dict()
    assert stored.keys() == reloaded.keys()
    assert all(torch.equal(stored[name], reloaded[name]) for name in stored)
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(
        greedy_tokens(again, WINDOWS, 4), greedy_tokens(again, WINDOWS, 4, use_cache=False)
    )


def test_experts_stand_in_files_one_by_one_where_the_family_stores_them_so(tmp_path):
    from safetensors.torch import load_file

    model = mixture("mixtral")
    kept = model.model.layers[3].mlp.experts.down_proj[5].clone()
    prunelight.apply(model, plan_of(model, step_of(model)))
    model.save_pretrained(tmp_path)
    files = load_file(tmp_path / "model.safetensors")
    names = {
        n.split("experts.")[1].split(".")[0] for n in files if "layers.3" in n and "experts." in n
    }
    assert names == {"0", "1", "2", "3"}
    last = [n for n in files if "layers.3" in n and "experts.3.w2" in n]
    assert torch.equal(files[last[0]], kept)


def test_layers_are_counted_as_in_the_dense_model_after_others_are_removed():
    model = make_idle(mixture("qwen3_moe"))
    steps = (
        RemoveLayers((0, 1)),
        RemoveExperts({"3": IDLE, "5": IDLE}),
        Sparsify({"model.layers.3.mlp.experts.down_proj": 0.5}, "magnitude"),
    )
    shorter = copy.deepcopy(model)
    prunelight.apply(shorter, plan_of(shorter, steps[0]))
    expected = logits(shorter)
    prunelight.apply(model, plan_of(model, *steps[:2]))
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert experts_of(model).layers == [1, 3]
    zeros = make_idle(mixture("qwen3_moe"))
    prunelight.apply(zeros, plan_of(zeros, *steps))
    weight = zeros.model.layers[1].mlp.experts.down_proj
    assert weight.shape[0] == 4
    assert (weight == 0).float().mean() == 0.5


def test_groups_of_a_router_stay_equally_large():
    model = tiny_family("deepseek_v3")  # 6 experts in 2 groups
    experts = experts_of(model)
    assert (experts.groups, experts.top_k, experts.fewest) == (2, 2, 4)
    with pytest.raises(ValueError, match=r"take \[2, 0\] from the 2 groups of deepseek_v3"):
        remove_experts(model, dict.fromkeys(experts.layers, (0, 1)))
    with pytest.raises(ValueError, match="must be a multiple of 2 for deepseek_v3"):
        remove_experts(model, dict.fromkeys(experts.layers, (0,)))
    remove_experts(model, dict.fromkeys(experts.layers, (0, 5)))
    assert experts_of(model).count == 4
    assert logits(model).isfinite().all()


MIXTRAL = [str(layer) for layer in range(6)]


@pytest.mark.parametrize(
    ("experts", "error"),
    [
        (dict.fromkeys(MIXTRAL, (6,)), r"experts=\[6\] of layer 0 must lie in \[0, 5\]"),
        (dict.fromkeys(MIXTRAL, (1, 1)), "of layer 0 must not name an expert twice"),
        (dict.fromkeys(MIXTRAL, (0, 1, 2, 3, 4)), r"=5 must lie in \[0, 4\].*a token takes 2 of 6"),
        (
            {**dict.fromkeys(MIXTRAL, (1,)), "2": (1, 3)},
            "removes 1 to 2 experts a layer; remove equ",
        ),
        ({"0": (1,)}, r"must name each layer that is left and has experts; see layers \[1, 2"),
        ({"7": (1,)}, r"experts of layers=\[7\] must lie in \[0, 5\]"),
    ],
)
def test_impossible_steps_are_refused_and_name_the_rule(experts, error):
    model = mixture("mixtral")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=error) as caught:
        prunelight.apply(model, plan_of(model, RemoveExperts(experts)))
    assert "\n" not in str(caught.value)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("experts", [[1], {"a": [1]}, {"0": "1"}, {"0": [1.5]}])
def test_what_is_no_list_of_experts_a_layer_is_refused(experts):
    with pytest.raises(ValueError, match="must be"):
        RemoveExperts(experts)


def test_a_dense_layer_among_others_is_refused():
    model = mixture("qwen3_moe")
    with pytest.raises(ValueError, match=r"layers \[0\] have none"):
        prunelight.apply(model, plan_of(model, RemoveExperts(dict.fromkeys("0135", (1,)))))


def test_models_without_experts_and_second_steps_are_refused():
    llama = tiny_model()
    with pytest.raises(TypeError, match="llama has no experts"):
        prunelight.apply(llama, plan_of(llama, RemoveExperts({"0": (1,)})))
    model = mixture("mixtral")
    with pytest.raises(ValueError, match="remove experts once in a plan"):
        prunelight.apply(model, plan_of(model, step_of(model, (0,)), step_of(model, (1,))))


def test_a_table_that_names_experts_forbids_their_removal():
    model = tiny_family("deepseek_v4")
    with pytest.raises(ValueError, match="tid2eid of layer 0 names experts by their number"):
        prunelight.apply(model, plan_of(model, step_of(model, (0,))))


def test_quantized_experts_are_refused():
    model = mixture("mixtral")
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = torch.nn.Parameter(experts.down_proj.to(torch.float8_e4m3fn), False)
    with pytest.raises(
        TypeError, match=r"down_proj of mixtral is quantized .*; *prune first|prune"
    ):
        experts_of(model)
