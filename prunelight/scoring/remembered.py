"""Scores that several methods, or several amounts of one, ask for: computed once.

Within `remembering_scores` a function that is `remembered` computes once for the same model,
windows and arguments. What it took is added to the time of those who are given it again, so that
each method's cost is what it takes alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from transformers import PreTrainedModel

from prunelight.calibration.windows import Windows, split_windows
from prunelight.planning.fingerprints import describe_windows, fingerprint_of, model_fingerprint

P = ParamSpec("P")
R = TypeVar("R")


@dataclass
class Memory:
    """What was computed.

    Attributes:
        scores: key -> result, and the seconds that it took.
        seconds_spared: of all results that were given again.
    """

    scores: dict[str, tuple[Any, float]] = field(default_factory=dict)
    seconds_spared: float = 0.0


_MEMORY: ContextVar[Memory | None] = ContextVar("scores", default=None)


@contextmanager
def remembering_scores(memory: Memory) -> Iterator[Memory]:
    """Let functions that are `remembered` use this memory; without it they compute each time."""
    token = _MEMORY.set(memory)
    try:
        yield memory
    finally:
        _MEMORY.reset(token)


def remembered(function: Callable[P, R]) -> Callable[P, R]:
    """Return a scoring function that computes once within `remembering_scores`.

    Its first two arguments must be the model and the windows; callers must not change the result.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        memory = _MEMORY.get()
        if memory is None:
            return function(*args, **kwargs)
        key = _key(function.__qualname__, *args, **kwargs)
        if key in memory.scores:
            result, seconds = memory.scores[key]
            memory.seconds_spared += seconds
            return result
        start = time.perf_counter()
        result = function(*args, **kwargs)
        memory.scores[key] = result, time.perf_counter() - start
        return result

    return call


def _key(name: str, model: Any, windows: Any, *rest: Any, **named: Any) -> str:
    assert isinstance(model, PreTrainedModel)
    given: Windows = windows
    facts = describe_windows(*split_windows(given))
    # Where layers compute, and what helps them, does not change what they give.
    settings = {k: v for k, v in named.items() if k not in ("device", "offload", "replay")}
    return fingerprint_of(name, model_fingerprint(model), facts, repr(rest), repr(settings))
