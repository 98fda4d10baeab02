"""Slicing: rotations that change nothing, components that keep most, and what is refused."""

import copy

import pytest
import torch
from sliced_models import (
    BOTH,
    CUT,
    EACH,
    FULL,
    FULL_CUT_VARIED,
    LAYERS,
    WHOLE,
    WINDOWS,
    D,
    dense_model,
    logits,
    plan_of,
    sliced,
)
from tiny import tiny_model
from torch.nn.functional import kl_div
from transformers import AutoConfig, AutoModelForCausalLM

import prunelight
from prunelight.calibration.statistics import Gram
from prunelight.callbacks import SliceGPT
from prunelight.models.families.layers import decoder_layers
from prunelight.models.families.own_classes.sliced import FAMILIES, UnitNorm
from prunelight.models.sizes import parameter_count
from prunelight.planning.steps import SliceHidden
from prunelight.pruning.slicing.basis import principal_components, random_rotation, signal_of
from prunelight.pruning.slicing.shared_rotation import shared_parameters
from prunelight.pruning.slicing.targets import allowed_widths, sliced_parameters
from prunelight.pruning.slicing.trial import sliced_perplexity


@EACH
@pytest.mark.parametrize(("tied", "signal"), [(True, "residual"), (False, "normalized")])
def test_a_rotated_unsliced_model_equals_the_dense_one(family, tied, signal):
    model = sliced(family, tied, WHOLE, signal=signal, orientation="random")
    expected, found = logits(dense_model(family, tied)), logits(model)
    assert (expected - found).abs().max() < 1e-3
    divergence = kl_div(
        found.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="none"
    )
    assert divergence.sum(-1).mean() < 1e-6
    shortcut = decoder_layers(model)[1].attn_shortcut.weight
    assert (shortcut - torch.eye(D)).abs().max() > 0.1, "nothing was rotated"


@EACH
@FULL_CUT_VARIED
def test_the_parameters_are_those_of_the_formula_and_no_others_are_stored(family, tied, dims):
    expected = sliced_parameters(dense_model(family, tied), dims)
    model = sliced(family, tied, dims)
    assert parameter_count(model) == expected
    stored = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters()}
    assert sum(s.nbytes() for s in stored.values()) == 4 * expected
    assert all(p.is_contiguous() for p in model.parameters())


@EACH
@BOTH
def test_embeddings_that_stay_whole_stay_tied_and_untouched(family, tied):
    model, dense = sliced(family, tied, FULL), dense_model(family, tied)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
    if tied or family != "opt":  # whose LayerNorms take a mean that no basis has room for
        assert torch.equal(model.get_input_embeddings().weight, dense.get_input_embeddings().weight)


@EACH
def test_sliced_embeddings_untie_the_head_and_stay_so(family):
    model = sliced(family, True, CUT)
    assert model.config.tie_word_embeddings is False
    before = logits(model)
    model.tie_weights()
    assert torch.equal(logits(model), before)
    assert model.get_input_embeddings().weight.shape[1] == 24


def test_opt_125m_at_20_percent_has_the_parameters_that_slicegpt_tests_for():
    config = AutoConfig.for_model("opt")  # its defaults are those of opt-125m
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert parameter_count(model) == 125_239_296
    plan = SliceGPT(0.2, embedding="sliced")
    width = plan._width(model)
    assert width == 608
    assert sliced_parameters(model, plan._dims(model, width)) == 147_250_880


def test_heads_groups_and_neurons_stay_as_they_were():
    model = sliced("llama", True, CUT)
    attention, dense = model.model.layers[0].self_attn, dense_model().model.layers[0].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        assert attention.get_submodule(name).out_features == dense.get_submodule(name).out_features
    assert attention.k_proj.out_features < attention.q_proj.out_features
    assert (model.config.head_dim, model.config.hidden_size) == (8, D)


@pytest.mark.parametrize("tied", [True, False])
def test_padding_counts_neither_for_components_nor_for_what_is_computed(tied):
    mask = torch.ones_like(WINDOWS)
    mask[:, :5] = 0
    other = WINDOWS.clone()
    other[:, :5] = 77
    both = [{"input_ids": ids, "attention_mask": mask} for ids in (WINDOWS, other)]
    first, second = (sliced("llama", tied, FULL, windows) for windows in both)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_later_layers_see_what_sliced_layers_put_out():
    narrow = sliced("llama", True, (D, 8, 8, *[24] * (2 * LAYERS - 3), D))
    wide = sliced("llama", True, FULL)
    last = [model.model.layers[5].self_attn.q_proj.weight for model in (narrow, wide)]
    assert not torch.allclose(*last, atol=1e-3)


def test_gram_matrices_are_exact_in_float64_over_any_split():
    x = torch.randn(500, 700, dtype=torch.float64)
    gram = Gram(700)
    for part in x.split(77):
        gram.update(part)
    assert gram.result().dtype == torch.float64
    assert torch.allclose(gram.result(), x.T @ x, rtol=1e-13, atol=1e-11)


def test_principal_components_are_orthonormal_ordered_and_keep_the_most_energy():
    torch.manual_seed(0)
    x = torch.randn(200, 12, dtype=torch.float64) * torch.linspace(3, 0.1, 12)
    basis, explained = principal_components(x.T @ x, 5)
    assert torch.allclose(basis.T @ basis, torch.eye(5, dtype=torch.float64), atol=1e-12)
    energies = (x @ basis).square().sum(0)
    assert (energies.diff() <= 0).all()
    assert explained == pytest.approx((energies.sum() / x.square().sum()).item())
    left = torch.linalg.svdvals(x)[:5].square().sum() / x.square().sum()
    assert explained == pytest.approx(left.item())
    assert (basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all()


def test_a_random_rotation_is_orthogonal_and_belongs_to_its_seed():
    first, again, other = (
        random_rotation(9, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert torch.allclose(first @ first.T, torch.eye(9, dtype=torch.float64), atol=1e-12)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_turning_the_components_changes_no_logit():
    pca, random = (
        logits(sliced("llama", False, CUT, orientation=kind)) for kind in ("pca", "random")
    )
    assert (pca - random).abs().max() < 1e-4


def test_a_normalized_signal_gives_each_token_the_same_energy():
    states = torch.randn(6, 10) * torch.logspace(-3, 3, 6)[:, None]
    energy = signal_of(states, "normalized", centered=False).square().sum(1)
    assert torch.allclose(energy, torch.full((6,), 10.0, dtype=torch.float64))
    assert signal_of(states, "residual", centered=True).mean(1).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_of_narrow_states_divides_by_the_dense_width(dtype):
    states = torch.randn(3, 24).to(dtype)
    padded = torch.cat([states, torch.zeros(3, 8, dtype=dtype)], 1).float()
    expected = padded * torch.rsqrt(padded.square().mean(-1, keepdim=True) + 1e-3)
    found = UnitNorm(32, 1e-3)(states)
    assert found.dtype == dtype
    assert torch.allclose(
        found.float(), expected[:, :24], atol=1e-2 if dtype != torch.float32 else 1e-6
    )


def test_explained_variance_has_a_number_for_each_site_and_grows_with_the_width():
    told = []
    for dims in (CUT, (*[28] * (2 * LAYERS), D)):
        model = copy.deepcopy(dense_model())
        prunelight.apply(model, plan_of(model, dims), WINDOWS, outcomes=(outcomes := []))
        told.append(outcomes[0]["explained_variance"])
    assert [len(x) for x in told] == [2 * LAYERS + 1] * 2
    assert all(0 < a < b <= 1 for a, b in zip(*(x[:2] for x in told), strict=True))
    assert told[0][-1] == 1


def test_wider_models_are_closer_to_the_dense_one():
    expected = logits(dense_model())
    errors = [
        (logits(sliced("llama", True, (D, *[w] * (2 * LAYERS - 1), D))) - expected).abs().mean()
        for w in (8, 16, 24, 30)
    ]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "opt", "gemma"])
def test_a_trial_tells_the_perplexity_of_the_model_that_would_result(family, tied):
    model = dense_model(family, tied)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    step = SliceHidden(CUT)
    found = sliced_perplexity(model, WINDOWS, step, held_out=3)
    result = sliced(family, tied, CUT, WINDOWS[:5])
    assert found == pytest.approx(prunelight.perplexity(result, WINDOWS[5:]), rel=1e-4)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert model.config.tie_word_embeddings is tied


SHARED = [family for family in FAMILIES if family != "opt"]


@pytest.mark.parametrize("family", SHARED)
@BOTH
def test_one_rotation_leaves_a_stock_model_that_equals_the_dense_one_at_full_width(family, tied):
    model = sliced(family, tied, WHOLE, rotation="shared")
    assert type(model) is type(dense_model(family, tied))
    assert (logits(model) - logits(dense_model(family, tied))).abs().max() < 1e-3


@pytest.mark.parametrize("family", SHARED)
@BOTH
def test_one_rotation_gives_a_smaller_stock_model_that_reloads(
    family, tied, tmp_path, tiny_tokenizer
):
    dims = (24,) * (2 * LAYERS + 1)
    model = sliced(family, tied, dims, rotation="shared")
    assert parameter_count(model) == shared_parameters(dense_model(family, tied), 24)
    prunelight.save(model, tiny_tokenizer, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again).__module__.startswith("transformers.")
    assert again.config.hidden_size == 24
    assert torch.equal(logits(again), logits(model))
    assert (logits(model) - logits(dense_model(family, tied))).abs().mean() > 1e-4


def test_a_llama_of_one_rotation_needs_a_width_that_its_heads_divide():
    assert allowed_widths(dense_model(), 8) == [8, 16, 24, 32]
    model = tiny_model(num_attention_heads=6, num_key_value_heads=2, hidden_size=48, head_dim=8)
    assert allowed_widths(model, 8) == [24, 48]
    assert SliceGPT(0.2, rotation="shared").plan(model, WINDOWS).steps[0].residual_dims[0] == 24
    with pytest.raises(ValueError, match="LlamaConfig accepts no hidden_size of at most 16"):
        SliceGPT(0.6, rotation="shared").check(model)


REFUSED = {
    "gemma2": "gemma2 has norms after its sublayers, which do not commute with rotations",
    "olmo2": "olmo2 has norms after its sublayers",
    "gpt2": "gpt2 has no sliced class; families that can be sliced: .*'llama'",
    "mixtral": "mixtral has no sliced class",
}


@pytest.mark.parametrize("family", REFUSED)
def test_families_that_cannot_be_sliced_are_named_with_those_that_can(family):
    with pytest.raises(TypeError, match=REFUSED[family]):
        SliceGPT(0.25).check(tiny_model(family))


@pytest.mark.parametrize(
    "changes", [{"do_layer_norm_before": False}, {"word_embed_proj_dim": 16}], ids=str
)
def test_an_opt_with_norms_after_or_projected_embeddings_is_refused(changes):
    with pytest.raises(TypeError, match="this OPT has norms after .*opt-350m.*cannot be sliced"):
        SliceGPT(0.25).check(tiny_model("opt", **changes))


def test_one_rotation_is_refused_before_layer_norms():
    with pytest.raises(TypeError, match="leaves no stock opt: its LayerNorms .*per_layer"):
        SliceGPT(0.25, rotation="shared").check(tiny_model("opt"))


BAD_STEPS = {
    "too few widths": (CUT[:-1], {}, r"residual_dims has 12 widths, 6 decoder layers need 13"),
    "too wide": ((*CUT[:3], 40, *CUT[4:]), {}, r"residual_dims\[3\]=40 must be at most .*=32"),
    "a cut head": ((24,) * 13, {}, r"residual_dims\[12\]=24 must be hidden_size=32.*shared"),
    "no width": ((0, *CUT[1:]), {}, "must be whole numbers above 0"),
    "uneven and shared": (CUT, {"rotation": "shared"}, "needs the same width everywhere"),
    "signal": (CUT, {"signal": "x"}, "signal='x' must be one of residual, normalized"),
    "orientation": (CUT, {"orientation": "x"}, "orientation='x' must be one of pca, random"),
}


@pytest.mark.parametrize("case", BAD_STEPS)
def test_a_step_that_does_not_fit_leaves_the_model_as_it_was(case):
    dims, options, message = BAD_STEPS[case]
    model = copy.deepcopy(dense_model())
    with pytest.raises(ValueError, match=message):
        prunelight.apply(model, plan_of(model, dims, **options), WINDOWS)
    assert torch.equal(logits(model), logits(dense_model()))


def test_slicing_needs_windows_and_as_many_tokens_as_the_model_is_wide():
    model = copy.deepcopy(dense_model())
    with pytest.raises(ValueError, match="slicing needs calibration windows; pass them to apply"):
        prunelight.apply(model, plan_of(model, CUT))
    message = "16 calibration tokens are too few for the 32 .* give at least 32 tokens"
    with pytest.raises(ValueError, match=message):
        prunelight.apply(model, plan_of(model, CUT), WINDOWS[:1])
    padded = {"input_ids": WINDOWS, "attention_mask": torch.zeros_like(WINDOWS)}
    padded["attention_mask"][:, :3] = 1
    with pytest.raises(ValueError, match="24 calibration tokens are too few"):
        SliceGPT(0.25).plan(model, padded)


def test_states_of_too_few_directions_are_named_by_their_site_and_rank():
    model, same = copy.deepcopy(dense_model()), torch.arange(5, 17).repeat(8, 1)
    with pytest.raises(ValueError, match=r"residual_dims\[1\]=24: .* only 12 directions of the 24"):
        prunelight.apply(model, plan_of(model, FULL), same)


def test_states_that_are_nan_are_refused():
    model = copy.deepcopy(dense_model())
    model.model.layers[2].mlp.down_proj.weight.data.fill_(3e38)
    model.model.layers[2].post_attention_layernorm.weight.data.fill_(1e30)  # overflows
    with pytest.raises((ValueError, TypeError), match="NaN or Inf|cannot be run on its own"):
        prunelight.apply(model, plan_of(model, CUT), WINDOWS)
