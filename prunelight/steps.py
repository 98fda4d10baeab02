"""The steps of a plan: what can be done to a model, as data.

A new kind of step is one frozen dataclass with `kind` and `check`, added to `STEPS`; how it is
carried out is in `surgery.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, TypeAlias


@dataclass(frozen=True)
class RemoveLayers:
    """Remove whole decoder layers."""

    kind: ClassVar[str] = "remove_layers"
    layers: tuple[int, ...]

    @property
    def removed(self) -> tuple[int, ...]:
        """Return the layers that are gone after the step."""
        return self.layers

    def __post_init__(self) -> None:
        """Sort the indices, so that equal decisions are equal plans."""
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in self.layers):
            raise ValueError(f"layers={list(self.layers)} must be a list of whole numbers")
        object.__setattr__(self, "layers", tuple(sorted(self.layers)))

    def check(self, num_layers: int) -> None:
        """Check the step against a model of `num_layers` decoder layers.

        Raises:
            ValueError: if an index is repeated or out of range, or no layer would be left.
        """
        outside = [i for i in self.layers if not 0 <= i < num_layers]
        if outside:
            raise ValueError(f"layers={outside} must lie in [0, {num_layers - 1}]")
        if len(set(self.layers)) < len(self.layers):
            raise ValueError(f"layers={list(self.layers)} must not name a layer twice")
        if len(self.layers) >= num_layers:
            raise ValueError(
                f"layers={list(self.layers)} would remove all {num_layers} layers; keep one"
            )


@dataclass(frozen=True)
class Sparsify:
    """Put zeros into weights of decoder layers.

    Attributes:
        sparsity: name of a matrix (see `architecture.Matrix`) -> share of zeros, in [0, 1).
        solver: "magnitude", "wanda", "wanda_variant" or "sparsegpt".
        pattern: "N:M" keeps N of M consecutive inputs; a matrix' own N is M * (1 - sparsity).
        options: the solver's own options.
    """

    kind: ClassVar[str] = "sparsify"
    removed: ClassVar[tuple[int, ...]] = ()
    sparsity: dict[str, float]
    solver: str
    pattern: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the types, which a hand-written plan may have wrong."""
        if not (isinstance(self.sparsity, dict) and isinstance(self.options, dict)):
            raise ValueError("sparsity and options must be objects, {name: value}")

    def check(self, num_layers: int) -> None:
        """Check the shares; what concerns the model is checked by `sparsify.check_step`.

        Raises:
            ValueError: if a share does not lie in [0, 1).
        """
        for name, share in self.sparsity.items():
            if not isinstance(share, (int, float)) or not 0 <= share < 1:
                raise ValueError(f"sparsity={share} of {name} must lie in [0, 1)")


Step: TypeAlias = RemoveLayers | Sparsify
STEPS: dict[str, type[Step]] = {step.kind: step for step in (RemoveLayers, Sparsify)}


def step_from_dict(value: Mapping[str, Any]) -> Step:
    """Build a step from its JSON form.

    Raises:
        ValueError: if the kind is unknown or the keys are not the step's own.
    """
    keys = dict(value)
    kind = keys.pop("kind", None)
    if kind not in STEPS:
        raise ValueError(f"kind={kind!r} is not a known kind of step: {', '.join(sorted(STEPS))}")
    expected = {f.name for f in fields(STEPS[kind])}
    optional = {
        f.name
        for f in fields(STEPS[kind])
        if f.default is not MISSING or f.default_factory is not MISSING
    }
    if not expected - optional <= set(keys) <= expected:
        raise ValueError(f"step {kind!r} has keys {sorted(keys)}, it must have {sorted(expected)}")
    make: Any = STEPS[kind]
    step: Step = make(**{k: tuple(v) if isinstance(v, list) else v for k, v in keys.items()})
    return step


def renumbered(names: Iterable[str], layers_path: str, removed: Collection[int]) -> dict[str, str]:
    """Map names of matrices to those after some layers are removed; theirs are left out."""
    mapping = {}
    for name in names:
        index, _, rest = name.removeprefix(f"{layers_path}.").partition(".")
        if int(index) not in removed:
            new = int(index) - sum(i < int(index) for i in removed)
            mapping[name] = f"{layers_path}.{new}.{rest}"
    return mapping
