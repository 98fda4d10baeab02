"""The methods of a contest: which class, which arguments, and which argument is the amount.

A method is one of `prunelight.callbacks`, or any class with its face. What it is asked for is set
by `Entrant.make(amount arguments)`: all others are the user's, or the method's own defaults. A row
may hold a series of methods that prune one after another, each its share of what goes.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from difflib import get_close_matches
from importlib import import_module
from itertools import pairwise
from typing import Any, Literal, get_args, get_type_hints

import prunelight.callbacks
from prunelight.callbacks.base import PruningCallback
from prunelight.comparison.settings import check_keys

Kind = Literal["depth", "width", "slicing", "zeros", "budget"]

# What a method may be asked by, in the order in which a comparison takes them.
AMOUNTS: dict[Kind, tuple[str, ...]] = {
    "zeros": ("sparsity",),
    "depth": ("num_layers",),
    "slicing": ("slice_ratio",),
    "width": ("neuron_ratio",),
    "budget": ("budget",),
}
# What a method is asked by where each has its own measure: a share of what it removes.
OWN_RATIOS: dict[Kind, str] = {
    "zeros": "sparsity",
    "depth": "ratio",
    "slicing": "slice_ratio",
    "width": "neuron_ratio",
}
# Arguments that say how much, too: a config that holds one leaves nothing to a comparison.
_OTHER_AMOUNTS: dict[Kind, tuple[str, ...]] = {
    "zeros": ("pattern",),
    "depth": ("ratio", "threshold", "layers", "parameter_ratio"),
    "slicing": ("parameter_ratio", "slice_ratios"),
    "width": ("intermediate_size",),
    "budget": (),
}


@dataclass(frozen=True)
class Entrant:
    """A method that takes part.

    Attributes:
        label: of its rows.
        made: its class.
        arguments: as the config gives them, without the amount.
        kind: how its amount is found.
        own_amount: its arguments hold the amount too.
    """

    label: str
    made: type[PruningCallback]
    arguments: dict[str, Any]
    kind: Kind
    own_amount: bool = False

    @property
    def parts(self) -> tuple[Entrant, ...]:
        """The methods of its row: itself."""
        return (self,)

    @property
    def removes_layers(self) -> bool:
        """Whether it removes whole decoder layers, and changes nothing else."""
        return self.kind == "depth" and self.arguments.get("granularity", "layer") == "layer"

    @property
    def puts_zeros(self) -> bool:
        """Whether it leaves the number of parameters as it is, and puts zeros."""
        return self.kind == "zeros"

    def check(self) -> None:
        """Check the arguments by making the method with an amount that removes nothing.

        Raises:
            ValueError, TypeError: if one is unknown or out of its range; names the method.
        """
        if self.own_amount:
            self.make({})
            return
        known = inspect.signature(self.made).parameters
        # A base_ratio may not exceed slice_ratio, and goes with any share of parameters.
        by_parameters = self.kind == "slicing" and "parameter_ratio" in known
        self.make({"parameter_ratio" if by_parameters else AMOUNTS[self.kind][0]: 0})

    def make(self, amount: Mapping[str, Any]) -> PruningCallback:
        """Return the method with these arguments beside the config's.

        Raises:
            ValueError, TypeError: if an argument is none of the method's, or out of its range.
        """
        hints = get_type_hints(self.made.__init__)
        arguments = {
            name: _as_settings(value, hints.get(name), f"{self.label}.{name}")
            for name, value in {**self.arguments, **amount}.items()
        }
        known = tuple(inspect.signature(self.made).parameters)
        for name in arguments:
            if name not in known:
                check_keys(f"the method {self.label}", {name: None}, known)
        try:
            return self.made(**arguments)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{self.label}: {error}") from error


@dataclass(frozen=True)
class Series:
    """Methods that prune one after another, in one row.

    Attributes:
        label: of its rows.
        parts: the methods that get a share, in their order.
        share: of what the row removes, one for each part; they add to 1. Empty where the arguments
            of the parts hold their amounts.
        puts_zeros: its last method puts zeros. Amounts are then shares of the weights of decoder
            layers that are zero or gone.
    """

    label: str
    parts: tuple[Entrant, ...]
    share: tuple[float, ...]
    puts_zeros: bool

    def check(self) -> None:
        """Check the arguments of each method, see `Entrant.check`."""
        for part in self.parts:
            part.check()


def entrants_of(
    methods: Sequence[Mapping[str, Any]], *, own_amounts: bool = False
) -> list[Entrant | Series]:
    """Return the rows of a config, in its order.

    An entry with a `sweep` becomes one row for each value.

    Args:
        methods: entries of a config.
        own_amounts: the arguments say how much each method removes; else a comparison does.

    Raises:
        ValueError: for an unknown method (the nearest is named), one without an argument for an
            amount, one whose amount the config sets, a sweep without values, two of the same
            label, or a series whose shares or methods do not go together.
        TypeError: if an entry is no mapping with a class_path, or a sweep no mapping.
    """
    entrants = [_row(each, own_amounts) for entry in methods for each in swept(entry)]
    labels = [entrant.label for entrant in entrants]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(
                f"methods holds two of the label {label!r}; give one of them another label: ..."
            )
    return entrants


def swept(entry: Any) -> list[Any]:
    """Return the entries that an entry of a config stands for: one for each value of its sweep.

    Raises:
        ValueError: if the sweep has no value, or the argument is set beside it.
        TypeError: if the sweep is no mapping of one argument to a list.
    """
    if not isinstance(entry, Mapping) or "sweep" not in entry:
        return [entry]
    sweep, rest = entry["sweep"], {key: entry[key] for key in entry if key != "sweep"}
    if not (isinstance(sweep, Mapping) and len(sweep) == 1):
        raise TypeError(
            f"sweep={sweep!r} must be a mapping of one argument to its values, such as "
            "{base_ratio: [0.0, 0.1, 0.2]}"
        )
    ((name, values),) = sweep.items()
    if not isinstance(values, list) or not values:
        raise ValueError(f"sweep of {name}: {values!r} must be a list with at least one value")
    arguments = entry if "callbacks" in entry else entry.get("init_args") or {}
    if name in arguments:
        raise ValueError(
            f"{name}={arguments[name]!r} stands beside a sweep of {name}; leave one of them out"
        )
    if "callbacks" in entry:
        if name != "share":
            raise ValueError(
                f"sweep of {name}: several callbacks take a sweep of share alone, such as "
                "{share: [[0.25, 0.75], [0.5, 0.5]]}"
            )
        label = base_label(entry)
        return [{**rest, "share": each, "label": f"{label}, share {each}"} for each in values]
    label = base_label(entry)
    return [
        {**rest, "init_args": {**arguments, name: value}, "label": f"{label}, {name} {value}"}
        for value in values
    ]


def base_label(entry: Mapping[str, Any]) -> str:
    """Return the label of an entry of a config; of a sweep, what its rows' labels begin with."""
    if entry.get("label"):
        return str(entry["label"])
    callbacks = entry.get("callbacks")
    parts = callbacks if isinstance(callbacks, list) else [entry]
    paths = [part.get("class_path") if isinstance(part, Mapping) else part for part in parts]
    return ", then ".join(str(path).rpartition(".")[2] for path in paths)


def _row(entry: Any, own_amounts: bool) -> Entrant | Series:
    if not isinstance(entry, Mapping) or "callbacks" not in entry:
        return _entrant(entry, own_amounts)
    label, given = base_label(entry), entry["callbacks"]
    check_keys(f"the row {label!r}", {**entry}, ("callbacks", "share", "label"))
    if not isinstance(given, list) or len(given) < 2:
        raise ValueError(
            f"callbacks={given!r} of the row {label!r} must be a list of at least two; write a "
            "single method as class_path"
        )
    parts = [_entrant(part, own_amounts) for part in given]
    for part, after in pairwise(parts):
        if not part.removes_layers:
            raise ValueError(
                f"{part.label} stands before {after.label} in the row {label!r}, and only methods "
                "that remove whole decoder layers may stand before another; put it last"
            )
    share = _checked_share(entry.get("share"), label, len(parts), own_amounts)
    taking_part = [i for i in range(len(parts)) if not share or share[i] > 0]
    return Series(
        label,
        tuple(parts[i] for i in taking_part),
        tuple(share[i] for i in taking_part) if share else (),
        parts[-1].puts_zeros,
    )


def _checked_share(share: Any, label: str, count: int, own_amounts: bool) -> list[float]:
    """Return the share of each method of a row; [] where their arguments hold the amounts.

    Raises:
        ValueError: if they are not one number in [0, 1] for each, or do not add to 1.
    """
    if own_amounts:
        if share is not None:
            raise ValueError(
                f"share={share!r} of the row {label!r} has no effect with amounts=null, where each "
                "callback says how much it removes; leave it out"
            )
        return []
    numbers = share if isinstance(share, list) else []
    if len(numbers) != count or not all(type(x) in (int, float) and 0 <= x <= 1 for x in numbers):
        example = [round(1 / count, 2)] * (count - 1)
        raise ValueError(
            f"share={share!r} of the row {label!r} must hold a number in [0, 1] for each of its "
            f"{count} callbacks: its share of what the row removes, such as "
            f"{[*example, round(1 - sum(example), 2)]}"
        )
    if not math.isclose(sum(numbers), 1, abs_tol=1e-6):
        raise ValueError(
            f"share={share} of the row {label!r} adds to {sum(numbers):g}, and must add to 1: the "
            "shares divide what the row removes"
        )
    return numbers


def _entrant(entry: Any, own_amount: bool = False) -> Entrant:
    if isinstance(entry, str):
        entry = {"class_path": entry}
    if not isinstance(entry, Mapping) or not isinstance(entry.get("class_path"), str):
        raise TypeError(
            f"methods holds {entry!r}; each must be a mapping with class_path, such as "
            "prunelight.callbacks.ShortGPT, and init_args, or with callbacks and share"
        )
    check_keys(f"the method {entry['class_path']}", {**entry}, ("class_path", "init_args", "label"))
    made = method_class(entry["class_path"])
    arguments = entry.get("init_args") or {}
    if not isinstance(arguments, Mapping):
        raise TypeError(
            f"init_args={arguments!r} of {made.__name__} must be a mapping of its arguments"
        )
    kind = _kind_of(made)
    for name in () if own_amount else (*AMOUNTS[kind], *_OTHER_AMOUNTS[kind]):
        if arguments.get(name) is not None:
            raise ValueError(
                f"{name}={arguments[name]!r} of {made.__name__} says how much to remove, which a "
                "comparison sets for all methods alike; leave it out (amounts, zeros), or set "
                "amounts: null"
            )
    if arguments.get("schedule") is not None:
        raise ValueError(
            f"{made.__name__} with a schedule prunes while it trains, which a comparison does not "
            "do; leave schedule out"
        )
    label = entry.get("label") or made.__name__
    return Entrant(label, made, {**arguments}, kind, own_amount)


def method_class(path: str) -> type[PruningCallback]:
    """Return the class of a path; a bare name is one of `prunelight.callbacks`.

    Raises:
        ValueError: if there is no such method (the nearest is named), or it is no pruning method.
    """
    module, _, name = path.rpartition(".")
    known = known_methods()
    try:
        made = getattr(import_module(module or "prunelight.callbacks"), name)
    except (ImportError, AttributeError) as error:
        near = get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"; did you mean prunelight.callbacks.{near[0]}?" if near else ""
        raise ValueError(
            f"there is no method {path!r}{hint} (known: {', '.join(known)})"
        ) from error
    if not (inspect.isclass(made) and issubclass(made, PruningCallback)):
        raise ValueError(f"{path} is no pruning method; take one of {', '.join(known)}")
    return made


def known_methods() -> list[str]:
    """Return the names of the pruning methods of `prunelight.callbacks`."""
    exported = {name: getattr(prunelight.callbacks, name) for name in prunelight.callbacks.__all__}
    return sorted(
        name
        for name, made in exported.items()
        if issubclass(made, PruningCallback) and not name.endswith("Callback")
    )


def _kind_of(made: type[PruningCallback]) -> Kind:
    """Return how a method is asked for an amount, by its arguments."""
    parameters = inspect.signature(made).parameters
    for kind, names in AMOUNTS.items():
        if names[0] in parameters:
            return kind
    wanted = ", ".join(name for names in AMOUNTS.values() for name in names)
    raise ValueError(
        f"{made.__name__} has no argument for an amount ({wanted}), so that it cannot be compared "
        "at equal size"
    )


def _as_settings(value: Any, hint: Any, name: str) -> Any:
    """Return a mapping as the dataclass of settings that an argument takes."""
    kinds = [part for part in (hint, *get_args(hint)) if is_dataclass(part)]
    if not kinds or not isinstance(value, Mapping):
        return value
    kind: Any = kinds[0]
    check_keys(name, {**value}, tuple(inspect.signature(kind).parameters))
    return kind(**value)
