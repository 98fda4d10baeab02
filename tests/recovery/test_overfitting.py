"""Too little text, and validation that rises while training falls."""

import pytest

from prunelight.recovery.overfitting import TrainingText, ValidationPoint, overfit_risk, overfitting


def text(tokens, tokens_per_step=100):
    return TrainingText(tokens, tokens_per_step, tokens // tokens_per_step)


@pytest.mark.parametrize(
    ("recovery", "tokens", "steps", "parameters", "expected"),
    [
        ("full", 1000, 20, 2000, "read 2.0 times, train 0.0M parameters"),
        ("full", 1000, 10, 2000, None),  # each token once: nothing to learn by heart
        ("full", 4000, 80, 2000, None),  # more tokens than parameters
        ("lora", 1000, 20, 2000, None),
        ("lora", 1000, 50, 2000, "are read 5.0 times; more than 4 times"),
        ("full", 4000, 200, 2000, "are read 5.0 times; more than 4 times"),
    ],
)
def test_too_little_text_is_told_before_training(recovery, tokens, steps, parameters, expected):
    risk = overfit_risk(recovery, text(tokens), steps, parameters)
    assert (risk is None) if expected is None else expected in risk


def history(perplexities, losses):
    pairs = zip(perplexities, losses, strict=True)
    return [ValidationPoint(10 * i, p, loss) for i, (p, loss) in enumerate(pairs)]


@pytest.mark.parametrize(
    ("perplexities", "losses", "told"),
    [
        ([9, 5, 6, 7, 8], [3, 2, 1.5, 1.2, 1], True),
        ([9, 5, 6, 7, 8], [3, 2, 2.5, 2.7, 3], False),  # both worse: not learnt by heart
        ([9, 5, 6, 5.9, 8], [3, 2, 1.5, 1.2, 1], False),  # a bump
        ([6, 7, 8], [3, 2, 1], False),  # too few to tell
        ([9, 8, 7, 6, 5], [5, 4, 3, 2, 1], False),
    ],
)
def test_overfitting_is_validation_that_rises_while_training_falls(perplexities, losses, told):
    found = overfitting(history(perplexities, losses))
    assert (found is not None) == told
    if told:
        assert "rose from 5 at step 10 to 8 at step 40" in found
