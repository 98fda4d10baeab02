"""The check of arguments, in one place: their types by their annotations, then declared rules.

`@checked(ratio=within(0, 1))` stands before a constructor or a function; `check_fields` does the
same in the `__post_init__` of a dataclass. Python checks no annotations, and YAML gives 32.5, .inf,
null or "x" for any of them. A bad value is refused where it is given, before any work.

A value of another library that is a whole number, a number, a path or a sequence becomes Python's
own, so that plans can be written as JSON.
"""

from __future__ import annotations

import inspect
import math
import os
import types
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from functools import cache, wraps
from numbers import Integral, Real
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Rule:
    """What a value must be beside its type.

    Attributes:
        text: the rule in words, what follows "must".
        holds: tells whether a value keeps it.
        remedy: says what a value that breaks it was meant to be, if that is known.
    """

    text: str
    holds: Callable[[Any], bool]
    remedy: Callable[[Any], str] = lambda _: ""


def at_least(low: float) -> Rule:
    """Return the rule of a number that must not be below `low`."""
    return Rule(f"be at least {low}", lambda value: value >= low)


def above(low: float) -> Rule:
    """Return the rule of a number above `low`."""
    return Rule(f"be above {low}", lambda value: value > low)


def within(low: float, high: float) -> Rule:
    """Return the rule of a number in [low, high)."""
    return Rule(f"lie in [{low}, {high})", lambda value: low <= value < high, _share(low, high))


def between(low: float, high: float) -> Rule:
    """Return the rule of a number in [low, high]."""
    return Rule(f"lie in [{low}, {high}]", lambda value: low <= value <= high, _share(low, high))


def _share(low: float, high: float) -> Callable[[Any], str]:
    """Return the remedy of a share that was given in percent."""
    is_share = (low, high) == (0, 1)
    return lambda value: f"; {value / 100:g} is {value:g} %" if is_share and 1 < value < 100 else ""


NOT_EMPTY = Rule("not be empty", lambda value: bool(value.strip() if _is(str, value) else value))
# torch and numpy take no other seeds.
SEED = between(-(2**63), 2**63 - 1)


def checked(**rules: Rule) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator that checks the arguments of each call of a function.

    Types come from the function's annotations. None is refused unless the annotation allows it; no
    rule is asked about None.

    Args:
        rules: argument -> what its value must be beside its type.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        assert {*rules} <= {*signature.parameters}

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            known = signature.parameters
            for name in kwargs:
                if name not in known:
                    owner = function.__qualname__.removesuffix(".__init__")
                    names = [other for other in known if other != "self"]
                    near = did_you_mean(name, names) or f"; it has {', '.join(names)}"
                    raise TypeError(f"{owner} has no argument {name!r}{near}")
            bound = signature.bind(*args, **kwargs)  # a TypeError names a missing argument
            hints = _hints(function)
            for name, value in bound.arguments.items():
                if name in hints:
                    default = signature.parameters[name].default
                    bound.arguments[name] = checked_value(
                        name, value, hints[name], rules.get(name), default
                    )
            return function(*bound.args, **bound.kwargs)

        return call

    return decorate


def check_fields(settings: Any, prefix: str = "", **rules: Rule) -> None:
    """Check the fields of a dataclass by their annotations and rules, in place, as `checked` does.

    Args:
        settings: an instance, from its `__post_init__`; it may be frozen.
        prefix: of the names in errors, such as "lora.".
        rules: field -> what its value must be beside its type.

    Raises:
        TypeError: if a value has the wrong type.
        ValueError: if it breaks a rule.
    """
    kind: Any = type(settings)
    hints = _hints(kind)
    for field in fields(settings):
        value = getattr(settings, field.name)
        right = checked_value(
            prefix + field.name, value, hints[field.name], rules.get(field.name), field.default
        )
        if right is not value:
            object.__setattr__(settings, field.name, right)


def checked_value(
    name: str,
    value: Any,
    hint: Any,
    rule: Rule | None = None,
    default: Any = inspect.Parameter.empty,
) -> Any:
    """Return the value as Python's own type, if it fits the annotation and the rule.

    Args:
        name: of the argument, for the error.
        value: what was given.
        hint: annotation, evaluated.
        rule: what the value must be beside its type.
        default: of the argument; errors name it as the way out.

    Raises:
        TypeError: if the value has the wrong type.
        ValueError: if it is NaN, infinite, no known choice, or breaks the rule.
    """
    choices = [choice for part in _parts(hint) for choice in _choices(part)]
    if _is(str, value) and choices and str not in _parts(hint):
        check_choice(name, value, choices)
        return value
    fitting = [part for part in _parts(hint) if _fits(value, part)]
    if not fitting:
        wrong = ValueError if _is(Real, value) and not math.isfinite(value) else TypeError
        raise wrong(f"{name}={value!r} must be {_words(hint)}{_remedy(default)}")
    right = _own(value, fitting[0])
    if rule is not None and right is not None and not rule.holds(right):
        raise ValueError(
            f"{name}={value!r} must {rule.text}{rule.remedy(right) or _remedy(default)}"
        )
    return right


def check_choice(name: str, value: object, known: Iterable[object]) -> None:
    """Check that the argument `name` has one of its known values.

    Raises:
        ValueError: if `value` is not in `known`; the error lists the known values, and the nearest.
    """
    choices = [*known]
    if not any(
        value is choice or (type(value), value) == (type(choice), choice) for choice in choices
    ):
        near = did_you_mean(value, choices)
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(str, choices))}{near}")


def did_you_mean(name: object, known: Iterable[object]) -> str:
    """Return "; did you mean ...?" for the nearest of some names, "" if none is near."""
    folded = {str(choice).casefold(): str(choice) for choice in known if choice != name}
    given = str(name).casefold()
    near = [other for other in _OTHER_NAMES.get(given, ()) if other in folded]
    near = near or get_close_matches(given, folded, n=1, cutoff=0.5)
    return f"; did you mean {folded[near[0]]}?" if near else ""


# What other programs call a dtype or a precision, and how it is called here.
_OTHER_NAMES = {
    "fp16": ("float16", "16-mixed"),
    "half": ("float16", "16-mixed"),
    "bf16": ("bfloat16", "bf16-mixed"),
    "fp32": ("float32", "32-true"),
    "float32": ("32-true",),
    "float16": ("16-true",),
    "bfloat16": ("bf16-true",),
}


@cache
def _hints(function: Any) -> dict[str, Any]:
    hints = get_type_hints(function)
    hints.pop("return", None)
    return hints


def _parts(hint: Any) -> tuple[Any, ...]:
    """Return the alternatives of an annotation."""
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(part for one in get_args(hint) for part in _parts(one))
    return (hint,)


def _choices(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) is Literal else ()


def _is(kind: type, value: Any) -> bool:
    return isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool)


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a value is right for one alternative of an annotation."""
    origin = get_origin(hint) or hint
    if origin is Any:
        return True
    if origin is types.NoneType or value is None:
        return value is None and origin is types.NoneType
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(hint))
    if origin is bool:
        return isinstance(value, bool) or type(value).__name__ in ("bool", "bool_")
    if origin is int:
        return _is(Integral, value)
    if origin is float:
        return _is(Real, value) and math.isfinite(value)
    if origin is str:
        return isinstance(value, str | os.PathLike)
    if origin is list:
        (part,) = get_args(hint) or (Any,)
        sequence = isinstance(value, Collection) and not isinstance(value, str | bytes | Mapping)
        return sequence and all(any(_fits(x, p) for p in _parts(part)) for x in value)
    if origin is dict:
        return isinstance(value, Mapping)
    if isinstance(origin, type) and is_dataclass(origin):
        return isinstance(value, origin)
    # An object of a library, or a function. What YAML can write is none.
    return not isinstance(value, bool | int | float | str | bytes | list | tuple | dict)


def _own(value: Any, hint: Any) -> Any:
    """Return a value that fits as Python's own type."""
    origin = get_origin(hint) or hint
    if origin is bool:
        return bool(value)
    if origin is int and type(value) is not int:
        return int(value)
    if origin is float and not isinstance(value, int | float):
        return float(value)
    if origin is str and not isinstance(value, str):
        return os.fspath(value)
    if origin is list:
        (part,) = get_args(hint) or (Any,)
        parts = [next((p for p in _parts(part) if _fits(x, p)), part) for x in value]
        own = [_own(x, p) for x, p in zip(value, parts, strict=True)]
        return value if type(value) is list and own == value else own
    return value


_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "text",
    dict: "a mapping of names to values",
    types.NoneType: "None",
}


def _words(hint: Any) -> str:
    """Return what a value must be, in words."""
    texts = []
    for part in _parts(hint):
        origin = get_origin(part) or part
        if origin is Literal:
            texts.append(f"one of {', '.join(map(str, get_args(part)))}")
        elif origin is list:
            inner = " or ".join(_words(one) for one in _parts(*(get_args(part) or (Any,))))
            texts.append(f"a list, each entry {inner}")
        elif isinstance(origin, type) and is_dataclass(origin):
            texts.append(f"a {origin.__name__}({', '.join(f.name for f in fields(origin))})")
        else:
            texts.append(_WORDS.get(origin, f"a {getattr(origin, '__name__', origin)}"))
    return " or ".join(texts)


def _remedy(default: Any) -> str:
    """Return how to go on where an argument may be left out."""
    if default is inspect.Parameter.empty or not isinstance(
        default, bool | int | float | str | list
    ):
        return ""
    return f"; its default is {default!r}"
