"""Masks of full training: zeros and their optimizer state stay zero."""

import gc

import pytest
import torch
from torch import nn
from zeros import put_zeros

from prunelight.models.families.matrices import Matrix
from prunelight.recovery.zeros.weight_masks import WeightMasks, ZeroRecord, pack_mask, unpack_mask


def linear(rows=6, columns=8):
    torch.manual_seed(0)
    matrix = Matrix("layer", nn.Linear(columns, rows))
    put_zeros([matrix])
    return matrix


def train(matrix, optimizer, steps=3, clip=None, weight=None):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(5, matrix.in_features, generator=generator)
        used = matrix.parameter if weight is None else weight()
        (x @ used.T).square().sum().backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([matrix.parameter], clip)
        optimizer.step()
        optimizer.zero_grad()


# --- bits


@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (9,), (3, 5), (2, 3, 11)])
def test_masks_survive_packing(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    bits = pack_mask(mask)
    assert (bits.dtype, bits.numel()) == (torch.uint8, (mask.numel() + 7) // 8)
    assert torch.equal(unpack_mask(bits, mask), mask)


def test_bits_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"16 packed bits do not fit shape \(3, 8\)"):
        unpack_mask(pack_mask(torch.ones(2, 8) > 0), torch.ones(3, 8))


# --- full training


OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "Adam, amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, weight_decay=0.1),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
}


@pytest.fixture(params=OPTIMIZERS)
def make_optimizer(request):
    return OPTIMIZERS[request.param]


def test_zeros_and_their_state_stay_zero(make_optimizer):
    matrix = linear()
    before, pruned = matrix.parameter.detach().clone(), matrix.parameter == 0
    optimizer = make_optimizer([matrix.parameter])
    masks = WeightMasks([matrix])
    masks.watch(optimizer)
    train(matrix, optimizer)
    masks.check()
    assert torch.equal(matrix.parameter == 0, pruned)
    assert not torch.signbit(matrix.parameter[pruned]).any(), "0.0, not -0.0"
    assert not torch.equal(matrix.parameter, before)
    states = [
        value
        for value in optimizer.state[matrix.parameter].values()
        if value is not None and value.shape == pruned.shape
    ]
    assert all((value[pruned] == 0).all() for value in states)


def test_state_from_before_the_masks_is_forgotten():
    matrix = linear()
    optimizer = OPTIMIZERS["AdamW"]([matrix.parameter])
    train(matrix, optimizer)
    put_zeros([matrix], seed=5)
    pruned = matrix.parameter == 0
    state = optimizer.state[matrix.parameter]
    assert (state["exp_avg"][pruned] != 0).any()
    WeightMasks([matrix]).apply(optimizer)
    assert (state["exp_avg"][pruned] == 0).all()
    assert (state["exp_avg_sq"][pruned] == 0).all()
    assert (state["exp_avg"][~pruned] != 0).all()


def test_training_with_masks_is_training_of_the_masked_weight(make_optimizer):
    """Clipping and optimizers that mix entries of a matrix see the gradient of m * W."""
    matrix, plain = linear(), linear()
    masks = WeightMasks([matrix])
    optimizer = make_optimizer([matrix.parameter])
    masks.watch(optimizer)
    train(matrix, optimizer, clip=0.5)
    mask = plain.parameter != 0
    train(
        plain,
        make_optimizer([plain.parameter]),
        clip=0.5,
        weight=lambda: plain.parameter * mask,
    )
    assert torch.equal(matrix.parameter, plain.parameter * mask)


def test_codes_of_an_8_bit_optimizer_are_left_alone():
    matrix = linear()
    optimizer = torch.optim.SGD([matrix.parameter])
    codes = torch.full(matrix.parameter.shape, 7, dtype=torch.uint8)
    optimizer.state[matrix.parameter]["codes"] = codes
    WeightMasks([matrix]).apply(optimizer)
    assert (codes == 7).all()


def test_dense_masks_shrink_and_never_grow():
    matrix = Matrix("layer", nn.Linear(8, 6))
    masks = WeightMasks([matrix])
    optimizer = OPTIMIZERS["AdamW"]([matrix.parameter])
    masks.watch(optimizer)
    train(matrix, optimizer)
    assert (matrix.parameter != 0).all()
    first, second = (torch.ones(6, 8, dtype=torch.bool) for _ in range(2))
    first[:, 0] = second[0] = False
    masks.update("layer", first)
    assert (matrix.parameter[:, 0] == 0).all()
    masks.update("layer", second)
    train(matrix, optimizer)
    assert torch.equal(matrix.parameter != 0, first & second)
    assert torch.equal(optimizer.state[matrix.parameter]["exp_avg"] != 0, first & second)


def test_masks_end_with_unwatch():
    matrix = linear()
    optimizer = OPTIMIZERS["SGD"]([matrix.parameter])
    masks = WeightMasks([matrix])
    masks.watch(optimizer)
    masks.unwatch()
    train(matrix, optimizer)
    with pytest.raises(RuntimeError, match="24 weights of layer are pruned and no longer zero"):
        masks.check()


def test_masks_follow_the_model_to_its_device():
    matrix = linear()
    masks = WeightMasks([matrix])
    matrix.owner.to("meta")
    assert masks.pruned("layer").device.type == "meta"


def test_masks_take_a_bit_a_weight_until_they_are_used():
    """Before weights are cut up over processes, each has masks of all weights."""
    matrix = linear(36, 44)
    masks = WeightMasks([matrix])

    def bytes_a_weight():
        # `type` asks no weak proxy for its object, which other tests may have left dead.
        tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
        return sum(x.dtype == torch.bool and x.shape == (36, 44) for x in tensors)

    assert bytes_a_weight() == 0
    masks.apply()
    assert bytes_a_weight() == 1


@pytest.mark.parametrize("fill", [1.0, float("nan")])
def test_a_filled_zero_is_found(fill):
    matrix = linear()
    masks, record = WeightMasks([matrix]), ZeroRecord([matrix])
    masks.check()
    record.check()
    matrix.parameter.data[matrix.parameter == 0] = fill
    for keeper in (masks, record):
        with pytest.raises(RuntimeError, match="24 weights of layer are pruned and no longer zero"):
            keeper.check()


def test_the_state_of_masks_restores_them_and_the_zeros(tmp_path):
    torch.save(WeightMasks([linear(5, 12)]).state_dict(), tmp_path / "masks.pt")
    state = torch.load(tmp_path / "masks.pt", weights_only=True)
    assert {name: bits.numel() for name, bits in state.items()} == {"layer": 8}  # of 60 weights
    other = Matrix("layer", nn.Linear(12, 5))
    masks = WeightMasks([other])
    masks.load_state_dict(state)
    assert torch.equal(other.parameter == 0, linear(5, 12).parameter == 0)
    with pytest.raises(ValueError, match="masks of 1 matrices are only on one side, e.g. layer"):
        masks.load_state_dict({})
