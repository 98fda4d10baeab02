"""SparseGPT against the reference and textbook OBS; the order of columns, and quantization."""

import pytest
import reference_sparsity as reference
import torch
from reference_sparsity import objective
from small_matrices import COLUMNS, PATTERNS, ROWS, WIDTH, hessian, matrix, same
from torch.utils._python_dispatch import TorchDispatchMode

from prunelight.calibration.statistics import Hessian
from prunelight.pruning.sparsity.masks import Pattern, magnitude_mask
from prunelight.pruning.sparsity.sparsegpt import (
    SparseGPT,
    inverse_factor,
    sparsegpt,
    sparsegpt_stacked,
)

ACT_ORDER = SparseGPT(act_order=True)
HALF = ROWS * COLUMNS / 2


half_or_pattern = pytest.mark.parametrize("amount", [0.5, Pattern(2, 4)], ids=str)
any_amount = pytest.mark.parametrize("amount", [0.0, 0.5, Pattern(2, 4)], ids=str)
every_pattern = pytest.mark.parametrize("text", PATTERNS)


@pytest.mark.parametrize("columns", [100, 128, 129, 300])
@pytest.mark.parametrize("block_size", [1, 32, 128, 512])
@pytest.mark.parametrize("share", [0.05, 1 / 3, 0.7])
def test_sparsegpt_prunes_its_share_in_each_block(columns, block_size, share):
    rows, settings = 3, SparseGPT(block_size=block_size)
    pruned = sparsegpt(matrix(rows, columns), hessian(columns), share, settings) == 0
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        expected = reference.count(rows * end, share) - reference.count(rows * start, share)
        assert pruned[:, start:end].sum() == expected


@pytest.mark.parametrize("amounts", [(0.5, 0.3, 0.7), [Pattern(n, 4) for n in (2, 1, 3)]])
def test_a_stacked_call_solves_each_weight_as_if_alone(amounts):
    parts = matrix(30).split([16, 4, 10])
    stacked = sparsegpt_stacked(parts, hessian(), amounts, SparseGPT())
    for part, amount, found in zip(parts, amounts, stacked, strict=True):
        alone = sparsegpt(part, hessian(), amount)
        # The same sums, in matrix products of another size: one weight in 640 may flip.
        assert (found - alone).norm() <= 0.05 * alone.norm()


# --- SparseGPT --------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_sparsegpt_of_independent_inputs_is_magnitude_in_each_block(share):
    w = matrix(16, 320)
    blocks = [magnitude_mask(block, share) for block in w.split(128, dim=1)]
    expected = w.masked_fill(torch.cat(blocks, dim=1), 0)
    assert torch.equal(sparsegpt(w, 9 * torch.eye(320), share), expected)


@every_pattern
def test_sparsegpt_of_independent_inputs_is_magnitude_in_a_pattern(text):
    w, pattern = matrix(16, WIDTH), Pattern.parse(text)
    expected = w.masked_fill(magnitude_mask(w, pattern), 0)
    assert torch.equal(sparsegpt(w, torch.eye(WIDTH), pattern), expected)


def test_pruning_nothing_changes_nothing():
    assert torch.equal(sparsegpt(matrix(), hessian(), 0.0), matrix())
    assert not sparsegpt(matrix(), hessian(), 1.0).any()


def test_the_reference_is_textbook_obs():
    found = reference.sparsegpt(matrix(), hessian(), 0.6)
    torch.testing.assert_close(found, reference.obs(matrix(), hessian(), found == 0))


@pytest.mark.parametrize(
    "amount", [0.3, 0.5, 0.7, 0.9, Pattern(2, 4), Pattern(1, 8), Pattern(5, 20)], ids=str
)
def test_sparsegpt_is_as_good_as_textbook_obs_and_better_than_no_update(amount):
    w, h = matrix(), hessian()
    found = sparsegpt(w, h, amount)
    pruned, damped = found == 0, reference.damped(h.double())
    loss = objective(w, found, damped)
    # Both solve the same recursion; ours in float32, whose Cholesky is good to about 1e-5 here.
    assert loss <= objective(w, reference.obs(w, h, pruned), damped) * (1 + 1e-4)
    assert loss >= objective(w, reference.optimum(w, h, pruned), damped) * (1 - 1e-4)
    assert loss < objective(w, w.masked_fill(pruned, 0), damped)
    assert loss < objective(w, w.masked_fill(magnitude_mask(w, amount), 0), damped)


@pytest.mark.parametrize("amount", [0.5, 0.7, (2, 4), (4, 8), (5, 32), (32, 256)], ids=str)
def test_sparsegpt_agrees_with_the_reference(amount):
    w, h = matrix(64, 256), hessian(256)
    found = sparsegpt(w, h, Pattern(*amount) if isinstance(amount, tuple) else amount)
    expected = reference.sparsegpt(w, h, amount)
    assert found.dtype == torch.float32
    assert same(found == 0, expected == 0) >= 0.999
    loss, reference_loss = (objective(w, x, h) for x in (found, expected))
    assert loss == pytest.approx(reference_loss, rel=1e-3)  # a few flipped weights


@pytest.mark.parametrize("scale", [4.0**-20, 1e-3, 7.0, 4.0**20])
@pytest.mark.parametrize("dead", [False, True], ids=["alive", "dead columns"])
@pytest.mark.parametrize("amount", [0.6, Pattern(2, 4)], ids=str)
def test_sparsegpt_does_not_depend_on_the_scale_of_the_hessian(scale, dead, amount):
    h = hessian()
    if dead:
        h[::16] = h[:, ::16] = 0
    found, scaled = (sparsegpt(matrix(), h * factor, amount) for factor in (1, scale))
    assert same(found == 0, scaled == 0) >= 0.999
    assert (found - scaled).norm() <= 1e-2 * found.norm()


def test_columns_without_input_are_zeroed_within_the_count():
    w, h, dead = matrix(), hessian(), [0, 5, 130, COLUMNS - 1]
    h[dead] = h[:, dead] = 0
    for amount in (0.5, Pattern(2, 4)):
        found = sparsegpt(w, h, amount)
        assert not found[:, dead].any()
        assert (found == 0).sum() == HALF
        assert objective(w, found, h) < objective(w, w.masked_fill(found == 0, 0), h)


@half_or_pattern
@pytest.mark.parametrize("tokens", [1, 3, 80])
def test_fewer_tokens_than_columns_give_a_finite_result(amount, tokens):
    w, h = matrix(), hessian(tokens=tokens)
    found = sparsegpt(w, h, amount)
    assert found.isfinite().all()
    assert (found == 0).sum() == HALF
    assert objective(w, found, h) < objective(w, w.masked_fill(found == 0, 0), h)


@half_or_pattern
@pytest.mark.parametrize("dampening", [1e-7, 0.01])
def test_a_singular_hessian_gives_a_finite_result(amount, dampening):
    for h in (torch.zeros(COLUMNS, COLUMNS), torch.ones(COLUMNS, COLUMNS), hessian(tokens=9)):
        found = sparsegpt(matrix(), h, amount, SparseGPT(dampening=dampening))
        assert found.isfinite().all()
        assert (found == 0).sum() >= HALF


# --- the order of columns, and quantization ---------------------------------------------------


def test_act_order_does_not_depend_on_the_order_of_columns():
    order = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(6))
    h = hessian()
    found = sparsegpt(matrix()[:, order], h[order][:, order], 0.6, ACT_ORDER)
    assert torch.equal(found, sparsegpt(matrix(), h, 0.6, ACT_ORDER)[:, order])


def test_act_order_of_descending_columns_is_the_plain_order():
    order = hessian().diagonal().argsort(descending=True)
    h = hessian()[order][:, order]
    assert torch.equal(sparsegpt(matrix(), h, 0.6, ACT_ORDER), sparsegpt(matrix(), h, 0.6))


def test_act_order_is_not_much_worse():
    # Inputs of similar scale; where they differ by 30 it is a third worse, in the reference too.
    w, scale = matrix(), hessian().diagonal().pow(-0.45)
    h = hessian() * scale[:, None] * scale
    plain, ordered = (sparsegpt(w, h, 0.6, settings) for settings in (SparseGPT(), ACT_ORDER))
    assert objective(w, ordered, h) < 1.2 * objective(w, plain, h)
    assert objective(w, ordered, h) < objective(w, w.masked_fill(ordered == 0, 0), h)


def test_act_order_cannot_keep_a_pattern():
    with pytest.raises(ValueError, match="act_order"):
        sparsegpt(matrix(), hessian(), Pattern(2, 4), ACT_ORDER)


def most_distinct_values(weight, group_size):
    return max(len(row.unique()) for group in weight.split(group_size, dim=1) for row in group)


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, 64), (4, 128), (8, 512)])
@any_amount
def test_quantized_groups_have_few_values_and_keep_the_zeros(bits, group_size, amount):
    w, h = matrix(6, 512), hessian(512)
    found = sparsegpt(w, h, amount, SparseGPT(bits=bits, group_size=group_size, block_size=512))
    assert most_distinct_values(found, group_size) <= 2**bits
    assert most_distinct_values(found, 512) > 2 ** (bits - 2)
    zeros = (found == 0).view(6, -1, 4).sum(-1)
    assert zeros.min() >= (2 if isinstance(amount, Pattern) else 0)
    assert zeros.sum() >= (amount if isinstance(amount, float) else 0.5) * w.numel()


@pytest.mark.parametrize("bits", [4, 8])
@any_amount
def test_quantizing_inside_the_loop_beats_quantizing_afterwards(bits, amount):
    w, h = matrix(), hessian()
    joint = sparsegpt(w, h, amount, SparseGPT(bits=bits, group_size=32))
    after = reference.round_to_nearest(sparsegpt(w, h, amount), bits, 32)
    # Beside the loss of pruning, that of 8 bits is too small to tell the two apart.
    slack = 1.005 if bits == 8 and amount else 1
    assert objective(w, joint, h) < slack * objective(w, after, h)


class NewMemory(TorchDispatchMode):
    """Counts the numbers of all float tensors that are made inside; views and outputs are none."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = [x for x in (*args, *(kwargs or {}).values()) if isinstance(x, torch.Tensor)]
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            storages = {x.untyped_storage()._cdata for x in given}
            if result.untyped_storage()._cdata not in storages:
                self.numbers += result.numel()
        return result


def test_a_solve_takes_two_matrices_beside_the_hessian_and_that_takes_no_copy():
    size = 2048
    statistic = Hessian(size)
    statistic.update(torch.randn(2 * size, size, generator=torch.Generator().manual_seed(0)))
    with NewMemory() as made:
        found = statistic.result()
    assert found is statistic.product
    assert made.numbers < size**2  # blocks of it, one after another
    with NewMemory() as made:
        inverse_factor(found, 0.01)
    assert made.numbers < 2.1 * size**2
