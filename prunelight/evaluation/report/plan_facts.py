"""What a plan says about each decoder layer, read from its JSON form; no torch, no lightning."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

Json: TypeAlias = dict[str, Any]


def percent(share: float) -> str:
    """Return a share in [0, 1] as text."""
    return f"{100 * share:.2f} %"


def removed_layers(plan: Json) -> list[int]:
    """Return the decoder layers that are gone after a plan, those merged into others included."""
    removed = [i for step in plan["steps"] for i in step.get("layers", ())]
    return sorted(removed + [i for group in merged_groups(plan) for i in group[:-1]])


def merged_groups(plan: Json) -> list[list[int]]:
    """Return the windows of decoder layers that a plan merges into their highest."""
    return [group for step in plan["steps"] for group in step.get("groups", ())]


def layer_outcomes(plan: Json) -> dict[int, str]:
    """Return what becomes of the decoder layers that a plan does something to, but for zeros."""
    told: dict[int, str] = {}
    for step in plan["steps"]:
        told |= dict.fromkeys(step.get("layers", ()), "**removed**")
        for group in step.get("groups", ()):
            told |= dict.fromkeys(group[:-1], f"**merged into {group[-1]}**")
        for name in ("attention", "mlp") if step["kind"] == "drop_sublayers" else ():
            for layer in step[name]:
                told[layer] = f"{told.get(layer, 'without')} **{name}**"
    return told


def steps_of(plan: Json, kind: str) -> list[Json]:
    """Return the steps of a plan of one kind."""
    return [step for step in plan["steps"] if step["kind"] == kind]


def has_own_class(plan: Json) -> bool:
    """Return whether a plan leaves a model of a class that transformers does not have."""
    before = plan["model"]["model_type"].startswith("prunelight_")  # an earlier run's doing
    sliced = any(step["rotation"] == "per_layer" for step in steps_of(plan, "slice_hidden"))
    return before or sliced or bool(steps_of(plan, "drop_sublayers"))


def score_lists(plan: Json) -> dict[str, list[float]]:
    """Return the scores that decided, at most one a decoder layer (or a window that starts there).

    The planned "sparsity" is what they decided: see `layer_zeros`.
    """
    num_layers = plan["model"]["num_hidden_layers"]
    fewest = num_layers if steps_of(plan, "sparsify") else 1
    return {
        name: [math.nan if score is None else score for score in scores]
        for name, scores in plan["scores"].items()
        if fewest <= len(scores) <= num_layers and name != "sparsity"
    }


def nominal(plan: Json) -> str:
    """Return the ratio in the method's own terms: of decoder layers, of weights or of widths."""
    num_layers, parts = plan["model"]["num_hidden_layers"], []
    merged = sum(len(group) - 1 for group in merged_groups(plan))
    counts = [(len(removed_layers(plan)) - merged, "decoder layers removed")]
    counts += [(merged, "decoder layers merged away")]
    for step in steps_of(plan, "drop_sublayers"):
        counts += [(len(step["attention"]), "attentions dropped")]
        counts += [(len(step["mlp"]), "MLPs dropped")]
    for count, what in counts:
        if count:
            parts.append(f"{count} of {num_layers} {what} ({percent(count / num_layers)})")
    for step in steps_of(plan, "prune_width"):
        for name, text, field in (
            ("heads", "key-value groups", "num_key_value_heads"),
            ("neurons", "neurons", "intermediate_size"),
        ):
            if step[name]:
                kept = len(next(iter(step[name].values())))
                before = plan.get("found", {}).get(f"{field}_before", "all")
                parts.append(f"{kept} of {before} {text} kept in every layer")
    for step in steps_of(plan, "slice_hidden"):
        widths = [step["residual_dims"][site] for site in sliced_sites(plan, step)]
        how = f" (widths {min(widths)} to {max(widths)})" if len(set(widths)) > 1 else ""
        how += " (one rotation)" if step["rotation"] == "shared" else ""
        parts.append(f"{percent(share_sliced(plan, step))} of the hidden width sliced{how}")
    for step in steps_of(plan, "sparsify"):
        mixed = " on average" if len(set(step["sparsity"].values())) > 1 else ""
        pattern = f" ({step['pattern']} pattern{mixed})" if step["pattern"] else ""
        parts.append(
            f"{percent(planned_share(plan, step))} of the weights of decoder linears{pattern}"
        )
    return ", ".join(parts) or "no layer removed"


def sliced_sites(plan: Json, step: Json) -> range:
    """Return the sites before attentions and MLPs, less that of embeddings left whole."""
    hidden, (first, *others, _) = plan["model"]["hidden_size"], step["residual_dims"]
    whole = first == hidden and min(others) < hidden
    return range(int(whole), 1 + len(others))


def share_sliced(plan: Json, step: Json) -> float:
    """Return the share of the hidden width that a slice step removes, mean over the MLPs.

    At attentions it is the same, but for the first one's where the embeddings are left whole.
    """
    return 1 - _mean(step["residual_dims"][1::2]) / plan["model"]["hidden_size"]


def planned_share(plan: Json, step: Json) -> float:
    """Return the share of zeros that a step aims at in all decoder linears together."""
    if step["pattern"]:
        kept, _, group = step["pattern"].partition(":")
        return 1 - int(kept) / int(group)
    asked = plan["arguments"].get("sparsity")
    return _mean(list(step["sparsity"].values())) if asked is None else asked


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


class LayerZeros(NamedTuple):
    """What a sparsify step does to each decoder layer; NaN where that is not known."""

    layers: list[float]  # share of zeros in the linears of each decoder layer
    projections: dict[str, list[float]]  # path of a projection -> its share in each decoder layer
    errors: list[float]  # reconstruction error of each decoder layer; empty if not measured


def layer_zeros(plan: Json, step: Json, told: Json) -> LayerZeros:
    """Tell a sparsify step by layer and projection: as `told` by its outcome, else as planned.

    Several matrices of one path in a layer (experts) are averaged.
    """
    dense = range(plan["model"]["num_hidden_layers"])
    # An outcome counts the layers that were left, a plan those of the dense model.
    gone = removed_layers({"steps": plan["steps"][: plan["steps"].index(step)]})
    left = [layer for layer in dense if layer not in gone]

    def spread(values: Iterable[float]) -> list[float]:
        known = dict(zip(left, values, strict=True))
        return [known.get(layer, math.nan) for layer in dense]

    cells: dict[str, list[list[float]]] = {}
    shares: dict[str, float] = told.get("sparsity") or step["sparsity"]
    for name, share in shares.items():
        _, index, path = re.split(r"\.(\d+)\.", name, maxsplit=1)
        row = cells.setdefault(re.sub(r"\.\d+(?=\.)", "", path), [[] for _ in dense])
        row[(left if told else dense)[int(index)]].append(share)
    planned = plan["scores"].get("sparsity", [math.nan] * len(dense))
    errors = told.get("reconstruction_error")
    return LayerZeros(
        layers=spread(told["layer_sparsity"]) if "layer_sparsity" in told else planned,
        projections={path: [_mean(shares) for shares in row] for path, row in cells.items()},
        errors=spread(errors) if errors else [],
    )


def by_sublayer(sites: list[Any]) -> dict[str, list[Any]]:
    """Return what sites of the hidden states have before each attention and before each MLP."""
    return {"attention": sites[:-1:2], "MLP": sites[1::2]}


def explained_variance(step: Json, outcome: Json) -> dict[str, list[float]]:
    """Return the share of the energy that a slice step keeps `by_sublayer`; {} if not measured."""
    measured = "explained_variance" in outcome and step["rotation"] == "per_layer"
    return by_sublayer(outcome["explained_variance"]) if measured else {}
