"""What a plan says about each decoder layer: asked of its steps; no torch, no lightning."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

from prunelight.planning.steps import Heal, SliceHidden, Sparsify, Step, step_from_dict

Json: TypeAlias = dict[str, Any]

HEALING_ERRORS = (
    "Errors are those of a layer's output against the dense states, on calibration windows that "
    "were held out, as a share of those states' weighted energy."
)

StepT = TypeVar("StepT", bound=Step)


def percent(share: float) -> str:
    """Return a share in [0, 1] as text."""
    return f"{100 * share:.2f} %"


def healing_lines(step: Heal, outcome: Json) -> list[str]:
    """Return what a heal step did to each layer that it names, and its warnings."""
    errors = (outcome.get(name, []) for name in ("error_before", "error_after"))
    lines = [
        f"layer {layer}: error {before:.3g} -> {after:.3g} ({how})"
        if how
        else f"layer {layer}: error {before:.3g}, old weights kept"
        for layer, how, before, after in zip(step.layers, healed_by(outcome), *errors, strict=False)
    ]
    return lines + list(outcome.get("notes", ()))


def healed_by(outcome: Json) -> list[str]:
    """Return what gave each layer of a heal step its weights; "" where it kept the old ones."""
    ridges = outcome.get("ridge", [])
    epochs = outcome.get("epochs") or [0] * len(ridges)  # of mode "layer" alone
    fitted = outcome.get("fitted") or [""] * len(ridges)  # of mode "operator" alone
    return [
        ", ".join(
            [f"ridge {ridge:g}"] * bool(ridge)
            + [names] * bool(names)
            + [f"{count} epochs"] * bool(count)
        )
        for ridge, names, count in zip(ridges, fitted, epochs, strict=True)
    ]


class PlanFacts:
    """A plan as its report sees it.

    It is read from the JSON form, because `Plan` needs torch. All layers are those of the dense
    model.

    Args:
        plan: `Plan.to_dict()`.
    """

    def __init__(self, plan: Json) -> None:
        self.method: str = plan["method"]
        self.arguments: Json = plan["arguments"]
        self.model: Json = plan["model"]
        self.calibration: Json = plan["calibration"] or {}
        self.scores: Json = plan["scores"]
        self.found: Json = plan.get("found", {})
        self.steps: list[Step] = [step_from_dict(step) for step in plan["steps"]]
        self.num_layers: int = self.model["num_hidden_layers"]

    def steps_of(self, kind: type[StepT]) -> list[StepT]:
        """Return the steps of one kind."""
        return [step for step in self.steps if isinstance(step, kind)]

    @property
    def title(self) -> str:
        """Return the method and the model, for pictures."""
        return f"{self.method}: {self.model['name'][-60:]}"

    @property
    def schedule(self) -> Json | None:
        """Return the schedule along which zeros are added; None if all are made at fit start."""
        return self.arguments.get("schedule")

    @property
    def removed_layers(self) -> list[int]:
        """Return the layers that are gone after the plan, also those merged into others."""
        return sorted(layer for step in self.steps for layer in step.removed)

    @property
    def merged_groups(self) -> list[tuple[int, ...]]:
        """Return the windows of layers that become one layer each."""
        return [group for step in self.steps for group in step.merged_groups]

    @property
    def has_own_class(self) -> bool:
        """Return whether the plan leaves a model of a class that transformers does not have."""
        before = self.model["model_type"].startswith("prunelight_")  # after an earlier run
        return before or any(step.leaves_own_class for step in self.steps)

    def layer_outcomes(self) -> dict[int, str]:
        """Return what becomes of each layer that is removed, merged or loses a part."""
        outcomes: dict[int, str] = {}
        for step in self.steps:
            outcomes |= dict.fromkeys(step.removed, "**removed**")
            for group in step.merged_groups:
                outcomes |= dict.fromkeys(group[:-1], f"**merged into {group[-1]}**")
            for part, layers in step.dropped_sublayers.items():
                for layer in layers:
                    outcomes[layer] = f"{outcomes.get(layer, 'without')} **{part}**"
        return outcomes

    def score_lists(self) -> dict[str, list[float]]:
        """Return the scores that decided, at most one a layer (or a window that starts there).

        The planned "sparsity" is left out: it is a decision, see `layer_zeros`.
        """
        fewest = self.num_layers if self.steps_of(Sparsify) else 1
        return {
            name: [math.nan if score is None else score for score in scores]
            for name, scores in self.scores.items()
            if fewest <= len(scores) <= self.num_layers and name != "sparsity"
        }

    def nominal(self) -> str:
        """Return the ratio in the method's own terms: of layers, weights or widths."""
        merged = sum(len(group) - 1 for group in self.merged_groups)
        counts = [
            (len(self.removed_layers) - merged, "decoder layers removed"),
            (merged, "decoder layers merged away"),
        ]
        for step in self.steps:
            dropped = step.dropped_sublayers
            counts += [(len(dropped.get("attention", ())), "attentions dropped")]
            counts += [(len(dropped.get("mlp", ())), "MLPs dropped")]
        parts = [
            f"{count} of {self.num_layers} {what} ({percent(count / self.num_layers)})"
            for count, what in counts
            if count
        ]
        parts += [text for step in self.steps for text in step.nominal(self)]
        return ", ".join(parts) or "no layer removed"

    def layer_zeros(self, step: Sparsify, outcome: Json) -> LayerZeros:
        """Return the zeros of each layer and projection: those of the outcome, else the planned.

        Several matrices of one path in a layer (experts) are averaged.
        """
        dense = range(self.num_layers)
        # An outcome counts the layers that were left, a plan those of the dense model.
        earlier = self.steps[: self.steps.index(step)]
        removed = {layer for other in earlier for layer in other.removed}
        left = [layer for layer in dense if layer not in removed]

        def spread(values: Iterable[float]) -> list[float]:
            known = dict(zip(left, values, strict=True))
            return [known.get(layer, math.nan) for layer in dense]

        cells: dict[str, list[list[float]]] = {}
        shares: dict[str, float] = outcome.get("sparsity") or step.sparsity
        for name, share in shares.items():
            _, index, path = re.split(r"\.(\d+)\.", name, maxsplit=1)
            row = cells.setdefault(re.sub(r"\.\d+(?=\.)", "", path), [[] for _ in dense])
            row[(left if outcome else dense)[int(index)]].append(share)
        planned = self.scores.get("sparsity", [math.nan] * len(dense))
        errors = outcome.get("reconstruction_error")
        achieved = outcome.get("layer_sparsity")
        return LayerZeros(
            layers=planned if achieved is None else spread(achieved),
            projections={path: [_mean(shares) for shares in row] for path, row in cells.items()},
            errors=spread(errors) if errors else [],
        )


class LayerZeros(NamedTuple):
    """What a sparsify step does to each decoder layer; NaN where that is not known."""

    layers: list[float]  # share of zeros in the linears of each decoder layer
    projections: dict[str, list[float]]  # path of a projection -> its share in each decoder layer
    errors: list[float]  # reconstruction error of each decoder layer; empty if not measured


def by_sublayer(sites: Sequence[Any]) -> dict[str, list[Any]]:
    """Return what sites of the hidden states have before each attention and before each MLP."""
    return {"attention": [*sites[:-1:2]], "MLP": [*sites[1::2]]}


def explained_variance(step: SliceHidden, outcome: Json) -> dict[str, list[float]]:
    """Return the share of the energy that a slice step keeps `by_sublayer`; {} if not measured."""
    measured = "explained_variance" in outcome and step.rotation == "per_layer"
    return by_sublayer(outcome["explained_variance"]) if measured else {}


def layer_columns(plan: PlanFacts, outcome: Json) -> dict[str, list[str]]:
    """Return one cell a decoder layer: scores, widths, zeros of the last step, removed or kept."""
    num_layers = plan.num_layers
    columns = {"layer": [str(layer) for layer in range(num_layers)]}
    for name, scores in plan.score_lists().items():
        missing = num_layers - len(scores)
        title = name.replace("_", " ") + (" from here" if missing else "")
        columns[title] = _cells(scores) + [""] * missing
    for step in plan.steps_of(SliceHidden):
        widths, explained = by_sublayer(step.residual_dims), explained_variance(step, outcome)
        columns |= {f"width at {name}": [*map(str, x)] for name, x in widths.items()}
        columns |= {f"explained variance at {name}": _cells(x) for name, x in explained.items()}
    for sparsify in plan.steps_of(Sparsify)[-1:]:
        zeros = plan.layer_zeros(sparsify, outcome)
        columns["sparsity"] = [percent(x) if math.isfinite(x) else "" for x in zeros.layers]
        if zeros.errors:
            columns["reconstruction error"] = [f"{error:.4g}" for error in zeros.errors]
    if layer_outcomes := plan.layer_outcomes():
        columns["fate"] = [layer_outcomes.get(i, "kept") for i in range(num_layers)]
    return columns


def _cells(values: Sequence[float]) -> list[str]:
    return ["" if math.isnan(value) else f"{value:.4g}" for value in values]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
