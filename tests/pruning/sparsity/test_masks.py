"""Masks of every solver: how many zeros, which, and in which groups."""

import math
from itertools import pairwise

import pytest
import reference_sparsity as reference
import torch
from small_matrices import COLUMNS, PATTERNS, ROWS, WIDTH, hessian, matrix, norms, same
from torch.overrides import TorchFunctionMode

from prunelight.calibration.cka import CKA
from prunelight.pruning.sparsity.alps import alps
from prunelight.pruning.sparsity.masks import (
    Pattern,
    magnitude_mask,
    wanda_mask,
    wanda_variant_mask,
)
from prunelight.pruning.sparsity.sparsegpt import SparseGPT, sparsegpt

SHARES = [0.0, 0.05, 1 / 3, 0.5, 0.7, 0.99, 1.0]
SHAPES = [(1, 1), (1, 7), (5, 1), (3, 10), (7, 129), (24, 160), (16, 256)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
shares = pytest.mark.parametrize("share", SHARES, ids=lambda share: f"{share:.2f}")


def statistics(w):
    """Norms and Hessian for a weight, in float64 for float64."""
    return [x(w.shape[1]).to(w.dtype) for x in (norms, hessian)]


ACT_ORDER = SparseGPT(act_order=True)


MASKS = {
    "magnitude": magnitude_mask,
    "wanda": lambda w, amount: wanda_mask(w, statistics(w)[0], amount),
    "wanda_variant": lambda w, amount: wanda_variant_mask(w, statistics(w)[0], amount),
    "sparsegpt": lambda w, amount: sparsegpt(w, statistics(w)[1], amount) == 0,
    "alps": lambda w, amount: alps(w, statistics(w)[1], amount) == 0,
    "act_order": lambda w, amount: sparsegpt(w, statistics(w)[1], amount, ACT_ORDER) == 0,
}


def every(*names):
    return pytest.mark.parametrize("mask_of", [MASKS[name] for name in names], ids=names)


every_mask, masks_alone = every(*MASKS), every("magnitude", "wanda", "wanda_variant")
with_patterns = every("magnitude", "wanda", "sparsegpt", "alps")
half_or_pattern = pytest.mark.parametrize("amount", [0.5, Pattern(2, 4)], ids=str)


every_pattern = pytest.mark.parametrize("text", PATTERNS)


# --- counts -----------------------------------------------------------------------------------


@every_mask
@shapes
@shares
def test_exactly_the_planned_number_is_pruned(mask_of, shape, share):
    w = matrix(*shape)
    mask = mask_of(w, share)
    assert (mask.shape, mask.dtype) == (w.shape, torch.bool)
    if mask_of is MASKS["wanda"]:
        assert set(mask.sum(1).tolist()) == {reference.count(shape[1], share)}
    else:
        assert mask.sum() == reference.count(w.numel(), share)


@shares
@pytest.mark.parametrize("values", [[1.0], [0.0], [0.0, 1.0, -1.0]], ids=["ones", "zeros", "three"])
def test_ties_are_broken_by_index_and_counts_stay_exact(share, values):
    w = torch.tensor(values).repeat(120 // len(values)).view(12, 10)
    ones = torch.ones(10)
    assert torch.equal(magnitude_mask(w, share), reference.magnitude(w, share))
    assert torch.equal(wanda_mask(w, ones, share), reference.wanda(w, ones, share))
    assert wanda_variant_mask(w, ones, share).sum() == reference.count(120, share)


@masks_alone
def test_weights_that_are_zero_already_are_pruned_first(mask_of):
    w = matrix(ROWS, 100)
    w[:, 1::5] = w[:, 3::5] = 0  # 40 in each row
    assert mask_of(w, 0.5)[w == 0].all()
    assert (w[mask_of(w, 0.3)] == 0).all()


@masks_alone
def test_a_higher_sparsity_prunes_all_that_a_lower_one_does(mask_of):
    masks = [mask_of(matrix(), share) for share in SHARES]
    assert all((high | ~low).all() for low, high in pairwise(masks))


@every_mask
@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_a_share_out_of_range_is_refused(mask_of, share):
    with pytest.raises(ValueError, match=rf"{share}"):
        mask_of(matrix(), share)


# --- magnitude and Wanda ----------------------------------------------------------------------


@shares
def test_wanda_with_unit_norms_is_magnitude_by_rows(share):
    w = matrix()
    rows = torch.cat([magnitude_mask(row[None], share) for row in w])
    assert torch.equal(wanda_mask(w, torch.ones(COLUMNS), share), rows)


@shapes
@shares
def test_masks_are_those_of_the_reference(shape, share):
    w, column_norms = matrix(*shape), norms(shape[1])
    assert torch.equal(magnitude_mask(w, share), reference.magnitude(w, share))
    found = wanda_mask(w, column_norms, share)
    # Scores in float32 may tie, or change places, where they differ in float64.
    assert same(found, reference.wanda(w, column_norms, share)) >= 0.999


def test_wanda_prunes_inputs_that_are_always_zero_first():
    column_norms = norms(20).index_fill(0, torch.arange(0, 20, 2), 0)
    assert torch.equal(wanda_mask(matrix(1, 20), column_norms, 0.5)[0], column_norms == 0)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_wanda_variant_prunes_rows_to_one_share_of_their_scores(share):
    w = matrix().sign() * matrix().abs().pow(1 + torch.arange(ROWS)[:, None] / ROWS)
    mask = wanda_variant_mask(w, norms(), share)
    scores, lost, rest = w.abs().double() * norms().double(), [], []
    for row, pruned in zip(scores, mask, strict=True):
        count = int(pruned.sum())
        assert torch.equal(pruned, reference.smallest(row, count))
        shares_of_row = [0.0, *(row.sort().values.cumsum(0) / row.sum()).tolist(), 1.0]
        lost, rest = [*lost, shares_of_row[count]], [*rest, shares_of_row[count + 1]]
    assert len(set(mask.sum(1).tolist())) > 1  # rows really get different counts
    # One threshold lies above what every row has lost and below what its next weight would cost.
    assert max(lost) <= min(rest) + 1e-5  # sums in float32


@pytest.mark.parametrize("scale", [4.0**-20, 1e-3, 7.0, 4.0**20])
def test_masks_do_not_depend_on_the_scale_of_norms(scale):
    least = 0.999 if scale in (1e-3, 7) else 1  # powers of two are exact
    for amount in (0.6, Pattern(2, 4)):
        scaled = wanda_mask(matrix(), norms() * scale, amount)
        assert same(scaled, wanda_mask(matrix(), norms(), amount)) >= least
    scaled = wanda_variant_mask(matrix(), norms() * scale, 0.6)
    assert same(scaled, wanda_variant_mask(matrix(), norms(), 0.6)) >= least


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_scored_in_float32(dtype):
    w, column_norms = matrix().to(dtype), norms() * 1e5  # products overflow float16
    assert torch.equal(wanda_mask(w, column_norms, 0.5), wanda_mask(w.float(), column_norms, 0.5))
    assert torch.equal(magnitude_mask(w, 0.5), reference.magnitude(w, 0.5))
    assert magnitude_mask(w, 1 / 3).sum() == w.numel() // 3  # many ties
    assert torch.equal(sparsegpt(w, hessian(), 0.5), sparsegpt(w.float(), hessian(), 0.5))


@every_mask
def test_a_transposed_view_is_pruned_like_a_copy(mask_of):
    view = matrix(COLUMNS, ROWS).T
    assert torch.equal(mask_of(view, 0.6), mask_of(view.contiguous(), 0.6))


@every_mask
def test_float64_and_float32_agree(mask_of):
    w = matrix(64, 256)
    assert same(mask_of(w.double(), 0.7), mask_of(w, 0.7)) >= 0.999


@half_or_pattern
def test_weights_and_statistics_may_differ_in_dtype(amount):
    masks = [MASKS[name](matrix(), amount) for name in ("wanda", "sparsegpt")]
    for w, other in [(matrix(), torch.float64), (matrix().double(), torch.float32)]:
        assert same(wanda_mask(w, norms().to(other), amount), masks[0]) >= 0.999
        assert same(sparsegpt(w, hessian().to(other), amount) == 0, masks[1]) >= 0.999


# --- N:M --------------------------------------------------------------------------------------


@with_patterns
@every_pattern
def test_every_group_of_m_has_exactly_n_kept(mask_of, text):
    pattern = Pattern.parse(text)
    for rows, width in [(1, WIDTH), (5, 2 * WIDTH)]:  # M may not divide a block of 128 columns
        groups = mask_of(matrix(rows, width), pattern).view(-1, pattern.of)
        assert set(groups.sum(1).tolist()) == {pattern.of - pattern.kept}


@with_patterns
@pytest.mark.parametrize("width", [6, 10, 130])
def test_a_pattern_that_does_not_divide_the_width_is_refused(mask_of, width):
    with pytest.raises(ValueError, match=rf"(?s)2:4.*{width}|{width}.*2:4"):
        mask_of(matrix(3, width), Pattern(2, 4))


@every_pattern
def test_n_of_m_masks_are_those_of_the_reference(text):
    w, pattern = matrix(ROWS, WIDTH).round(decimals=1), Pattern.parse(text)  # with ties
    pair = (pattern.kept, pattern.of)
    assert torch.equal(magnitude_mask(w, pattern), reference.magnitude(w, pair))
    assert torch.equal(wanda_mask(w, torch.ones(WIDTH), pattern), reference.magnitude(w, pair))
    found = wanda_mask(w, norms(WIDTH), pattern)
    assert same(found, reference.wanda(w, norms(WIDTH), pair)) >= 0.999


@pytest.mark.parametrize(("text", "share"), [("2:4", 0.5), ("1:4", 0.75), ("5:8", 0.375)])
def test_a_pattern_names_what_is_kept(text, share):
    pattern = Pattern.parse(text)
    assert (str(pattern), pattern.sparsity) == (text, share)
    assert pattern == Pattern(kept=int(text[0]), of=int(text[2]))


NO_PATTERNS = ["", "2", "2:", ":4", "a:b", "2:4:8", "2.5:4", "-1:4", "0:4", "5:4", "0:0", "2:0"]


@pytest.mark.parametrize("text", NO_PATTERNS)
def test_text_that_is_no_pattern_is_refused(text):
    with pytest.raises(ValueError, match=rf"pattern.*{text}"):
        Pattern.parse(text)


# --- inputs -----------------------------------------------------------------------------------


def test_the_inputs_stay_as_they_are():
    w, h, column_norms = torch.nn.Parameter(matrix()), hessian(), norms()
    h[3] = h[:, 3] = 0
    copies = [x.detach().clone() for x in (w, h, column_norms)]
    results = [magnitude_mask(w, 0.5), wanda_mask(w, column_norms, 0.5)]
    results += [wanda_mask(w, column_norms, Pattern(2, 4)), magnitude_mask(w, Pattern(2, 4))]
    results += [wanda_variant_mask(w, column_norms, 0.5), sparsegpt(w, h, Pattern(2, 4))]
    results += [sparsegpt(w, h, 0.5, ACT_ORDER), sparsegpt(w, h, 0.5, SparseGPT(bits=4))]
    assert all(torch.equal(x, y) for x, y in zip((w, h, column_norms), copies, strict=True))
    assert not any(result.requires_grad for result in results)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_are_refused(bad):
    def spoilt(values):
        values.view(-1)[5] = bad
        return values

    calls = [lambda mask_of=mask_of: mask_of(spoilt(matrix()), 0.5) for mask_of in MASKS.values()]
    calls.append(lambda: magnitude_mask(spoilt(matrix()), Pattern(2, 4)))
    calls.append(lambda: wanda_mask(matrix(), spoilt(norms()), 0.5))
    calls.append(lambda: wanda_variant_mask(matrix(), spoilt(norms()), 0.5))
    calls.append(lambda: sparsegpt(matrix(), spoilt(hessian()), 0.5))
    for call in calls:
        with pytest.raises(ValueError, match="(?i)nan|inf"):
            call()


class OnlyWhatCUDAAllows(TorchFunctionMode):
    """Refuses what torch refuses on CUDA in its deterministic mode."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in ("kthvalue", "median", "cumsum"):
            assert args[0].dtype == torch.long or not torch.are_deterministic_algorithms_enabled()
        return function(*args, **(kwargs or {}))


def test_masks_and_cka_work_on_cuda_in_torchs_deterministic_mode():
    plain = wanda_variant_mask(matrix(), norms(), 0.5)
    torch.use_deterministic_algorithms(True)
    try:
        with OnlyWhatCUDAAllows():
            assert torch.equal(wanda_variant_mask(matrix(), norms(), 0.5), plain)
            CKA(2, "rbf").update([matrix(), matrix(seed=1)])
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
