"""Laws of the losses, and that taking them in chunks changes nothing but the memory."""

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, linear
from torch.profiler import ProfilerActivity, profile

from prunelight import losses
from prunelight.losses import (
    chunk_size,
    distillation_loss,
    language_loss,
    linear_loss,
    logits_loss,
    mixed_loss,
    module_loss,
    top_k,
    top_k_loss,
)

TOKENS, HIDDEN, WORDS, K = 150, 6, 40, 5
TEMPERATURE = 1.7
EVERY = slice(0, TOKENS)
CPU, GPU = torch.device("cpu"), torch.device("cuda")
generator = torch.Generator().manual_seed(0)


def random(*shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


STATES, WEIGHT, BIAS = random(TOKENS, HIDDEN), random(WORDS, HIDDEN), random(WORDS)
TEACHER = 2 * random(TOKENS, WORDS)
TARGETS = torch.randint(WORDS, (TOKENS,), generator=generator)
IDS = TEACHER.topk(K).indices


def coarse(logits):
    """Log-probabilities of the teacher's top k and of all other tokens together, by the book."""
    probabilities = (logits / TEMPERATURE).softmax(-1)
    top = probabilities.gather(1, IDS)
    return torch.cat([top, 1 - top.sum(-1, keepdim=True)], dim=1).log()


def divergence(student, teacher):
    return TEMPERATURE**2 * kl_div(student, teacher, log_target=True, reduction="sum")


# name -> the loss, and the same by the book
LOSSES = {
    "lm": (
        language_loss(TARGETS),
        lambda logits: cross_entropy(logits, TARGETS, reduction="sum"),
    ),
    "kd": (
        distillation_loss(lambda rows: TEACHER[rows], TEMPERATURE),
        lambda logits: divergence(
            (logits / TEMPERATURE).log_softmax(-1), (TEACHER / TEMPERATURE).log_softmax(-1)
        ),
    ),
    "kd_topk": (
        top_k_loss(IDS, coarse(TEACHER), TEMPERATURE),
        lambda logits: divergence(coarse(logits), coarse(TEACHER)),
    ),
}
LOSSES["mixed"] = (
    mixed_loss(LOSSES["kd"][0], LOSSES["lm"][0], 0.3),
    lambda logits: 0.7 * LOSSES["kd"][1](logits) + 0.3 * LOSSES["lm"][1](logits),
)


def scaled_and_capped(logits):
    return 3 * torch.tanh(logits * 0.5 / 3)


def parameters(*values, frozen=()):
    return [v.clone().requires_grad_(i not in frozen) for i, v in enumerate(values)]


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_are_those_of_the_formula(name):
    loss, expected = LOSSES[name]
    (logits,) = parameters(random(TOKENS, WORDS))
    wanted = expected(logits)
    (gradient,) = torch.autograd.grad(wanted, logits)
    before = logits.detach().clone()
    total, found = loss(logits.detach(), EVERY)
    torch.testing.assert_close(total, wanted.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-9)
    assert torch.equal(logits, before)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of the fewest tokens, so that a few tokens take several of them."""
    monkeypatch.setattr(losses, "CPU_CHUNK_BYTES", 1)
    assert chunk_size(TOKENS, WORDS, CPU) < TOKENS / 3


@pytest.mark.parametrize("finish", [None, scaled_and_capped])
@pytest.mark.parametrize("name", LOSSES)
def test_chunks_change_neither_the_loss_nor_any_gradient(name, finish, small_chunks):
    loss, expected = LOSSES[name]
    # Twice as many positions as tokens that count, in any order.
    states = torch.cat([random(TOKENS, HIDDEN), STATES])
    tokens = torch.arange(TOKENS) + TOKENS
    whole, chunked = parameters(states, WEIGHT, BIAS), parameters(states, WEIGHT, BIAS)
    logits = linear(whole[0][tokens], whole[1], whole[2])
    wanted = expected(finish(logits) if finish else logits) / TOKENS
    found = linear_loss(*chunked, loss, tokens, finish)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    (3 * wanted).backward()
    (3 * found).backward()
    for ours, theirs in zip(chunked, whole, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)


def test_logits_that_are_there_already_and_any_module_give_the_same(small_chunks):
    loss, tokens = LOSSES["mixed"][0], torch.arange(TOKENS)
    results = []
    for take in (
        lambda s, w: linear_loss(s, w, None, loss, tokens),
        lambda s, w: logits_loss(linear(s, w), loss, tokens),
        lambda s, w: module_loss(s, lambda x: linear(x, w), loss, tokens, vocabulary=WORDS),
    ):
        values = parameters(STATES, WEIGHT)
        total = take(*values)
        total.backward()
        results.append([total.detach(), *(value.grad for value in values)])
    for other in results[1:]:
        for ours, theirs in zip(other, results[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_a_frozen_head_gets_no_gradient_and_frozen_states_neither():
    tokens, loss = torch.arange(TOKENS), LOSSES["lm"][0]
    for frozen in ((1, 2), (0,)):
        values = parameters(STATES, WEIGHT, BIAS, frozen=frozen)
        linear_loss(*values, loss, tokens).backward()
        assert [v.grad is None for v in values] == [i in frozen for i in range(3)]


@pytest.mark.parametrize("take", [linear_loss, module_loss])
def test_no_token_that_counts_gives_a_loss_of_zero_that_can_be_trained_on(take):
    (states,) = parameters(STATES)
    head = (WEIGHT, None) if take is linear_loss else (lambda x: linear(x, WEIGHT),)
    size = {} if take is linear_loss else {"vocabulary": WORDS}
    loss = take(states, *head, language_loss(TARGETS[:0]), TARGETS[:0], **size)
    loss.backward()
    assert loss.item() == 0
    assert states.grad.abs().max() == 0


@pytest.mark.parametrize("autocast", [False, True])
def test_in_bfloat16_the_loss_is_float32_and_gradients_have_the_dtype_of_their_tensors(autocast):
    dtype = torch.float32 if autocast else torch.bfloat16
    values = [v.to(dtype).requires_grad_() for v in (STATES, WEIGHT, BIAS)]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = linear_loss(*values, LOSSES["lm"][0], torch.arange(TOKENS))
    loss.backward()
    assert loss.dtype == torch.float32
    exact = parameters(STATES, WEIGHT, BIAS)
    wanted = linear_loss(*exact, LOSSES["lm"][0], torch.arange(TOKENS))
    wanted.backward()
    # bfloat16 has 8 bits: products are off by 2^-9, and logits are about 3.
    torch.testing.assert_close(loss.item(), wanted.item(), rtol=1e-2, atol=0)
    for ours, theirs in zip(values, exact, strict=True):
        assert ours.grad.dtype == dtype
        error = (ours.grad.double() - theirs.grad).norm() / theirs.grad.norm()
        assert error < 2e-2


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_teacher_has_nothing_to_teach_itself(temperature):
    logits = TEACHER.float()
    found = top_k(logits, K, temperature)
    for loss in (
        distillation_loss(lambda rows: logits[rows], temperature),
        top_k_loss(*found, temperature),
    ):
        total, gradient = loss(logits, EVERY)
        # float32, summed over 150 tokens
        assert total.abs() < 1e-3
        assert gradient.abs().max() < 1e-6


def test_the_top_of_the_whole_vocabulary_is_the_whole_distribution():
    logits = random(TOKENS, WORDS)
    top = top_k_loss(*top_k(TEACHER, WORDS, TEMPERATURE), TEMPERATURE)
    whole = LOSSES["kd"][0]
    for ours, theirs in zip(top(logits, EVERY), whole(logits, EVERY), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # kept in float32


def test_coarser_distributions_are_never_further_apart():
    logits = random(TOKENS, WORDS)
    totals = [
        top_k_loss(*top_k(TEACHER, k, TEMPERATURE), TEMPERATURE)(logits, EVERY)[0]
        for k in (1, 4, 16, WORDS)
    ]
    assert totals == sorted(totals)
    assert totals[0] > 0


def test_the_bucket_keeps_a_tail_that_probabilities_near_one_would_round_away():
    logits = torch.zeros(1, 1000)
    logits[0, 0] = 40.0  # all others together: 999 e^-40
    ids, log_probabilities = top_k(logits, 1, 1.0)
    assert log_probabilities[0, 1].item() == pytest.approx(-33.09, abs=0.01)
    total, gradient = top_k_loss(ids, log_probabilities.half(), 1.0)(logits, slice(0, 1))
    assert total.abs() < 1e-6
    assert gradient.isfinite().all()


def peak_bytes(call):
    """The most bytes of tensors that a call has allocated at one time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    events = found.profiler.kineto_results.events()
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize("name", ["lm", "kd", "kd_topk", "mixed"])
def test_the_loss_of_a_large_vocabulary_needs_less_than_a_tenth_of_its_logits(name):
    tokens, vocabulary, hidden = 2048, 131072, 4
    states = torch.randn(tokens, hidden, requires_grad=True)
    head = torch.randn(vocabulary, hidden)
    teacher = distillation_loss(lambda rows: linear(states[rows].detach(), head), 2.0)
    plain = language_loss(torch.arange(tokens))
    ids = torch.arange(64).expand(tokens, 64)
    by_name = {
        "lm": plain,
        "kd": teacher,
        "kd_topk": top_k_loss(ids, torch.zeros(tokens, 65), 2.0),
        "mixed": mixed_loss(teacher, plain, 0.5),
    }
    # The first of the chunks tell: all are of one size, and nothing of them is left.
    size = chunk_size(tokens, vocabulary, CPU)
    assert size * 64 == tokens
    counted = torch.arange(tokens)[: 3 * size]

    def call():
        linear_loss(states, head, None, by_name[name], counted).backward()

    assert 0 < peak_bytes(call) < 4 * tokens * vocabulary / 10


@pytest.mark.parametrize("device", [CPU, GPU])
def test_a_chunk_has_the_same_bytes_whatever_the_tokens_and_the_vocabulary(device):
    limit = losses.CPU_CHUNK_BYTES if device == CPU else losses.CHUNK_BYTES
    for vocabulary in (32_000, 49_152, 131_072):
        for tokens in (1, 500, 2048, 10**6 + 1):
            size = chunk_size(tokens, vocabulary, device)
            assert 1 <= size <= tokens
            assert size * vocabulary * 4 <= limit
            # All tokens at once, or more than half of what a chunk may take.
            assert size == tokens or 2 * size * vocabulary * 4 > limit - 8 * vocabulary
    assert chunk_size(10**6, 10**6, CPU) == losses.SMALLEST_CHUNK
    assert chunk_size(0, 100, device) == 1
