"""Scores that several methods, or several amounts of one, ask for: computed once.

Within `remembering_scores` a function that is `remembered` computes once for the same model,
windows and arguments. What it took is added to the time of those who are given it again, so that
each method's cost is what it takes alone. A memory may come from a file, and then nothing is
computed: what it lacks is an error.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from inspect import signature, unwrap
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
        calls: key -> what was computed: the function's name and its arguments, as text.
        source: where the scores were read; what is not there is then an error. None computes it.
    """

    scores: dict[str, tuple[Any, float]] = field(default_factory=dict)
    seconds_spared: float = 0.0
    calls: dict[str, str] = field(default_factory=dict)
    source: str | None = None

    def keep(
        self, function: Callable[..., Any], result: Any, seconds: float, *args: Any, **kwargs: Any
    ) -> None:
        """Keep a result as if a function that is `remembered` had been called so."""
        key, call = _key(unwrap(function), *args, **kwargs)
        self.scores[key], self.calls[key] = (result, seconds), call


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
        key, text = _key(unwrap(function), *args, **kwargs)
        if key in memory.scores:
            result, seconds = memory.scores[key]
            memory.seconds_spared += seconds
            return result
        if memory.source is not None:
            raise ValueError(
                f"{memory.source} holds no {text}; plan from the model itself, which computes it: "
                "prunelight plan MODEL"
            )
        start = time.perf_counter()
        result = function(*args, **kwargs)
        memory.scores[key] = result, time.perf_counter() - start
        memory.calls[key] = text
        return result

    return call


# Where layers compute, and what helps them, does not change what they give.
_WITHOUT_EFFECT = ("device", "offload", "replay")


def _key(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[str, str]:
    """Return what identifies a call, however its arguments are written, and the call as text."""
    bound = signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    model, windows, *_ = bound.arguments.values()
    assert isinstance(model, PreTrainedModel)
    given: Windows = windows
    facts = describe_windows(*split_windows(given))
    rest: Mapping[str, Any] = dict([*bound.arguments.items()][2:])
    named = {name: value for name, value in rest.items() if name not in _WITHOUT_EFFECT}
    text = ", ".join(f"{name}={value!r}" for name, value in named.items())
    call = f"{function.__name__}({text})"
    return fingerprint_of(function.__qualname__, model_fingerprint(model), facts, text), call
