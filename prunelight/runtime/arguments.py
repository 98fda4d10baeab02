"""The check of an argument that must be one of several known values."""

from __future__ import annotations

from collections.abc import Iterable


def check_choice(name: str, value: object, known: Iterable[object]) -> None:
    """Check that the argument `name` has one of its known values.

    Raises:
        ValueError: if `value` is not in `known`; the error lists the known values.
    """
    choices = [*known]
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(str, choices))}")
