"""LAMP's scores and the zeros that they give each matrix, against plain computations."""

import math

import pytest
import reference_sparsity as reference
import torch
from tiny import tiny_model

from prunelight.models.families.layers import decoder_layers
from prunelight.models.families.matrices import matrices
from prunelight.pruning.sparsity.lamp import lamp_scores, lamp_shares
from prunelight.pruning.sparsity.masks import count_zeros


def test_a_score_is_a_square_over_the_squares_of_those_not_smaller():
    scores = lamp_scores(torch.tensor([[3.0, -1.0], [0.0, 2.0]]))
    assert scores.tolist() == pytest.approx([1, 4 / 13, 1 / 14, 0])


def test_equal_weights_have_the_reciprocals_of_their_ranks():
    assert lamp_scores(torch.full((2, 2), -0.3)).tolist() == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])


def test_a_matrix_of_zeros_has_scores_of_zero():
    assert lamp_scores(torch.zeros(2, 3)).tolist() == [0] * 6


@pytest.mark.parametrize("target", [0.0, 0.001, 0.3, 0.7, 0.95, 0.999])
def test_the_zeros_of_all_matrices_are_the_target_and_the_lowest_scores(target):
    model = tiny_model()
    sizes = {name: matrix.parameter.numel() for name, matrix in matrices(model).items()}
    shares = lamp_shares(model, target, by_matrix=True)
    zeros = {name: round(share * sizes[name]) for name, share in shares.items()}
    assert sum(zeros.values()) == count_zeros(sum(sizes.values()), target)
    scores = {name: lamp_scores(matrix.parameter) for name, matrix in matrices(model).items()}
    kept = {name: len(scores[name]) - number for name, number in zeros.items()}
    lost = max((float(scores[n][k]) for n, k in kept.items() if zeros[n]), default=0.0)
    assert lost <= min(float(scores[n][k - 1]) for n, k in kept.items() if k)
    expected = reference.lamp(model, target)
    assert {n: s * sizes[n] for n, s in shares.items()} == pytest.approx(
        {n: s * sizes[n] for n, s in expected.items()}, abs=1
    )


def test_scaling_a_matrix_changes_no_share():
    model = tiny_model()
    before = lamp_shares(model, 0.6, by_matrix=True)
    with torch.no_grad():
        decoder_layers(model)[2].mlp.up_proj.weight.mul_(64)
    assert lamp_shares(model, 0.6, by_matrix=True) == before


def test_equal_matrices_get_equal_shares_of_zeros_up_to_the_last():
    model = tiny_model()
    with torch.no_grad():
        for layer in decoder_layers(model):
            layer.load_state_dict(decoder_layers(model)[0].state_dict())
    shares = lamp_shares(model, 0.6)
    assert max(shares.values()) - min(shares.values()) < 1e-3


def test_experts_are_ranked_one_by_one_and_a_layer_has_one_share():
    model = tiny_model("qwen3_moe")
    sizes = {name: matrix.parameter.numel() for name, matrix in matrices(model).items()}
    for by_matrix in (True, False):
        shares = lamp_shares(model, 0.5, by_matrix=by_matrix)
        mean = reference.weighted_mean([shares[name] for name in sizes], list(sizes.values()))
        assert mean == pytest.approx(0.5, abs=1e-4)
    assert len(set(shares.values())) <= len(decoder_layers(model))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_nan_or_inf_is_named(value):
    model = tiny_model()
    with torch.no_grad():
        decoder_layers(model)[1].mlp.down_proj.weight[0, 0] = value
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.down_proj: the weight of shape"):
        lamp_shares(model, 0.5)
