"""Arguments are checked by their annotations and rules, before a function starts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from prunelight.runtime.arguments import (
    NOT_EMPTY,
    at_least,
    check_choice,
    check_fields,
    checked,
    did_you_mean,
    within,
)

NAN, INF = float("nan"), float("inf")


@checked(ratio=within(0, 1), count=at_least(1), names=NOT_EMPTY)
def prune(
    ratio: float | None = None,
    count: int = 3,
    score: Literal["top", "mean"] = "top",
    layers: list[int] | None = None,
    names: str | list[str] = "a",
    strict: bool = False,
):
    return ratio, count, score, layers, names, strict


@dataclass(frozen=True)
class Settings:
    width: int = 2
    share: float = 0.5

    def __post_init__(self):
        check_fields(self, "settings.", width=at_least(1), share=within(0, 1))


@pytest.mark.parametrize(
    ("argument", "value", "error", "told"),
    [
        ("ratio", "x", TypeError, "ratio='x' must be a finite number or None"),
        ("ratio", NAN, ValueError, "ratio=nan must be a finite number or None"),
        ("ratio", -INF, ValueError, "ratio=-inf must be a finite number or None"),
        ("ratio", 1, ValueError, r"ratio=1 must lie in \[0, 1\)"),
        ("ratio", True, TypeError, "ratio=True must be a finite number"),
        ("count", 1.5, TypeError, "count=1.5 must be a whole number; its default is 3"),
        ("count", INF, ValueError, "count=inf must be a whole number; its default is 3"),
        ("count", None, TypeError, "count=None must be a whole number"),
        ("count", 0, ValueError, "count=0 must be at least 1; its default is 3"),
        ("score", "tops", ValueError, "score='tops' must be one of top, mean; did you mean top?"),
        ("score", 3, TypeError, "score=3 must be one of top, mean"),
        ("layers", "x", TypeError, "layers='x' must be a list, each entry a whole number or None"),
        ("layers", [1.5], TypeError, r"layers=\[1.5\] must be a list"),
        ("layers", [True], TypeError, r"layers=\[True\] must be a list"),
        ("names", "", ValueError, "names='' must not be empty"),
        ("names", [], ValueError, r"names=\[\] must not be empty"),
        ("names", [3], TypeError, r"names=\[3\] must be text or a list, each entry text"),
        ("strict", 1, TypeError, "strict=1 must be true or false; its default is False"),
        ("counts", 1, TypeError, "prune has no argument 'counts'; did you mean count?"),
    ],
)
def test_a_wrong_value_is_told_with_rule_and_remedy(argument, value, error, told):
    with pytest.raises(error, match=told):
        prune(**{argument: value})


def test_values_of_other_libraries_become_python_s_own():
    values = prune(np.float32(0.5), np.int64(4), "mean", (0, -1), Path("b"), np.True_)
    assert values == (0.5, 4, "mean", [0, -1], "b", True)
    assert [type(value) for value in values] == [float, int, str, list, str, bool]
    assert prune(layers=range(2))[3] == [0, 1]


def test_right_values_stay_as_they_are():
    layers = [0]
    assert prune(0, 3, layers=layers)[3] is layers
    assert type(prune(0)[0]) is int  # a fingerprint tells 0 from 0.0


def test_fields_of_settings_are_checked_with_the_name_of_their_section():
    assert Settings(np.int64(3)).width == 3
    with pytest.raises(TypeError, match=r"settings.width=32.5 must be a whole number"):
        Settings(32.5)
    with pytest.raises(ValueError, match=r"settings.share=1.0 must lie in \[0, 1\)"):
        Settings(share=1.0)


def test_the_nearest_name_is_told():
    assert did_you_mean("ShortGTP", ["ShortGPT", "SLEB"]) == "; did you mean ShortGPT?"
    assert did_you_mean("fp16", ["float16", "bfloat16"]) == "; did you mean float16?"
    assert did_you_mean("zzz", ["ShortGPT", "SLEB"]) == ""
    with pytest.raises(ValueError, match="merge=1 must be one of 2, x"):
        check_choice("merge", 1, (2, "x"))
