"""Tests over generated examples: hypothesis draws them, and shortens the one that fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


def drawn(number: int) -> Callable[[Callable[..., None]], Callable[[], None]]:
    """Return a decorator that runs a test on so many examples, the same ones each time.

    The test gets a `random.Random` whose choices hypothesis makes.
    """
    choices: Any = st.randoms(use_true_random=False)

    def decorate(test: Callable[..., None]) -> Callable[[], None]:
        chosen = settings(
            max_examples=number,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=[*HealthCheck],
        )
        return chosen(given(choices)(test))

    return decorate
