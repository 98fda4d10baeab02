"""The one clock of all speeds: models are timed in turn, round by round.

A machine's clock drifts with its load: two speeds compare only if they were measured in turn. So
the rounds go dense, pruned, pruned, dense, ... A drift cancels, and the factor is the median over
the rounds. A generation is timed token by token: one run gives the time to the first token, which
is that of the prompt, and the time of decoding.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from prunelight.models.forward import evaluating, generate_tokens
from prunelight.runtime.devices import synchronize
from prunelight.runtime.progress import Bar

LEAST_ROUNDS = 3

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Spread:
    """A figure over rounds.

    Attributes:
        median: of the rounds.
        low: second lowest of the rounds; the lowest, where there are fewer than 6.
        high: second highest, likewise.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of one value for each round."""
        inner = sorted(values)
        inner = inner[1:-1] if len(inner) >= 6 else inner
        return cls(statistics.median(values), inner[0], inner[-1])


def in_turn(
    calls: Sequence[Callable[[], Answer]],
    rounds: int,
    *,
    warmups: int = 1,
    patience: float = float("inf"),
    label: str = "speed",
) -> list[list[Answer]]:
    """Return, for each call, what it gave in each round.

    Every other round goes the other way, so that a drift of the clock cancels.

    Args:
        calls: what is timed in turn.
        rounds: that count.
        warmups: rounds before them, which do not count.
        patience: seconds; then no further round begins, once there are 3 that count.
        label: name of the progress bar.
    """
    answers: list[list[Answer]] = [[] for _ in calls]
    order, begun = [*enumerate(calls)], time.monotonic()
    with Bar(label, (rounds + warmups) * len(calls), unit="measurements") as bar:
        for number in range(rounds + warmups):
            if number - warmups >= LEAST_ROUNDS and time.monotonic() - begun > patience:
                break
            for index, call in order if number % 2 else order[::-1]:
                answer = call()
                bar.update()
                if number >= warmups:
                    answers[index].append(answer)
    return answers


def seconds_of(device: torch.device, call: Callable[[], object]) -> float:
    """Return the seconds that a call takes, until the device has done its work."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


@dataclass(frozen=True)
class TimedGeneration:
    """Seconds of one generation: until its first token, and from there to the last."""

    first_token: float
    decode: float


def time_generation(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int) -> TimedGeneration:
    """Time a greedy generation with the cache.

    Args:
        model: whose mode is restored.
        ids: the prompts, (B, T).
        new_tokens: for each prompt, at least 2; an end-of-text token does not stop it.
    """
    clock = _Clock()
    with evaluating(model):
        synchronize(model.device)
        start = time.perf_counter()
        generate_tokens(model, ids, new_tokens, streamer=clock)
        synchronize(model.device)
    first, last = clock.times[1], clock.times[-1]  # the prompt itself is put before
    return TimedGeneration(first - start, max(last - first, 1e-9))


class _Clock(BaseStreamer):
    """Notes when `generate` hands over each token, which it moves to the CPU first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing more."""
