"""What is measured of a model on text, alone and against a reference: plain data, no torch.

All logarithms are natural; all figures are over predicted tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % bootstrap interval over windows."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class TextQuality:
    """Quality of a model on one text.

    Attributes:
        text: name of the text, without folders of this machine.
        protocol: how the windows were made, in one sentence.
        seq_len: tokens of a window.
        perplexity: token-weighted, with its interval.
        accuracy: next-token accuracy in [0, 1].
        tokens: predicted tokens.
        window_nll: summed negative log-likelihood of each window, in nats, in the text's order.
        window_tokens: predicted tokens of each window.
        window_correct: correct predictions of each window.
    """

    text: str
    protocol: str
    seq_len: int
    perplexity: Interval
    accuracy: float
    tokens: int
    window_nll: list[float] = field(repr=False)
    window_tokens: list[int] = field(repr=False)
    window_correct: list[int] = field(repr=False)


@dataclass(frozen=True)
class Divergence:
    """How far a model's next-token distributions are from those of a reference, on one text.

    Attributes:
        kl: mean KL(reference || model) in nats, with its interval.
        kl_median: median over tokens.
        kl_p99: 99th percentile over tokens.
        kl_by_position: first position of each range of positions, and the mean KL there.
        same_top1: share of tokens at which both have the same most likely token, with its interval.
        right_token_change: mean change of the probability of the right token, in [-1, 1].
        right_token_change_rms: root of the mean square of that change.
        right_token_change_percentiles: percentile ("1", "5", "25", "50", "75", "95", "99") -> its
            value.
        ln_perplexity_ratio: ln(perplexity of the model / perplexity of the reference), with its
            interval; both on the same windows.
        tokens: compared tokens.
        window_kl: summed KL of each window, for paired comparisons.
        window_same_top1: tokens of each window with the same most likely token.
    """

    kl: Interval
    kl_median: float
    kl_p99: float
    kl_by_position: list[tuple[int, float]]
    same_top1: Interval
    right_token_change: float
    right_token_change_rms: float
    right_token_change_percentiles: dict[str, float]
    ln_perplexity_ratio: Interval
    tokens: int
    window_kl: list[float] = field(repr=False)
    window_same_top1: list[int] = field(repr=False)
