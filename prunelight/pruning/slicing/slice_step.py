"""A slice step of a plan: a rotation a site, or one rotation for the whole model."""

from __future__ import annotations

from transformers import PreTrainedModel

from prunelight.planning.steps import SliceHidden
from prunelight.pruning.slicing.shared_rotation import check_shared, share_rotation
from prunelight.pruning.slicing.slice_hidden import SliceOutcome, check_slice, slice_hidden
from prunelight.pruning.step_kind import StepContext, StepKind


def _check(model: PreTrainedModel, step: SliceHidden, context: StepContext) -> None:
    if context.earlier:
        raise ValueError(
            f"slice_hidden must be the first step of its plan, not after "
            f"{context.earlier[-1].kind}; apply the steps before it as a plan of their own"
        )
    check_slice(model, step, context.windows)
    if step.rotation == "shared":
        check_shared(model, step)


def _carry_out(model: PreTrainedModel, step: SliceHidden, context: StepContext) -> SliceOutcome:
    assert context.windows is not None  # check_slice
    slice_model = share_rotation if step.rotation == "shared" else slice_hidden
    return slice_model(model, step, context.windows, device=context.device, offload=context.offload)


SLICE_HIDDEN = StepKind(_check, _carry_out, needs_windows=lambda step: True, changes_weights=True)
