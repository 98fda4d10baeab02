"""One answer to a value that is none of those that are known."""

from __future__ import annotations

from collections.abc import Iterable


def check_choice(name: str, value: object, known: Iterable[object]) -> None:
    """Check that the argument `name` has one of its known values.

    Raises:
        ValueError: if it has not; names them all.
    """
    choices = [*known]
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(str, choices))}")
