"""Perplexity and accuracy over batches, and the training loss that agrees with them."""

import math

import pytest
import torch
from torchmetrics.text import Perplexity

from prunelight.evaluation.metrics import TokenAccuracy, TokenPerplexity
from prunelight.losses import IGNORED_LABEL, next_token_loss, next_token_sums


def logits_and_labels(num_samples=5, seq_len=70, vocabulary=37, *, seed=0):
    """More than one chunk of 256 tokens, and labels of which a quarter do not count."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num_samples, seq_len, vocabulary, generator=generator)
    labels = torch.randint(vocabulary, (num_samples, seq_len), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.25] = IGNORED_LABEL
    return logits, labels


def naive_nll(logits, labels):
    """Each predicted token on its own, in float64."""
    return [
        -math.log(logits[b, t].double().softmax(-1)[labels[b, t + 1]].item())
        for b in range(labels.shape[0])
        for t in range(labels.shape[1] - 1)
        if labels[b, t + 1] != IGNORED_LABEL
    ]


def perplexity(logits, labels, sizes):
    metric = TokenPerplexity()
    for part, wanted in zip(logits.split(sizes), labels.split(sizes), strict=True):
        nll, _, tokens = next_token_sums(part, wanted)
        metric.update(nll, tokens)
    return metric.compute().item()


def test_perplexity_is_exp_of_the_mean_negative_log_likelihood():
    logits, labels = logits_and_labels()
    losses = naive_nll(logits, labels)
    # Each loss is computed in float32: relative 1e-6.
    expected = pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-6)
    assert perplexity(logits, labels, [5]) == expected


def test_perplexity_agrees_with_torchmetrics():
    logits, labels = logits_and_labels()
    theirs = Perplexity(ignore_index=IGNORED_LABEL)
    theirs.update(logits[:, :-1], labels[:, 1:])
    # They sum float32 probabilities of a full softmax: relative 1e-5.
    assert perplexity(logits, labels, [5]) == pytest.approx(theirs.compute().item(), rel=1e-5)


@pytest.mark.parametrize("sizes", [[1, 4], [2, 2, 1], [4, 1], [1, 1, 1, 1, 1]])
def test_any_split_into_batches_gives_the_same_perplexity(sizes):
    logits, labels = logits_and_labels()
    labels[0, 5:] = IGNORED_LABEL  # so that batches weigh differently
    # The same float32 losses, added in another order.
    assert perplexity(logits, labels, sizes) == pytest.approx(
        perplexity(logits, labels, [5]), rel=1e-6
    )


def test_a_uniform_prediction_has_the_perplexity_of_the_vocabulary():
    labels = torch.arange(12).reshape(2, 6)
    assert perplexity(torch.zeros(2, 6, 37), labels, [2]) == pytest.approx(37, rel=1e-6)


def test_logits_at_ignored_labels_have_no_influence():
    logits, labels = logits_and_labels()
    changed = logits.clone()
    changed[:, :-1][labels[:, 1:] == IGNORED_LABEL] = 1000.0
    changed[:, -1] = -1000.0  # predicts nothing
    assert perplexity(changed, labels, [5]) == perplexity(logits, labels, [5])


def test_tokens_are_the_labels_that_count_without_the_first_of_each_sequence():
    logits, labels = logits_and_labels()
    _, _, tokens = next_token_sums(logits, labels)
    assert tokens == sum(int(label) != IGNORED_LABEL for row in labels for label in row[1:])


def test_bfloat16_logits_are_summed_in_float32():
    logits, labels = logits_and_labels()
    half = logits.bfloat16()
    assert perplexity(half, labels, [5]) == perplexity(half.float(), labels, [5])


def test_accuracy_is_the_share_of_greedy_hits():
    labels = torch.tensor([[9, 1, 2, 3, IGNORED_LABEL], [9, 4, 5, 6, 7]])
    logits = torch.zeros(2, 5, 10)
    for row, column, token in [(0, 0, 1), (0, 1, 2), (0, 2, 9), (0, 3, 9), (1, 0, 4), (1, 1, 9)]:
        logits[row, column, token] = 1.0
    metric = TokenAccuracy()
    for part, wanted in ((logits[:1], labels[:1]), (logits[1:], labels[1:])):
        _, correct, tokens = next_token_sums(part, wanted)
        metric.update(correct, tokens)
    assert metric.compute().item() == pytest.approx(3 / 7)  # 1, 2 and 4 of seven labels that count


def test_the_training_loss_and_its_gradient_are_those_of_torch():
    logits, labels = logits_and_labels()
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    loss = next_token_loss(ours, labels)
    expected = torch.nn.functional.cross_entropy(
        theirs[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED_LABEL
    )
    (2 * loss).backward()
    (2 * expected).backward()
    # float32 sums in another order.
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-8)


def test_the_training_loss_of_no_labels_is_zero():
    logits = torch.randn(2, 4, 7, requires_grad=True)
    loss = next_token_loss(logits, torch.full((2, 4), IGNORED_LABEL))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().max() == 0


def test_the_training_loss_is_the_log_of_the_perplexity():
    logits, labels = logits_and_labels()
    loss = next_token_loss(logits, labels).item()
    assert math.exp(loss) == pytest.approx(perplexity(logits, labels, [5]), rel=1e-5)  # float32


def test_the_gradient_of_float16_logits_is_not_lost_before_the_loss_is_scaled():
    torch.manual_seed(0)
    logits = (torch.randn(1, 64, 20_000) * 2).half().requires_grad_()
    labels = torch.randint(20_000, (1, 64))
    (next_token_loss(logits, labels) * 2.0**12).backward()
    reference = logits.detach().float().requires_grad_()
    (next_token_loss(reference, labels) * 2.0**12).backward()
    lost = ((logits.grad == 0) & (reference.grad.abs() > 1e-7)).float().mean()
    assert lost < 0.01


def test_the_metric_keeps_counting_under_a_cast_of_the_module():
    metric = TokenPerplexity().to(torch.bfloat16)
    metric._apply(lambda tensor: tensor.bfloat16() if tensor.is_floating_point() else tensor)
    for _ in range(2000):
        metric.update(torch.tensor(1500.3), torch.tensor(500))
    assert metric.compute().item() == pytest.approx(math.exp(1500.3 / 500), rel=1e-6)
