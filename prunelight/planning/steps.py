"""The steps of a plan: what can be done to a model, as data; no torch.

A new kind of step is one frozen dataclass here, listed in `STEPS`, and one entry of the table in
`pruning/apply.py`, which says how the step is checked and carried out. Indices are sorted, so that
equal decisions are equal plans.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from inspect import signature
from typing import Any, ClassVar, Literal, Protocol

from prunelight.runtime.arguments import check_choice

HEALING_RIDGES = (0.01, 0.1, 1.0, 10.0)

MERGES = ("top", "difference_sum", "released", "mean", "lowest")

SLICE_OPTIONS = {
    "signal": ("residual", "normalized"),
    "orientation": ("pca", "random"),
    "rotation": ("per_layer", "shared"),
}


class PlanLike(Protocol):
    """What a step reads of its plan to tell how much it prunes."""

    model: dict[str, Any]
    arguments: dict[str, Any]
    found: dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One thing that a plan does to a model; each kind of step is a subclass.

    Layers are counted as in the dense model. A step says here all that plans, `apply` and reports
    ask of it; what a kind does not override holds for it.

    Attributes:
        kind: name of the step in JSON.
        has_outcome: carrying the step out tells something, which a run records.
    """

    kind: ClassVar[str]
    has_outcome: ClassVar[bool] = False

    @property
    def removed(self) -> tuple[int, ...]:
        """Return the layers that are gone after the step."""
        return ()

    @property
    def named(self) -> tuple[int, ...]:
        """Return the layers that the step names."""
        return ()

    @property
    def merged_groups(self) -> tuple[tuple[int, ...], ...]:
        """Return the windows of layers that become one layer each, the highest of them."""
        return ()

    @property
    def dropped_sublayers(self) -> dict[str, tuple[int, ...]]:
        """Return the layers that lose a part: {"attention" or "mlp": layers}."""
        return {}

    @property
    def leaves_own_class(self) -> bool:
        """Return whether the model becomes one of a class that transformers does not have."""
        return False

    @property
    def facts(self) -> dict[str, Any]:
        """Return what a report lists of the step: its fields that are not empty."""
        fields = json.loads(json.dumps(asdict(self)))  # lists where there are tuples
        return {name: value for name, value in fields.items() if value != []}

    def nominal(self, plan: PlanLike) -> list[str]:
        """Return the ratios of the step in its own terms, beside layers removed or dropped."""
        return []

    def check(self, num_layers: int) -> None:
        """Raise ValueError if the step is impossible for a model of this many decoder layers."""


@dataclass(frozen=True)
class RemoveLayers(Step):
    """Remove whole decoder layers."""

    kind: ClassVar[str] = "remove_layers"
    layers: tuple[int, ...]

    @property
    def removed(self) -> tuple[int, ...]:
        """Return the layers that are gone after the step."""
        return self.layers

    @property
    def named(self) -> tuple[int, ...]:
        """Return the layers that the step names."""
        return self.layers

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", _sorted_indices("layers", self.layers))

    def check(self, num_layers: int) -> None:
        """Raise ValueError if an index is repeated or out of range, or no layer would be left."""
        _check_indices("layers", self.layers, num_layers)
        if len(self.layers) >= num_layers:
            raise ValueError(
                f"layers={list(self.layers)} would remove all {num_layers} layers; keep one"
            )


@dataclass(frozen=True)
class Sparsify(Step):
    """Put zeros into weights of decoder layers.

    Attributes:
        sparsity: name of a matrix (see `models/families/layers.py`) -> share of zeros, in [0, 1).
        solver: "magnitude", "wanda", "wanda_variant", "sparsegpt" or "alps".
        pattern: "N:M" keeps N of M consecutive inputs; a matrix' own N is M * (1 - sparsity).
        options: the solver's own options.
    """

    kind: ClassVar[str] = "sparsify"
    has_outcome: ClassVar[bool] = True
    sparsity: dict[str, float]
    solver: str
    pattern: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (isinstance(self.sparsity, dict) and isinstance(self.options, dict)):
            raise ValueError("sparsity and options must be objects, {name: value}")
        for name, share in self.sparsity.items():
            if isinstance(share, bool) or not isinstance(share, (int, float)):
                raise ValueError(f"sparsity={share!r} of {name} must be a number in [0, 1)")

    @property
    def facts(self) -> dict[str, Any]:
        """Return the solver and the number of matrices; the share of each is too much to list."""
        return {"solver": self.solver, "matrices": len(self.sparsity)}

    def nominal(self, plan: PlanLike) -> list[str]:
        """Return the share of zeros and the pattern."""
        mixed = " on average" if len(set(self.sparsity.values())) > 1 else ""
        pattern = f" ({self.pattern} pattern{mixed})" if self.pattern else ""
        share = self.planned_share(plan)
        part = plan.found.get("share_of_decoder_weights", 1.0)
        whole = f", {100 * share * part:.2f} % of all decoder weights" if part < 1 else ""
        return [f"{100 * share:.2f} % of the weights of decoder linears{pattern}{whole}"]

    def planned_share(self, plan: PlanLike) -> float:
        """Return the share of zeros that the step aims at in all decoder linears together."""
        if self.pattern:
            kept, _, group = self.pattern.partition(":")
            return 1 - int(kept) / int(group)
        asked: float | None = plan.arguments.get("sparsity")
        return _mean(self.sparsity.values()) if asked is None else asked

    def check(self, num_layers: int) -> None:
        """Raise ValueError if a share is not in [0, 1); `sparsify.check_step` checks the rest."""
        for name, share in self.sparsity.items():
            if not 0 <= share < 1:
                raise ValueError(f"sparsity={share} of {name} must lie in [0, 1)")


@dataclass(frozen=True)
class MergeLayers(Step):
    """Merge windows of neighbouring decoder layers, each window into its highest layer.

    Attributes:
        groups: the layers of each window: two or more neighbours in ascending order.
        merge: how weights are mixed, see `pruning/merge_layers.py`. "top" keeps the highest layer
            whole. "difference_sum" adds to the lowest layer all differences from it. "released"
            takes the projections of the highest layer and all else of the lowest. "mean" is the
            mean of all weights. "lowest" keeps the lowest layer whole, at the highest's place.
    """

    kind: ClassVar[str] = "merge_layers"
    groups: tuple[tuple[int, ...], ...]
    merge: str = "top"

    @property
    def removed(self) -> tuple[int, ...]:
        """Return the layers that are gone after the step: all but the highest of each window."""
        return tuple(sorted(i for group in self.groups for i in group[:-1]))

    @property
    def merged_groups(self) -> tuple[tuple[int, ...], ...]:
        """Return the windows."""
        return self.groups

    @property
    def named(self) -> tuple[int, ...]:
        """Return the layers that the step names."""
        return tuple(i for group in self.groups for i in group)

    def __post_init__(self) -> None:
        lists = (list, tuple)
        if not isinstance(self.groups, lists) or not all(isinstance(g, lists) for g in self.groups):
            raise ValueError(f"groups={self.groups} must be a list of lists of layers")
        groups = sorted(_sorted_indices("groups", group) for group in self.groups)
        object.__setattr__(self, "groups", tuple(groups))

    def check(self, num_layers: int) -> None:
        """Raise ValueError if the rule is unknown, or a window is no run of two layers or more."""
        check_choice("merge", self.merge, MERGES)
        _check_indices("groups", self.named, num_layers)
        for group in self.groups:
            if len(group) < 2 or group != tuple(range(group[0], group[-1] + 1)):
                raise ValueError(f"groups: {list(group)} must be two or more neighbouring layers")


@dataclass(frozen=True)
class DropSublayers(Step):
    """Drop the attention or the MLP of decoder layers, each with the norm before it."""

    kind: ClassVar[str] = "drop_sublayers"
    attention: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()

    @property
    def named(self) -> tuple[int, ...]:
        """Return the layers that the step names."""
        return tuple(sorted({*self.attention, *self.mlp}))

    @property
    def dropped_sublayers(self) -> dict[str, tuple[int, ...]]:
        """Return the layers that lose their attention, and those that lose their MLP."""
        return {"attention": self.attention, "mlp": self.mlp}

    @property
    def leaves_own_class(self) -> bool:
        """Return True: stock classes have both parts in every layer."""
        return True

    def __post_init__(self) -> None:
        for name in ("attention", "mlp"):
            object.__setattr__(self, name, _sorted_indices(name, getattr(self, name)))

    def check(self, num_layers: int) -> None:
        """Raise ValueError if an index is repeated or out of range."""
        _check_indices("attention", self.attention, num_layers)
        _check_indices("mlp", self.mlp, num_layers)


@dataclass(frozen=True)
class PruneWidth(Step):
    """Keep some attention heads and MLP neurons of each decoder layer.

    Where all layers keep equal numbers, the result is a stock model; else one of a class of ours.

    Attributes:
        heads: layer, as text -> key-value groups that are kept; empty leaves attention as it is.
        neurons: layer, as text -> MLP neurons that are kept; empty leaves the MLPs as they are.
        correction: true fits the output projections by least squares on calibration windows, to
            their outputs with all inputs. "bias" gives them the mean of what is gone as a bias.
    """

    kind: ClassVar[str] = "prune_width"
    heads: dict[str, tuple[int, ...]] = field(default_factory=dict)
    neurons: dict[str, tuple[int, ...]] = field(default_factory=dict)
    correction: bool | Literal["bias"] = False

    @property
    def named(self) -> tuple[int, ...]:
        """Return the layers that the step names."""
        return tuple(sorted({int(layer) for layer in (*self.heads, *self.neurons)}))

    @property
    def leaves_own_class(self) -> bool:
        """Return whether no stock config describes the result: other widths a layer, or biases."""
        kinds = (self.heads, self.neurons)
        differ = any(len(set(map(len, kept.values()))) > 1 for kept in kinds)
        return differ or self.correction == "bias"

    def __post_init__(self) -> None:
        check_choice("correction", self.correction, (True, False, "bias"))
        for name in ("heads", "neurons"):
            object.__setattr__(self, name, _by_layer(name, getattr(self, name), "kept"))

    @property
    def facts(self) -> dict[str, Any]:
        """Return the correction; the indices that are kept are too many to list."""
        return {"correction": self.correction}

    def nominal(self, plan: PlanLike) -> list[str]:
        """Return how many groups and neurons are kept, of how many."""
        ratios = []
        for kept, text, config_field in (
            (self.heads, "key-value groups", "num_key_value_heads"),
            (self.neurons, "neurons", "intermediate_size"),
        ):
            if kept:
                before = plan.found.get(f"{config_field}_before", "all")
                counts = [len(indices) for indices in kept.values()]
                count = f"{min(counts)}"
                if max(counts) > min(counts):
                    count += f" to {max(counts)} (mean {_mean(counts):.1f})"
                ratios.append(f"{count} of {before} {text} kept in every layer")
        return ratios

    def check(self, num_layers: int) -> None:
        """Raise ValueError if a layer keeps none, or a layer does not exist.

        `prune_width.check_width` checks the rest.
        """
        if not self.named:
            raise ValueError("heads and neurons are both empty; name what is kept of one of them")
        for name, kept in (("heads", self.heads), ("neurons", self.neurons)):
            _check_indices(name, [int(key) for key in kept], num_layers)
            if empty := [layer for layer, indices in kept.items() if not indices]:
                raise ValueError(
                    f"{name} keeps none in layers {', '.join(empty)}; each layer must keep one"
                )


@dataclass(frozen=True)
class RemoveExperts(Step):
    """Remove experts of mixture-of-experts layers, with their rows of the router.

    All layers with experts lose equal numbers, so that the result is a stock model.

    Attributes:
        experts: layer, as text -> experts that are removed.
    """

    kind: ClassVar[str] = "remove_experts"
    experts: dict[str, tuple[int, ...]]

    @property
    def named(self) -> tuple[int, ...]:
        """Return the layers that the step names."""
        return tuple(int(layer) for layer in self.experts)

    @property
    def num_experts(self) -> int:
        """Return how many experts each layer loses."""
        return max(map(len, self.experts.values()), default=0)

    def __post_init__(self) -> None:
        by_layer = _by_layer("experts", self.experts, "removed")
        object.__setattr__(self, "experts", by_layer)

    @property
    def facts(self) -> dict[str, Any]:
        """Return how many experts go, of how many layers; their indices are too many to list."""
        return {"experts_removed": self.num_experts, "layers": len(self.experts)}

    def nominal(self, plan: PlanLike) -> list[str]:
        """Return how many experts go, of how many."""
        if not self.num_experts:
            return []
        before = plan.found.get("num_experts_before")
        share = f" ({100 * self.num_experts / before:.2f} %)" if before else ""
        of = f" of {before}" if before else ""
        return [f"{self.num_experts}{of} experts removed from {len(self.experts)} layers{share}"]

    def check(self, num_layers: int) -> None:
        """Raise ValueError if a layer does not exist, an expert is repeated, or numbers differ.

        `remove_experts.check_experts` checks the rest.
        """
        _check_indices("experts of layers", self.named, num_layers)
        for layer, removed in self.experts.items():
            if len(set(removed)) < len(removed):
                raise ValueError(
                    f"experts={list(removed)} of layer {layer} must not name an expert twice"
                )
        counts = {layer: len(removed) for layer, removed in self.experts.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(
                f"experts removes {min(counts.values())} to {max(counts.values())} experts a "
                "layer; remove equal numbers: a stock config holds one number for all layers"
            )


@dataclass(frozen=True)
class SliceHidden(Step):
    """Rotate the hidden states and keep only their first principal components.

    Attributes:
        residual_dims: 2 L + 1 widths: before the attention and the MLP of each decoder layer, and
            after the last layer. The first is the width of the embeddings. At full width
            embeddings stay as they are, and tied embeddings stay tied.
        signal: the components are those of the "residual" (SliceGPT's released code), or of the
            "normalized" residual, after its norm (Eq. 8 of the paper).
        orientation: "pca", or "random", which rotates the components among each other and so
            spreads their energy for quantization.
        rotation: "per_layer", or "shared", one for all layers, which gives a stock model.
        seed: of the random orientation.
    """

    kind: ClassVar[str] = "slice_hidden"
    has_outcome: ClassVar[bool] = True
    residual_dims: tuple[int, ...]
    signal: str = "residual"
    orientation: str = "pca"
    rotation: str = "per_layer"
    seed: int = 0

    @property
    def leaves_own_class(self) -> bool:
        """Return whether rotations differ, which shortcuts of a sliced class make up for."""
        return self.rotation == "per_layer"

    def nominal(self, plan: PlanLike) -> list[str]:
        """Return the share of the hidden width that is sliced, and its range."""
        hidden = plan.model["hidden_size"]
        widths = [self.residual_dims[site] for site in self.sliced_sites(hidden)]
        how = f" (widths {min(widths)} to {max(widths)})" if len(set(widths)) > 1 else ""
        how += " (one rotation)" if self.rotation == "shared" else ""
        return [f"{100 * self.share_removed(hidden):.2f} % of the hidden width sliced{how}"]

    def sliced_sites(self, hidden_size: int) -> range:
        """Return the sites before attentions and MLPs, less that of embeddings left whole."""
        first, *others, _ = self.residual_dims
        whole = first == hidden_size and min(others) < hidden_size
        return range(int(whole), 1 + len(others))

    def share_removed(self, hidden_size: int) -> float:
        """Return the share of the hidden width that is removed, mean over the MLPs.

        At attentions the share is the same, but for the first one where the embeddings are left
        whole.
        """
        return 1 - _mean(self.residual_dims[1::2]) / hidden_size

    def check(self, num_layers: int) -> None:
        """Raise ValueError for other than 2 L + 1 widths, or an unknown option.

        `slice_hidden.check_slice` checks the rest.
        """
        for name, known in SLICE_OPTIONS.items():
            check_choice(name, getattr(self, name), known)
        if len(self.residual_dims) != 2 * num_layers + 1:
            raise ValueError(
                f"residual_dims has {len(self.residual_dims)} widths, {num_layers} decoder layers "
                f"need {2 * num_layers + 1}"
            )
        if not all(type(dim) is int and dim > 0 for dim in self.residual_dims):
            raise ValueError("residual_dims must be whole numbers above 0")
        if self.rotation == "shared" and len(set(self.residual_dims)) > 1:
            raise ValueError("rotation='shared' needs the same width everywhere in residual_dims")


@dataclass(frozen=True)
class Heal(Step):
    """Fit some decoder layers anew, to the hidden states of the dense model.

    Dense is the model before the plan. The step holds decisions only: weights are fitted on the
    calibration windows when the plan is carried out.

    Attributes:
        layers: the layers that are fitted, those before it first.
        mode: "linear", weighted ridge regression of the last matrix in closed form; "operator",
            with a matrix behind the layer before each gap, fitted together with its last one;
            "layer", after "linear" gradient steps on all matrices of the layer.
        ridges: strengths of the pull towards the old weights. Held-out windows choose one for each
            layer, or leave its weights as they are. 1 is the median energy of the matrix' inputs.
        epochs: of mode "layer", passes over the windows for each layer.
    """

    kind: ClassVar[str] = "heal"
    has_outcome: ClassVar[bool] = True
    layers: tuple[int, ...]
    mode: str = "linear"
    ridges: tuple[float, ...] = HEALING_RIDGES
    epochs: int = 8

    @property
    def leaves_own_class(self) -> bool:
        """Return whether the model becomes one of a class that transformers does not have."""
        return self.mode == "operator"

    @property
    def named(self) -> tuple[int, ...]:
        """Return the layers that the step names."""
        return self.layers

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", _sorted_indices("layers", self.layers))

    def check(self, num_layers: int) -> None:
        """Raise ValueError for an unknown mode or layer, or ridges or epochs not above 0."""
        check_choice("mode", self.mode, ("linear", "operator", "layer"))
        _check_indices("layers", self.layers, num_layers)
        if not self.ridges or not all(
            isinstance(ridge, int | float) and 0 < ridge < math.inf for ridge in self.ridges
        ):
            raise ValueError(f"ridges={list(self.ridges)} must be numbers above 0; name one")
        if not isinstance(self.epochs, int) or isinstance(self.epochs, bool) or self.epochs < 1:
            raise ValueError(f"epochs={self.epochs} must be a whole number above 0")


STEPS: dict[str, type[Step]] = {
    step.kind: step
    for step in (
        *(RemoveLayers, MergeLayers, DropSublayers, RemoveExperts, PruneWidth, SliceHidden),
        *(Sparsify, Heal),
    )
}


def _mean(values: Collection[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _sorted_indices(name: str, indices: Iterable[Any]) -> tuple[int, ...]:
    if not isinstance(indices, Iterable) or isinstance(indices, str | Mapping):
        raise ValueError(f"{name}={indices!r} must be a list of whole numbers")
    for index in indices:
        if not isinstance(index, int) or isinstance(index, bool):
            raise ValueError(f"{name} holds {index!r}; it must be a list of whole numbers")
    return tuple(sorted(indices))


def _by_layer(name: str, indices: Any, fate: str) -> dict[str, tuple[int, ...]]:
    """Return the indices of each layer, both sorted; layers as text, as in JSON."""
    if not isinstance(indices, dict) or not all(str(key).isdigit() for key in indices):
        raise ValueError(f"{name} must be an object, {{layer: [indices that are {fate}]}}")
    layers = {int(key): _sorted_indices(name, value) for key, value in indices.items()}
    return {str(layer): layers[layer] for layer in sorted(layers)}


def _check_indices(name: str, indices: Collection[int], num_layers: int) -> None:
    outside = [i for i in indices if not 0 <= i < num_layers]
    if outside:
        raise ValueError(f"{name}={outside} must lie in [0, {num_layers - 1}]")
    if len(set(indices)) < len(indices):
        raise ValueError(f"{name}={list(indices)} must not name a layer twice")


def step_from_dict(value: Mapping[str, Any]) -> Step:
    """Build a step from its JSON form.

    Raises:
        TypeError: if it is no object, or a value has the wrong type.
        ValueError: if the kind is unknown or the keys are not those of its fields.
    """
    if not isinstance(value, Mapping):
        raise TypeError(f"{value!r} must be an object with a kind: {', '.join(sorted(STEPS))}")
    keys = dict(value)
    kind = keys.pop("kind", None)
    if kind not in STEPS:
        raise ValueError(f"kind={kind!r} is not a known kind of step: {', '.join(sorted(STEPS))}")
    step_class: Any = STEPS[kind]
    expected = signature(step_class).parameters
    needed = {name for name, p in expected.items() if p.default is p.empty}
    if not needed <= set(keys) <= set(expected):
        raise ValueError(f"step {kind!r} has keys {sorted(keys)}, it must have {sorted(expected)}")
    step: Step = step_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in keys.items()})
    return step


def layer_of(name: str, layers_path: str) -> int:
    """Return the index of the decoder layer of a module or parameter, from its name."""
    return int(name.removeprefix(f"{layers_path}.").partition(".")[0])


def renumbered(
    shares: Mapping[str, float], layers_path: str, removed: Collection[int]
) -> dict[str, float]:
    """Return the shares under the names that matrices have after some layers are removed.

    Args:
        shares: name of a matrix -> its share of zeros.
        layers_path: dotted path of the model's decoder layers.
        removed: layers that are gone, whose shares are left out.
    """
    renamed = {}
    for name, share in shares.items():
        index = layer_of(name, layers_path)
        if index not in removed:
            rest = name.removeprefix(f"{layers_path}.{index}.")
            renamed[f"{layers_path}.{renumber(index, removed)}.{rest}"] = share
    return renamed


def renumber(index: int, removed: Collection[int]) -> int:
    """Return a layer's index after other layers are removed."""
    return index - sum(other < index for other in removed)
