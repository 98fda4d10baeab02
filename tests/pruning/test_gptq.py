"""GPTQ: what stands in its results, what they lose, and that the reference computes the same."""

import pytest
import torch
from small_matrices import hessian, matrix

from prunelight.models.packed.grids import PER_ROW, WeightGrid
from prunelight.pruning.rounding.gptq import GPTQ, each_input, gptq, grid_scale, nearest_on_grid

GRIDS = [WeightGrid(4, 32), WeightGrid(4, PER_ROW), WeightGrid(8, 32)]


def rounded(weight, product, grid, *, keep_zeros=True, **settings):
    chosen = GPTQ(grid.bits, grid.group_size, **settings)
    return gptq(weight, product, grid_scale(weight, grid), chosen, keep_zeros=keep_zeros)


def nearest(weight, grid):
    steps = each_input(grid_scale(weight, grid), weight.shape[1])
    return nearest_on_grid(weight, steps, grid.bits)


def loss(result, weight, product):
    """The squared change of outputs, over what the Hessian was summed from."""
    return float((((result - weight) @ product) * (result - weight)).sum())


@pytest.mark.parametrize("grid", GRIDS)
def test_every_value_lies_on_the_grid(grid):
    weight = matrix()
    result = rounded(weight, hessian(), grid)
    steps = result / each_input(grid_scale(weight, grid), weight.shape[1])
    assert (steps - steps.round()).abs().max() < 1e-3
    assert steps.round().min() >= -(2 ** (grid.bits - 1))
    assert steps.round().max() <= 2 ** (grid.bits - 1) - 1


@pytest.mark.parametrize("grid", GRIDS)
def test_outputs_change_less_than_by_the_nearest_values(grid):
    weight, product = matrix(), hessian()
    plain = loss(nearest(weight, grid), weight, product)
    assert loss(rounded(weight, product, grid), weight, product) < 0.8 * plain


def test_inputs_that_are_independent_are_rounded_to_the_nearest_values():
    weight = matrix()
    result = rounded(weight, torch.eye(weight.shape[1]), WeightGrid(4, 32))
    torch.testing.assert_close(result, nearest(weight, WeightGrid(4, 32)))


def test_the_order_of_columns_does_not_matter_to_inputs_of_equal_size():
    weight, product = matrix(), hessian()
    size = product.diagonal().sqrt()
    equal = product / size[:, None] / size
    equal.fill_diagonal_(1)
    results = [
        rounded(weight, equal, WeightGrid(4, 32), act_order=order) for order in (True, False)
    ]
    torch.testing.assert_close(*results)


def test_blocks_change_nothing_but_the_order_of_sums():
    weight, product = matrix(), hessian()
    results = [rounded(weight, product, WeightGrid(8, 32), block_size=size) for size in (7, 128)]
    step = grid_scale(weight, WeightGrid(8, 32)).max()
    assert (results[0] - results[1]).abs().max() <= step * 1.01  # a tie may fall to either side
    torch.testing.assert_close(loss(results[0], weight, product), loss(results[1], weight, product))


def test_a_weight_on_the_grid_stays_as_it_is():
    grid = WeightGrid(4, 32)
    weight = nearest(matrix(), grid)
    result = gptq(weight, hessian(), grid_scale(matrix(), grid), GPTQ())
    torch.testing.assert_close(result, weight)


@pytest.mark.parametrize("grid", GRIDS)
def test_zeros_stay_zeros_and_would_be_filled_otherwise(grid):
    weight = matrix()
    zeros = matrix(seed=9) > 0
    weight[zeros] = 0
    assert not rounded(weight, hessian(), grid)[zeros].any()
    assert rounded(weight, hessian(), grid, keep_zeros=False)[zeros].any()


def test_more_bits_and_smaller_groups_lose_less():
    weight, product = matrix(), hessian()
    grids = [WeightGrid(8, 32), WeightGrid(4, 32), WeightGrid(4, 160)]
    losses = [loss(rounded(weight, product, grid), weight, product) for grid in grids]
    assert losses == sorted(losses)


def test_an_input_that_is_always_zero_is_rounded_to_the_nearest():
    weight, product = matrix(), hessian()
    product[5], product[:, 5] = 0, 0
    grid = WeightGrid(4, 32)
    torch.testing.assert_close(rounded(weight, product, grid)[:, 5], nearest(weight, grid)[:, 5])


@pytest.mark.parametrize("grid", GRIDS)
def test_the_grid_is_that_of_compressed_tensors(grid):
    pytest.importorskip("compressed_tensors", reason="pip install 'prunelight[gptq]'")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams

    weight = matrix()
    size = weight.shape[1] if grid.group_size == PER_ROW else grid.group_size
    groups = weight.unflatten(1, (-1, size))
    arguments = QuantizationArgs(**grid.arguments())
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
    torch.testing.assert_close(grid_scale(weight, grid), scale)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("grid", GRIDS)
def test_the_reference_computes_the_same(grid, act_order):
    reference = pytest.importorskip(
        "llmcompressor.modifiers.gptq.gptq_quantize",
        reason="llm-compressor asks for other versions; it was compared in an environment apart",
    )
    from compressed_tensors.quantization import QuantizationArgs

    weight, product = matrix(), hessian()
    scale = grid_scale(weight, grid)
    order = "weight" if act_order else None
    arguments = QuantizationArgs(**grid.arguments(), actorder=order)
    given = [each[None].clone() for each in (weight, product, scale, torch.zeros_like(scale))]
    theirs, _, _ = reference.quantize_weight(*given, None, arguments)
    torch.testing.assert_close(rounded(weight, product, grid, act_order=act_order), theirs[0])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bits": 3}, "bits=3 must be 4 or 8"),
        ({"group_size": 0}, "group_size=0 must be a number of inputs such as 128, or -1"),
        ({"dampening": 0.0}, "dampening=0.0 must be above 0"),
        ({"block_size": 0}, "block_size=0 must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        GPTQ(**settings)


def test_a_weight_or_hessian_with_nan_is_refused():
    weight, product = matrix(), hessian()
    weight[3, 4] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        rounded(weight, product, WeightGrid(4, 32))
    product[2, 2] = torch.inf
    with pytest.raises(ValueError, match="Hessian.*Inf|NaN"):
        rounded(matrix(), product, WeightGrid(4, 32))
