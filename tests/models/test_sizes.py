"""Parameters, bytes and zeros of a model."""

import pytest
import torch
from tiny import tiny_model

from prunelight.models.sizes import parameter_bytes, parameter_count, zero_share


def test_parameters_and_bytes_count_tied_embeddings_once():
    model, tied = (tiny_model(tie_word_embeddings=tie) for tie in (False, True))
    embeddings = model.get_input_embeddings().weight.numel()
    assert parameter_count(model) - parameter_count(tied) == embeddings
    assert parameter_bytes(model) - parameter_bytes(tied) == 4 * embeddings


def test_only_trainable_parameters_are_counted_if_asked():
    model = tiny_model()
    model.requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    assert parameter_count(model, trainable=True) == 32
    assert parameter_count(model) > 32


def test_a_parameter_of_bfloat16_takes_two_bytes():
    model = tiny_model(dtype=torch.bfloat16)
    assert parameter_bytes(model) == 2 * parameter_count(model)


def test_the_share_of_zeros_is_that_of_all_weights_with_tied_ones_counted_once():
    first, second = torch.ones(3, 4), torch.ones(8)
    first[0, :3] = 0.0
    second[0] = -0.0
    assert zero_share([first, second]) == 4 / 20
    assert zero_share([first, second, first]) == 4 / 20
    assert zero_share(tensor.T for tensor in (first,)) == 3 / 12


def test_tiny_weights_are_no_zeros():
    smallest = torch.finfo(torch.bfloat16).tiny
    assert zero_share([torch.full((4,), smallest, dtype=torch.bfloat16)]) == 0


def test_without_weights_there_are_no_zeros():
    assert zero_share([]) == 0
    assert zero_share([torch.empty(0)]) == 0


@pytest.mark.parametrize(
    "packed",
    [
        torch.zeros(4, 1, dtype=torch.uint8),
        torch.zeros(4, dtype=torch.int8),
        torch.zeros(4, dtype=torch.float8_e4m3fn),
        torch.zeros(4, device="meta"),
    ],
)
def test_zeros_of_packed_or_absent_weights_are_not_counted(packed):
    assert zero_share([torch.zeros(4), packed]) == 0


def test_embeddings_that_are_tied_to_the_head_are_counted_once():
    model, tied = (tiny_model(tie_word_embeddings=tie) for tie in (False, True))
    for each in (model, tied):
        each.requires_grad_(False)
        each.get_input_embeddings().weight.zero_()
    embeddings = model.get_input_embeddings().weight.numel()
    for each in (model, tied):
        expected = pytest.approx(embeddings / parameter_count(each), rel=1e-12)
        assert zero_share(each.parameters()) == expected
