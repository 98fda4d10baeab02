"""How many parameters a plan leaves, counted on the meta device: no weight is read."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from prunelight.models.families.layers import decoder_layers
from prunelight.models.sizes import parameter_bytes, parameter_count
from prunelight.planning.plan import Plan
from prunelight.planning.steps import SliceHidden
from prunelight.pruning.abilities import unloaded_model
from prunelight.pruning.apply import outline_after
from prunelight.pruning.slicing.shared_rotation import shared_parameters
from prunelight.pruning.slicing.targets import sliced_parameters


@dataclass(frozen=True)
class Size:
    """A model before and after a plan.

    Attributes:
        before: its parameters.
        after: those that the plan leaves; zeros count.
        bytes_after: of their memory, at the mean bytes of a parameter before.
    """

    before: int
    after: int
    bytes_after: int

    @property
    def share_removed(self) -> float:
        """Share of all parameters that the plan removes; below 0 where it adds some."""
        return 1 - self.after / self.before

    def __str__(self) -> str:
        """Return both counts, and the change in percent."""
        before, after = self.before / 1e6, self.after / 1e6
        return f"{before:.4g}M -> {after:.4g}M ({-100 * self.share_removed:+.1f} %)"


def planned_size(model: PreTrainedModel, plan: Plan) -> Size:
    """Return the sizes of a model before and after a plan.

    Args:
        model: that the plan was made for, or its outline on the meta device; it is unchanged.
        plan: to carry out.

    Raises:
        ValueError, TypeError: if a step of the plan does not fit the model.
    """
    plan.check(model, strict=False, num_layers=len(decoder_layers(model)))
    before = parameter_count(model)
    outline = outline_after(model, plan.steps)
    after = parameter_count(outline)
    for step in plan.steps:
        if isinstance(step, SliceHidden):
            after = _sliced(outline, step)
    return Size(before, after, after * parameter_bytes(model) // before)


def size_by_config(name: str, plan: Plan, *, trust: bool = False) -> Size:
    """Return the sizes of a model by name, of which only the config is read.

    Raises:
        ValueError, TypeError: if there is no such model, or the plan does not fit it.
    """
    return planned_size(unloaded_model(name, trust_remote_code=trust), plan)


def _sliced(outline: PreTrainedModel, step: SliceHidden) -> int:
    if step.rotation == "shared":
        return shared_parameters(outline, step.residual_dims[0])
    return sliced_parameters(outline, step.residual_dims)
