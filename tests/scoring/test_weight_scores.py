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


WEIGHT_SCORES = ["median", "mean", "outlier_ratio"]
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
    unit = 1 if kind == "outlier_ratio" else math.sqrt(WINDOWS.numel())
    units = [[m.name for m in layer_matrices(model, index)] for index in range(NUM_LAYERS)]
    units = [[name] for name in found] if by_matrix else units
    for names, value in zip(units, expected, strict=True):
        # Float32 against float64.
        assert [unit * found[name] for name in names] == pytest.approx([value] * len(names), 1e-4)


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
