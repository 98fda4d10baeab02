"""Carries out a plan: `apply(model, plan, windows)`.

`KINDS` is the table of what can be done: each kind of step, with its check and its function.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from prunelight.calibration.windows import Windows, check_windows
from prunelight.models.families.layers import decoder_layers
from prunelight.models.placement import copy_of_same_memory, copy_without_values, with_index
from prunelight.models.sizes import parameter_count
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
from prunelight.pruning.drop_sublayers import DROP_SUBLAYERS, check_leading
from prunelight.pruning.healing.heal import HEAL
from prunelight.pruning.merge_layers import MERGE_LAYERS
from prunelight.pruning.prune_width import PRUNE_WIDTH
from prunelight.pruning.remove_experts import REMOVE_EXPERTS
from prunelight.pruning.remove_layers import REMOVE_LAYERS
from prunelight.pruning.slicing.slice_step import SLICE_HIDDEN
from prunelight.pruning.sparsity.sparsify import SPARSIFY
from prunelight.pruning.step_kind import StepContext, StepKind
from prunelight.runtime.finite import check_weights

log = logging.getLogger(__name__)

KINDS: dict[type[Step], StepKind[Any]] = {
    RemoveLayers: REMOVE_LAYERS,
    MergeLayers: MERGE_LAYERS,
    DropSublayers: DROP_SUBLAYERS,
    RemoveExperts: REMOVE_EXPERTS,
    PruneWidth: PRUNE_WIDTH,
    SliceHidden: SLICE_HIDDEN,
    Sparsify: SPARSIFY,
    Heal: HEAL,
}


def apply(
    model: PreTrainedModel,
    plan: Plan,
    windows: Windows | None = None,
    *,
    strict: bool = True,
    device: torch.device | None = None,
    offload: bool = False,
    outcomes: list[dict[str, Any]] | None = None,
    scratch: Path | None = None,
) -> PreTrainedModel:
    """Carry out a plan, in place where the class stays, and return the pruned model.

    Args:
        model: the model that the plan was made for.
        plan: from a callback's `plan`, or `Plan.load`.
        windows: calibration windows, for steps that need data: slice, corrected width, heal, and
            sparsify unless by magnitude.
        strict: require the very weights that the plan was made for, see `Plan.check`.
        device: where the layers compute, one at a time, for a model that is elsewhere.
        offload: keep the calibration states on the CPU.
        outcomes: this list gets what each sparsify, slice or heal step did, see
            `SparsifyOutcome`, `SliceOutcome` and `HealOutcome`.
        scratch: directory for layers that a sparsify or heal step has finished. They then take no
            memory: the model's weights are mapped from these files. Remove it when the model is
            saved. After a kill, the same call with the same directory goes on from there.

    Raises:
        ValueError: if the plan does not fit the model, or a weight is NaN or infinite (it is
            named); the model is then unchanged.
        TypeError: if the decoder layers cannot be found.
    """
    if not isinstance(plan, Plan):
        raise TypeError(
            f"plan is of type {type(plan).__name__}; it must be a Plan, from a callback's plan, "
            "Plan.load of a file or Plan.from_dict"
        )
    plan.check(model, strict=strict, num_layers=len(decoder_layers(model)))
    check_weights(model)
    context = StepContext(windows, None if device is None else with_index(device), offload)
    _check_steps(model, plan.steps, context)
    before = parameter_count(model) / 1e6
    context = replace(context, scratch=scratch)
    if any(_kind_of(step).needs_dense for step in plan.steps):
        context = replace(context, dense=_dense_twin(model, plan.steps, keeps=scratch is not None))
    for step in plan.steps:
        outcome = _kind_of(step).carry_out(model, step, context)
        if outcome is not None and outcomes is not None:
            outcomes.append(asdict(outcome))
        context = context.after(step)
    after = parameter_count(model) / 1e6
    change = 100 * (after / before - 1)
    log.info("parameters %.1fM -> %.1fM (%+.1f %%)", before, after, change)
    return model


def _kind_of(step: Step) -> StepKind[Any]:
    if type(step) not in KINDS:
        raise TypeError(f"no surgery is known for the step {step!r}")
    return KINDS[type(step)]


def _dense_twin(model: PreTrainedModel, steps: Sequence[Step], *, keeps: bool) -> PreTrainedModel:
    """Return the model as it is now, which the steps will not change.

    The twin shares the memory of all weights, unless a step changes numbers where they are.

    Args:
        model: before the plan.
        steps: of the plan.
        keeps: layers are kept, so that a step which can do so gives them memory of their own first.
    """
    if any(_kind_of(x).changes_weights and not (keeps and _kind_of(x).keeps_layers) for x in steps):
        return copy.deepcopy(model)
    return copy_of_same_memory(model)


def _check_steps(model: PreTrainedModel, steps: Sequence[Step], context: StepContext) -> None:
    """Check all steps against the model, and rehearse them, before the first is carried out."""
    alone = context
    for step in steps:
        kind = _kind_of(step)
        sliced = any(isinstance(earlier, SliceHidden) for earlier in context.earlier)
        if sliced and not kind.follows_slicing:
            raise ValueError(
                f"{step.kind} must not come after slice_hidden in a plan; remove, merge or drop in "
                "a plan before it"
            )
        kind.check(model, step, context)
        context = context.after(step)
        check_leading(model, context.removed, context.without_attention)
    if needs_windows(steps):
        assert context.windows is not None  # the step's own check
        check_windows(model, context.windows)
    if len(steps) > 1:
        _rehearse(copy_without_values(model), steps, alone)


def needs_windows(steps: Sequence[Step]) -> list[Step]:
    """Return the steps that run the model on calibration windows."""
    return [step for step in steps if _kind_of(step).needs_windows(step)]


def keeps_layers(steps: Sequence[Step]) -> list[Step]:
    """Return the steps that write the layers which they have finished into a scratch directory."""
    return [step for step in steps if _kind_of(step).keeps_layers]


def outline_after(model: PreTrainedModel, steps: Sequence[Step]) -> PreTrainedModel:
    """Return the pruned model without weights, on the meta device: modules, shapes and config.

    Slicing changes no shape here, and what follows it is left out.

    Args:
        model: may be on the meta device; it is unchanged.
        steps: of a plan.

    Raises:
        ValueError, TypeError: naming the step that cannot be carried out.
    """
    outline = copy_without_values(model)
    _rehearse(outline, steps, StepContext())
    return outline


def _rehearse(copied: PreTrainedModel, steps: Sequence[Step], context: StepContext) -> None:
    """Carry out all steps, in place, on a copy of the model without weights.

    A step may ask for what an earlier one took: a matrix of a dropped attention, a width that a
    pattern divides, layers of one kind.

    Raises:
        ValueError, TypeError: naming the step that cannot be carried out after those before it.
    """
    for position, step in enumerate(steps):
        if isinstance(step, SliceHidden):  # what may follow depends on no shape that it changes
            return
        kind = _kind_of(step)
        try:
            (kind.rehearse or kind.carry_out)(copied, step, replace(context, windows=None))
        except (ValueError, TypeError) as error:
            raise type(error)(
                f"steps[{position}] ({step.kind}) cannot follow the steps before it: {error}"
            ) from error
        context = context.after(step)
