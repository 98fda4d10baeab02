"""What plans decide, in few words: a line for each kind of decision, and where two plans differ."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from prunelight.planning.layer_choice import runs_of
from prunelight.planning.plan import Plan
from prunelight.planning.steps import (
    DropSublayers,
    Heal,
    MergeLayers,
    PruneWidth,
    RemoveExperts,
    RemoveLayers,
    SliceHidden,
    Sparsify,
    Step,
)

NOTHING = "-"


def plan_rows(plan: Plan) -> dict[str, str]:
    """Return what a plan is, and what it decides: name of a row -> text."""
    given = {name: value for name, value in plan.arguments.items() if value not in (None, [], {})}
    data = plan.calibration
    sizes = [data.get(name, "?") for name in ("num_samples", "seq_len")]
    windows = f"{sizes[0]} windows of {sizes[1]} tokens" if data else "none"
    return {
        "method": plan.method,
        "arguments": ", ".join(f"{name}={value}" for name, value in given.items()) or NOTHING,
        "model": f"{plan.model.get('name')} ({plan.model.get('num_hidden_layers')} layers)",
        "calibration": windows,
        **decisions(plan),
    }


def decisions(plan: Plan) -> dict[str, str]:
    """Return what each kind of step does: name of a row -> text, in the order of the steps."""
    rows: dict[str, list[str]] = {}
    for step in plan.steps:
        for name, text in _step_rows(step):
            rows.setdefault(name, []).append(text)
    return {name: "; ".join(texts) for name, texts in rows.items()}


def difference_rows(first: Plan, second: Plan) -> dict[str, tuple[str, str]]:
    """Return the rows in which two plans differ: name -> text of the first and of the second.

    Of layers that go, those that only one plan names stand in rows of their own. Differences that
    a row's text does not show, such as other neurons of the same number, are counted.
    """
    one, other = plan_rows(first), plan_rows(second)
    rows = {}
    for name in dict.fromkeys([*one, *other]):
        texts = one.get(name, NOTHING), other.get(name, NOTHING)
        if texts[0] != texts[1]:
            rows[name] = texts
    gone, gone_too = _removed(first), _removed(second)
    if gone != gone_too and gone and gone_too:
        rows["removed only here"] = (
            layer_ranges(gone - gone_too) or NOTHING,
            layer_ranges(gone_too - gone) or NOTHING,
        )
    for name in ("model", "calibration"):
        marks = tuple(str(getattr(x, name).get("fingerprint", NOTHING)) for x in (first, second))
        if marks[0] != marks[1]:
            rows[f"fingerprint of {name}"] = (marks[0], marks[1])
    if first.steps != second.steps and decisions(first) == decisions(second):
        rows["steps"] = ("other choices within the same numbers", "see the files")
    return rows


def layer_ranges(layers: Collection[int]) -> str:
    """Return layers as text, with neighbours as ranges: "1-3, 7"."""
    return ", ".join(
        f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs_of(layers)
    )


def _removed(plan: Plan) -> set[int]:
    return {layer for step in plan.steps for layer in step.removed}


def _step_rows(step: Step) -> Iterable[tuple[str, str]]:
    """Yield name and text of the rows of a step."""
    if isinstance(step, RemoveLayers):
        yield "layers removed", _counted(step.layers)
    elif isinstance(step, MergeLayers):
        groups = ", ".join(layer_ranges(group) for group in step.groups) or NOTHING
        yield "layers merged", f"{groups} ({step.merge}); {len(step.removed)} go"
    elif isinstance(step, DropSublayers):
        for name, layers in step.dropped_sublayers.items():
            if layers:
                yield f"{name} dropped", _counted(layers)
    elif isinstance(step, RemoveExperts):
        yield "experts removed", _by_layer({int(i): len(x) for i, x in step.experts.items()})
    elif isinstance(step, PruneWidth):
        for name in ("heads", "neurons"):
            kept: Mapping[Any, Collection[int]] = getattr(step, name)
            if kept:
                yield f"{name} kept", _by_layer({int(i): len(x) for i, x in kept.items()})
    elif isinstance(step, SliceHidden):
        least, most = min(step.residual_dims), max(step.residual_dims)
        widths = f"{least}" if least == most else f"{least} to {most}"
        yield "hidden widths", f"{widths} ({step.rotation})"
    elif isinstance(step, Sparsify):
        shares = step.sparsity.values() or [0.0]
        lowest, highest = (f"{100 * bound(shares):.1f} %" for bound in (min, max))
        share = lowest if lowest == highest else f"{lowest} to {highest}"
        how = ", ".join(part for part in (step.solver, step.pattern) if part)
        yield "zeros", f"{share} of {len(step.sparsity)} matrices ({how})"
    elif isinstance(step, Heal):
        yield "layers healed", _counted(step.layers)


def _counted(layers: Collection[int]) -> str:
    return f"{layer_ranges(layers)} ({len(layers)})" if layers else NOTHING


def _by_layer(numbers: Mapping[int, int]) -> str:
    """Return a number of each layer as text; layers of equal numbers together."""
    layers: dict[int, list[int]] = {}
    for layer, number in sorted(numbers.items()):
        layers.setdefault(number, []).append(layer)
    if not layers:
        return NOTHING
    if len(layers) == 1:
        return f"{next(iter(layers))} in each of {len(numbers)} layers"
    return "; ".join(f"{number} in {layer_ranges(of)}" for number, of in layers.items())
