"""Questions of the probes: lines of text, each with parts that a model is to predict.

Many lines after one another make one row: each line is an example for those after it, so that a
question costs its own tokens only. All lines come from a fixed seed, without any download.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

SEED = 21

# Short and common, so that most tokenizers have a token for each.
WORDS = (
    *("river", "stone", "cloud", "apple", "house", "bread", "chair", "green", "table", "water"),
    *("light", "music", "paper", "horse", "glass", "garden", "window", "summer", "winter"),
    *("silver", "bridge", "street", "school", "letter", "dinner", "market", "doctor", "forest"),
    *("island", "mirror", "orange", "pocket", "rabbit", "shadow", "ticket", "valley", "yellow"),
    *("button", "candle", "basket"),
)
BRACKETS = ((" (", " )"), (" [", " ]"), (" {", " }"))
QUOTES = ('"', "'")


@dataclass(frozen=True)
class Part:
    """A piece of a line.

    Attributes:
        text: that stands there.
        asked: the model is to predict it.
        options: texts of which the right one is to be the likeliest; empty where the right text is
            to be the likeliest of all.
    """

    text: str
    asked: bool = False
    options: tuple[str, ...] = ()


Line: TypeAlias = tuple[Part, ...]


def additions(digits: int) -> Iterator[Line]:
    """Yield sums of two numbers of so many digits: "37 + 48 = 85"."""
    numbers = random.Random(SEED)
    low, high = 10 ** (digits - 1), 10**digits - 1
    while True:
        first, second = numbers.randint(low, high), numbers.randint(low, high)
        yield Part(f"{first} + {second} ="), Part(f" {first + second}", asked=True), Part("\n")


def brackets() -> Iterator[Line]:
    """Yield nested brackets around words, the closing ones asked: "( river [ stone ] )"."""
    numbers = random.Random(SEED)
    closing = tuple(close for _, close in BRACKETS)
    while True:
        nested = [numbers.choice(BRACKETS) for _ in range(numbers.randint(2, 4))]
        words = numbers.sample(WORDS, len(nested))
        opened = "".join(f"{start} {word}" for (start, _), word in zip(nested, words, strict=True))
        asked = [Part(close, asked=True, options=closing) for _, close in reversed(nested)]
        yield Part(opened.strip()), *asked, Part("\n")


def quotes() -> Iterator[Line]:
    """Yield words in one of two kinds of quotes, the closing one asked."""
    numbers = random.Random(SEED)
    while True:
        quote, words = numbers.choice(QUOTES), numbers.sample(WORDS, numbers.randint(2, 5))
        closing = tuple(f" {each}" for each in QUOTES)
        asked = Part(f" {quote}", asked=True, options=closing)
        yield Part(f"say {quote} {' '.join(words)}"), asked, Part("\n")


def copies() -> Iterator[Line]:
    """Yield lists of random words, each list twice, the second one asked word by word."""
    numbers = random.Random(SEED)
    while True:
        words = numbers.sample(WORDS, 8)
        repeated = (Part(f" {word}", asked=True) for word in words)
        yield Part(" ".join(words) + " |"), *repeated, Part("\n")


def counting() -> Iterator[Line]:
    """Yield runs of numbers, those after the second asked: "47 48 49 50"."""
    numbers = random.Random(SEED)
    while True:
        first = numbers.randint(10, 90)
        rest = (Part(f" {n}", asked=True) for n in range(first + 2, first + 6))
        yield Part(f"{first} {first + 1}"), *rest, Part("\n")


# Probe -> an endless supply of its lines.
QUESTIONS: dict[str, Callable[[], Iterator[Line]]] = {
    "sums_1_digit": partial(additions, 1),
    "sums_2_digits": partial(additions, 2),
    "sums_3_digits": partial(additions, 3),
    "counting": counting,
    "brackets": brackets,
    "quotes": quotes,
    "copying": copies,
}
