"""The methods of a contest: which class, which arguments, and which argument is the amount.

A method is one of `prunelight.callbacks`, or any class with its face. What it is asked for is set
by `Entrant.make(amount arguments)`: all others are the user's, or the method's own defaults.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import Any, Literal, get_args, get_type_hints

import prunelight.callbacks
from prunelight.callbacks.base import PruningCallback
from prunelight.comparison.settings import check_keys

Kind = Literal["depth", "width", "slicing", "zeros"]

# What a method may be asked by, in the order in which a comparison takes them.
AMOUNTS: dict[Kind, tuple[str, ...]] = {
    "zeros": ("sparsity",),
    "depth": ("num_layers",),
    "slicing": ("slice_ratio",),
    "width": ("neuron_ratio",),
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
}


@dataclass(frozen=True)
class Entrant:
    """A method that takes part.

    Attributes:
        label: of its rows.
        made: its class.
        arguments: as the config gives them, without the amount.
        kind: how its amount is found.
    """

    label: str
    made: type[PruningCallback]
    arguments: dict[str, Any]
    kind: Kind

    @property
    def puts_zeros(self) -> bool:
        """Whether it leaves the number of parameters as it is, and puts zeros."""
        return self.kind == "zeros"

    def check(self) -> None:
        """Check the arguments by making the method with an amount that removes nothing.

        Raises:
            ValueError, TypeError: if one is unknown or out of its range; names the method.
        """
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


def entrants_of(methods: Sequence[Mapping[str, Any]]) -> list[Entrant]:
    """Return the methods of a config, in its order.

    An entry with a `sweep` becomes one method for each value.

    Raises:
        ValueError: for an unknown method (the nearest is named), one without an argument for an
            amount, one whose amount the config sets, a sweep without values, or two of the same
            label.
        TypeError: if an entry is no mapping with a class_path, or a sweep no mapping.
    """
    entrants = [_entrant(each) for entry in methods for each in swept(entry)]
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
    arguments = entry.get("init_args") or {}
    if name in arguments:
        raise ValueError(
            f"{name}={arguments[name]!r} stands beside a sweep of {name}; leave one of them out"
        )
    label = entry.get("label") or str(entry.get("class_path")).rpartition(".")[2]
    return [
        {**rest, "init_args": {**arguments, name: value}, "label": f"{label}, {name} {value}"}
        for value in values
    ]


def _entrant(entry: Any) -> Entrant:
    if isinstance(entry, str):
        entry = {"class_path": entry}
    if not isinstance(entry, Mapping) or not isinstance(entry.get("class_path"), str):
        raise TypeError(
            f"methods holds {entry!r}; each must be a mapping with class_path, such as "
            "prunelight.callbacks.ShortGPT, and init_args"
        )
    check_keys(f"the method {entry['class_path']}", {**entry}, ("class_path", "init_args", "label"))
    made = _class_of(entry["class_path"])
    arguments = entry.get("init_args") or {}
    if not isinstance(arguments, Mapping):
        raise TypeError(
            f"init_args={arguments!r} of {made.__name__} must be a mapping of its arguments"
        )
    kind = _kind_of(made)
    for name in (*AMOUNTS[kind], *_OTHER_AMOUNTS[kind]):
        if arguments.get(name) is not None:
            raise ValueError(
                f"{name}={arguments[name]!r} of {made.__name__} says how much to remove, which a "
                "comparison sets for all methods alike; leave it out (amounts, zeros)"
            )
    if arguments.get("schedule") is not None:
        raise ValueError(
            f"{made.__name__} with a schedule prunes while it trains, which a comparison does not "
            "do; leave schedule out"
        )
    return Entrant(entry.get("label") or made.__name__, made, {**arguments}, kind)


def _class_of(path: str) -> type[PruningCallback]:
    """Return the class of a path; a bare name is one of `prunelight.callbacks`."""
    module, _, name = path.rpartition(".")
    known = _known_methods()
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


def _known_methods() -> list[str]:
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
