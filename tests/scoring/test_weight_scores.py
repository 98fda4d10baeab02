"""Scores of a layer's weights and their inputs, against plain computations."""

import math

import pytest
import reference_sparsity as reference
import torch
from lively_models import hooks, lively_model, padded
from tiny import NUM_LAYERS, token_windows

from prunelight.models.families.layers import decoder_layers
from prunelight.models.families.matrices import layer_matrices, matrices
from prunelight.scoring.weight_scores import weight_scores

WINDOWS = token_windows(4, 16)


@pytest.fixture(scope="module")
def model():
    """Read-only: scoring changes nothing (end_to_end/test_families.py)."""
    return lively_model()


WEIGHT_SCORES = ["median", "mean", "sum", "max", "std", "var", "outlier_ratio"]
every_weight_score = pytest.mark.parametrize("kind", WEIGHT_SCORES)


@every_weight_score
@pytest.mark.parametrize("by_matrix", [False, True], ids=["layer", "matrix"])
def test_weight_scores_equal_a_plain_computation(model, kind, by_matrix):
    found = weight_scores(model, WINDOWS, kind, outlier_factor=2.5, by_matrix=by_matrix)
    assert list(found) == list(matrices(model))
    expected = reference.layer_scores(model, WINDOWS, outlier_factor=2.5, per_linear=by_matrix)[
        kind
    ]
    # Ours are of the root mean square over tokens, theirs of the norm.
    power = {"outlier_ratio": 0.0, "var": 1.0}.get(kind, 0.5)
    unit = WINDOWS.numel() ** power
    units = [[m.name for m in layer_matrices(model, index)] for index in range(NUM_LAYERS)]
    units = [[name] for name in found] if by_matrix else units
    for names, value in zip(units, expected, strict=True):
        # Float32 against float64.
        assert [unit * found[name] for name in names] == pytest.approx([value] * len(names), 1e-5)


def test_sums_of_layers_of_one_size_rank_as_their_means_and_variances_as_deviations(model):
    scores = {kind: weight_scores(model, WINDOWS, kind) for kind in ("sum", "mean", "std", "var")}
    ranks = {kind: sorted(found, key=found.__getitem__) for kind, found in scores.items()}
    assert ranks["sum"] == ranks["mean"]
    assert ranks["std"] == ranks["var"]
    for name, deviation in scores["std"].items():
        assert deviation**2 == pytest.approx(scores["var"][name], rel=1e-12)


def test_of_equal_weights_and_norms_each_statistic_is_their_one_value_or_their_sum_or_zero():
    model = lively_model()
    with torch.no_grad():
        for matrix in layer_matrices(model, 1):
            matrix.parameter.fill_(0.25)
        # All hidden features of all tokens are 1 after a norm of equal states.
        model.model.embed_tokens.weight.fill_(1.0)
        for matrix in layer_matrices(model, 0):
            matrix.parameter.zero_()
        for name, parameter in model.named_parameters():
            if "layers.1.input_layernorm" in name:
                parameter.fill_(1.0)
    name = "model.layers.1.self_attn.q_proj"
    size = matrices(model)[name].parameter.numel()
    found = {
        kind: weight_scores(model, WINDOWS, kind, by_matrix=True)[name] for kind in WEIGHT_SCORES
    }
    for kind in ("median", "mean", "max"):
        assert found[kind] == pytest.approx(0.25, rel=1e-5)
    assert found["sum"] == pytest.approx(0.25 * size, rel=1e-5)
    assert found["std"] == pytest.approx(0, abs=1e-6)
    assert found["var"] == pytest.approx(0, abs=1e-12)


@every_weight_score
def test_weight_scores_do_not_depend_on_how_often_windows_are_repeated(kind):
    # One token: some experts see none.
    for family, windows in (("llama", WINDOWS), ("mixtral", WINDOWS[:1, :1])):
        model = lively_model(family)
        repeated = weight_scores(model, torch.cat([windows] * 5), kind)
        # Batches of other sizes are summed in another order.
        assert repeated == pytest.approx(weight_scores(model, windows, kind), rel=1e-3)


@every_weight_score
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_padding_changes_no_weight_score(model, kind, left):
    found = weight_scores(model, padded(WINDOWS, left=left), kind, device=torch.device("cpu:0"))
    assert found == pytest.approx(weight_scores(model, WINDOWS, kind, offload=True), rel=1e-3)


def test_the_outlier_factor_says_what_an_outlier_is(model):
    ratios = [
        set(weight_scores(model, WINDOWS, "outlier_ratio", outlier_factor=m).values())
        for m in (0.0, 1e6)
    ]
    assert ratios == [{1}, {0}]


@every_weight_score
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_matrix_whose_inputs_are_nan_or_inf_is_named(kind, value):
    model = lively_model().train()
    with torch.no_grad():
        decoder_layers(model)[2].post_attention_layernorm.weight[0] = value
    message = r"model\.layers\.2\.mlp\.gate_proj: inputs are NaN or Inf; load the model in"
    with pytest.raises(ValueError, match=message):
        weight_scores(model, WINDOWS, kind)
    assert model.training
    assert hooks(model) == [0] * len(hooks(model))
