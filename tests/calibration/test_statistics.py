"""Streaming sums equal a plain float64 computation, however the tokens are cut into batches."""

import math
import weakref

import pytest
import torch

from prunelight.calibration.statistics import Hessian, InputNorm, InputVariance, exact_median

WIDTHS = [1, 7, 511, 512, 513, 1100]  # the Hessian is computed in blocks of 512
TOKENS = 90
widths = pytest.mark.parametrize("width", WIDTHS)
both = pytest.mark.parametrize("kind", [InputNorm, Hessian])


def inputs(width, *, tokens=TOKENS, seed=0, dtype=torch.float32):
    """Tokens whose features differ in scale and depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator)
    common = torch.randn(tokens, 1, generator=generator)
    return ((x + common) * torch.logspace(-2, 2, width)).to(dtype)


def summed(kind, x, *cuts):
    found = kind(x.shape[1])
    for part in x.tensor_split(cuts):
        found.update(part)
    return found


def largest_error(found, expected):
    """As a share of what each entry may be at most, sqrt(H_ii H_jj)."""
    scale = expected.diagonal().sqrt()
    return ((found.double() - expected).abs() / scale / scale[:, None]).max().item()


@both
@widths
def test_norms_equal_a_plain_computation(kind, width):
    x = inputs(width)
    found = summed(kind, x)
    # Sums of 90 float32 squares.
    assert torch.allclose(found.norms().double(), x.double().norm(dim=0), rtol=1e-5)
    assert found.tokens == TOKENS


@widths
def test_a_hessian_equals_a_plain_computation_and_is_symmetric(width):
    x = inputs(width)
    found = summed(Hessian, x).result()
    assert torch.equal(found, found.T)
    assert found.shape == (width, width)
    assert largest_error(found, x.double().T @ x.double()) < 1e-5


@both
@widths
@pytest.mark.parametrize("cuts", [(1,), (30, 60), (13, 13, 89)])
def test_tokens_in_parts_give_what_they_give_at_once(kind, width, cuts):
    x = inputs(width)
    whole, parts = summed(kind, x), summed(kind, x, *cuts)
    assert parts.tokens == whole.tokens
    assert torch.allclose(parts.norms(), whole.norms(), rtol=1e-5)
    if kind is Hessian:
        assert largest_error(parts.result(), whole.result().double()) < 1e-5


@widths
def test_the_squares_are_the_diagonal_of_the_hessian(width):
    x = inputs(width)
    assert torch.equal(summed(Hessian, x).squares, summed(Hessian, x).result().diagonal())


def test_a_result_may_be_taken_twice_and_in_between():
    x, found = inputs(600), Hessian(600)
    found.update(x[:50])
    early = found.result()
    assert torch.equal(found.result(), early)
    found.update(x[50:])
    assert torch.equal(found.result(), summed(Hessian, x, 50).result())


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_sums_are_float32_whatever_the_inputs(kind, dtype):
    x = inputs(20, dtype=dtype)
    found = summed(kind, x)
    assert found.squares.dtype == torch.float32
    assert torch.allclose(found.norms().double(), x.double().norm(dim=0), rtol=1e-5)


def test_massive_half_precision_inputs_do_not_overflow():
    x = torch.full((4, 3), 60_000.0, dtype=torch.float16)
    assert summed(InputNorm, x).norms().tolist() == pytest.approx([2 * x[0, 0].item()] * 3)
    assert summed(Hessian, x).result().isfinite().all()


@both
def test_no_tokens_rank_weights_by_magnitude(kind):
    for found in (kind(5), summed(kind, inputs(5)[:0])):
        assert found.norms().tolist() == [1] * 5
        assert found.tokens == 0
    assert torch.equal(Hessian(5).result(), torch.eye(5))


def test_inputs_that_are_all_zero_rank_weights_by_magnitude():
    assert summed(InputNorm, torch.zeros(4, 3)).norms().tolist() == [1] * 3
    assert summed(InputNorm, torch.tensor([[0.0, 2.0]])).norms().tolist() == [0, 2]


def test_tokens_that_another_process_saw_count():
    found = InputNorm(3)
    found.squares = torch.tensor([4.0, 0.0, 9.0])  # reduced; this process saw none
    assert found.norms().tolist() == [2, 0, 3]


@both
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_are_refused(kind, value):
    x = inputs(600)
    x[3, 599] = value
    found = summed(kind, x)
    with pytest.raises(ValueError, match="inputs are NaN or Inf; load the model in bfloat16"):
        found.norms()
    if kind is Hessian:
        with pytest.raises(ValueError, match="inputs are NaN or Inf"):
            found.result()


# --- the median -------------------------------------------------------------------------------


def randoms(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator).abs() for size in sizes]


PARTS = {
    "random": randoms(1000, 37, 512),
    "matrices": [part.view(-1, 10) for part in randoms(500, 1000)],
    "transposed": [part.view(-1, 10).T for part in randoms(500, 1000)],
    "even": randoms(2),
    "one": randoms(1),
    "with an empty part": randoms(30, 0, 7),
    "ties": [torch.tensor([1.0, 2.0, 2.0]), torch.tensor([2.0, 2.0, 5.0, 0.0])],
    "all equal": [torch.full((50,), 0.3), torch.full((51,), 0.3)],
    "zeros": [torch.zeros(10), torch.zeros(1)],
    "half zeros": [torch.zeros(10), torch.ones(10)],
    "more than half zeros": [torch.zeros(11), *randoms(10)],
    "tiny": [1e-40 * part for part in randoms(40, 41)],  # denormal
    "huge": [1e38 * part for part in randoms(40, 41)],
    "all magnitudes": [torch.logspace(-44, 38, 999)],
    "close": [1 + 1e-6 * part for part in randoms(400, 401)],  # one value of the upper 16 bits
    "with infinity": [torch.tensor([1.0, math.inf, math.inf])],
    "bfloat16": [part.bfloat16() for part in randoms(100, 101)],
}


@pytest.mark.parametrize("parts", PARTS.values(), ids=list(PARTS))
def test_the_median_is_that_of_all_parts_joined(parts):
    joined = torch.cat([part.flatten().float() for part in parts])
    assert exact_median(lambda: iter(parts)) == joined.median().item()


@pytest.mark.parametrize("seed", range(20))
def test_the_median_of_random_cuts_is_that_of_the_whole(seed):
    generator = torch.Generator().manual_seed(seed)
    (whole,) = randoms(1 + 37 * seed, seed=seed)
    whole = whole.round(decimals=1 + seed % 4)  # ties
    cuts = torch.randint(0, len(whole), (4,), generator=generator).sort().values
    parts = whole.tensor_split(cuts.tolist())
    assert exact_median(lambda: parts) == whole.median().item()


def test_at_most_two_parts_are_alive_at_a_time():
    states, alive = [], []

    def parts():
        for seed in range(5):
            (part,) = randoms(100, seed=seed)
            states.append(weakref.ref(part))
            alive.append(sum(state() is not None for state in states))
            yield part

    exact_median(parts)
    assert len(alive) == 10  # two passes
    assert max(alive) <= 2  # the one at hand and the one before


@widths
@pytest.mark.parametrize("cuts", [(), (1,), (30, 60), (13, 13, 89)])
def test_a_variance_equals_a_plain_computation_however_it_is_cut(width, cuts):
    # A mean a thousand times the deviation: the difference of two sums would lose all digits.
    x = inputs(width) + 1000 * torch.logspace(-2, 2, width)
    found = summed(InputVariance, x, *cuts)
    expected = x.double().var(dim=0, correction=0)
    assert torch.allclose(found.variance().double(), expected, rtol=1e-3)
    assert torch.allclose(found.norms().double(), x.double().norm(dim=0), rtol=1e-5)
