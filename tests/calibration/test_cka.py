"""CKA over chunks of tokens, against whole Gram matrices."""

import math

import pytest
import torch
from reference_sliding import debiased_cka, hsic

from prunelight.calibration.cka import CKA

TOKENS = 90


def inputs(width, *, tokens=TOKENS, seed=0, dtype=torch.float32):
    """Tokens whose features differ in scale and depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator)
    common = torch.randn(tokens, 1, generator=generator)
    return ((x + common) * torch.logspace(-2, 2, width)).to(dtype)


def representations(tokens=96):
    x = inputs(7, tokens=tokens)
    return [x, inputs(11, tokens=tokens, seed=1), x @ torch.randn(7, 5), -3 * x]


def test_cka_of_one_chunk_is_that_of_whole_gram_matrices():
    states = representations()
    cka = CKA(4, chunk=96)
    cka.update(states)
    found = cka.result()
    for i, x in enumerate(states):
        for j, y in enumerate(states):
            assert found[i, j].item() == pytest.approx(debiased_cka(x, y), abs=1e-5)
    assert torch.equal(found, found.T)


def test_cka_over_chunks_is_the_mean_of_their_unbiased_estimates():
    states = representations(90)
    cka = CKA(4, chunk=30)
    cka.update(states)
    parts = [[x[start::3] for start in range(3)] for x in states]
    for i, x in enumerate(parts):
        for j, y in enumerate(parts):
            sums = [
                sum(hsic(a, b) for a, b in zip(*pair, strict=True))
                for pair in ((x, y), (x, x), (y, y))
            ]
            expected = sums[0] / math.sqrt(sums[1] * sums[2])
            assert cka.result()[i, j].item() == pytest.approx(expected, abs=1e-5)


def test_cka_ignores_rotation_scale_and_shift_and_sees_independence():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 64, generator=generator)
    rotation = torch.linalg.qr(torch.randn(64, 64, generator=generator)).Q
    other = torch.randn(512, 600, generator=generator)  # more features than a chunk has rows
    cka = CKA(3, chunk=256)
    cka.update([x, 5 * x @ rotation + 3, other])
    found = cka.result()
    assert found[0, 1].item() == pytest.approx(1, abs=1e-5)
    assert abs(found[0, 2].item()) < 0.05  # the biased estimator gives more than 0.5 here


def test_rbf_cka_follows_its_definition():
    x, y = (t[:40].double() for t in representations()[:2])
    kernels = []
    for state in (x, y):
        squares = torch.cdist(state, state).square()
        scale = 0.5**2 * squares.flatten().median()
        kernels.append((-squares / (2 * scale)).exp())
    n = len(x)
    center = torch.eye(n, dtype=torch.float64) - 1 / n
    biased = (center @ kernels[0] @ center * kernels[1]).sum()
    biased /= torch.sqrt(
        (center @ kernels[0] @ center * kernels[0]).sum()
        * (center @ kernels[1] @ center * kernels[1]).sum()
    )
    cka = CKA(2, "rbf", bandwidth=0.5, chunk=40)
    cka.update([x.float(), y.float()])
    found = cka.result()
    assert found[0, 0].item() == pytest.approx(1)
    assert found[0, 1] < biased  # debiased


@pytest.mark.parametrize("states", [torch.ones(20, 3), torch.full((20, 3), math.nan)])
def test_cka_of_constant_or_broken_states_is_refused(states):
    cka = CKA(2)
    cka.update([states, inputs(3, tokens=20)])
    with pytest.raises(ValueError, match="CKA needs states that are finite and differ"):
        cka.result()


def test_cka_of_too_few_tokens_is_refused():
    cka = CKA(1)
    cka.update([inputs(3, tokens=3)])
    with pytest.raises(ValueError, match="4 tokens or more"):
        cka.result()
