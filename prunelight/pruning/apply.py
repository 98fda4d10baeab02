"""Carrying out a plan: `apply(model, plan, windows)`."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from prunelight.calibration.windows import Windows
from prunelight.models.families.layers import layers_path
from prunelight.models.sizes import parameter_count
from prunelight.planning.plan import Plan
from prunelight.planning.steps import (
    DropSublayers,
    MergeLayers,
    PruneWidth,
    RemoveLayers,
    SliceHidden,
    Sparsify,
    Step,
    renumber,
    renumbered,
)
from prunelight.pruning.drop_sublayers import check_droppable, check_leading, drop_sublayers
from prunelight.pruning.merge_layers import check_mergeable, merge_layers
from prunelight.pruning.prune_width import check_width, prune_width
from prunelight.pruning.remove_layers import check_removable, remove_layers
from prunelight.pruning.slicing.shared_rotation import check_shared, share_rotation
from prunelight.pruning.slicing.slice_hidden import check_slice, slice_hidden
from prunelight.pruning.sparsity.sparsify import check_data, check_step, sparsify

log = logging.getLogger(__name__)


def apply(
    model: PreTrainedModel,
    plan: Plan,
    windows: Windows | None = None,
    *,
    strict: bool = True,
    device: torch.device | None = None,
    offload: bool = False,
    outcomes: list[dict[str, Any]] | None = None,
) -> PreTrainedModel:
    """Carry out a plan, in place where the class stays, and return the pruned model.

    Args:
        model: the model that the plan was made for.
        plan: from a callback's `plan`, or `Plan.load`.
        windows: calibration windows, for steps that need data (slice; sparsify, unless by
            magnitude).
        strict: require the very weights that the plan was made for, see `Plan.check`.
        device: where the layers compute, one at a time, for a model that is elsewhere.
        offload: keep the calibration states on the CPU.
        outcomes: gets what each sparsify or slice step did, see `sparsify.Outcome` and
            `slicing.SliceOutcome`.

    Raises:
        ValueError: if the plan does not fit the model; the model is then unchanged.
        TypeError: if the decoder layers cannot be found.
    """
    plan.check(model, strict=strict)
    _check_steps(model, plan.steps, windows)
    before = parameter_count(model) / 1e6
    removed: set[int] = set()  # the plan counts the layers of the dense model

    def left(layers: Iterable[int]) -> list[int]:
        return [renumber(layer, removed) for layer in layers]

    outcomes = [] if outcomes is None else outcomes
    places: dict[str, Any] = {"device": device, "offload": offload}
    for step in plan.steps:
        if isinstance(step, RemoveLayers):
            remove_layers(model, left(step.layers))
        elif isinstance(step, MergeLayers):
            merge_layers(model, [*map(left, step.groups)], step.merge)
        elif isinstance(step, DropSublayers):
            drop_sublayers(model, left(step.attention), left(step.mlp))
        elif isinstance(step, PruneWidth):
            prune_width(model, step, windows, removed=removed, **places)
        elif isinstance(step, SliceHidden):
            assert windows is not None  # check_slice
            carry_out = share_rotation if step.rotation == "shared" else slice_hidden
            outcomes.append(asdict(carry_out(model, step, windows, **places)))
        elif isinstance(step, Sparsify):
            step = replace(step, sparsity=renumbered(step.sparsity, layers_path(model), removed))
            outcomes.append(asdict(sparsify(model, step, windows, **places)))
        else:
            raise TypeError(f"no surgery is known for the step {step!r}")
        removed |= set(step.removed)
    after = parameter_count(model) / 1e6
    change = 100 * (after / before - 1)
    log.info("parameters %.1fM -> %.1fM (%+.1f %%)", before, after, change)
    return model


def _check_steps(model: PreTrainedModel, steps: Sequence[Step], windows: Windows | None) -> None:
    """Check all steps against the model, before the first is carried out."""
    gone: tuple[int, ...] = ()
    headless: tuple[int, ...] = ()  # layers without attention
    kinds: list[type[Step]] = []
    for step in steps:
        gone += step.removed
        if step.removed:
            check_removable(model)
        if SliceHidden in kinds and not isinstance(step, Sparsify | PruneWidth):
            raise ValueError(
                f"{step.kind} must not come after slice_hidden in a plan; remove, merge or drop in "
                "a plan before it"
            )
        if isinstance(step, Sparsify):
            check_step(model, step)
            check_data(step, windows)
        elif isinstance(step, MergeLayers):
            check_mergeable(model, step.merge, step.groups)
        elif isinstance(step, DropSublayers):
            check_droppable(model)
            headless += step.attention
        elif isinstance(step, PruneWidth):
            if {DropSublayers, PruneWidth} & {*kinds}:
                raise ValueError("prune width once, and before sublayers are dropped")
            check_width(model, step, windows, gone)
        elif isinstance(step, SliceHidden):
            if kinds:
                raise ValueError(
                    f"slice_hidden must be the first step of its plan, not after {kinds[-1].kind}; "
                    "apply the steps before it as a plan of their own"
                )
            check_slice(model, step, windows)
            if step.rotation == "shared":
                check_shared(model, step)
        check_leading(model, gone, headless)
        kinds.append(type(step))
