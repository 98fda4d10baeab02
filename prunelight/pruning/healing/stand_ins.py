"""MLPs that stand in for removed layers, and are trained to do what these did.

The appendix of ShortGPT (arXiv:2403.03853v3) puts light MLPs where layers were, after
LLM-Streamline (2403.19135), which trains one network for a run of layers to the states behind it.
Here that network is the MLP of a layer of the run, with its norm, and starts with its weights: so
it runs, is saved and is exported as a layer without attention.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

from transformers import PreTrainedModel

from prunelight.models.families.own_classes.dropped_sublayers import dropped
from prunelight.models.families.removable import RemovableLayers, removable_layers
from prunelight.planning.layer_choice import runs_of
from prunelight.planning.steps import DropSublayers, RemoveLayers, Step
from prunelight.pruning.drop_sublayers import leading_attentions

log = logging.getLogger(__name__)


def leave_stand_ins(model: PreTrainedModel, steps: Sequence[Step]) -> tuple[Step, ...]:
    """Let the MLP of one layer stay of each run of layers that steps remove.

    A run keeps none where no layer of it may lose its attention alone; a warning names such runs.

    Args:
        model: the dense model.
        steps: of a plan.
    """
    removed = {layer for step in steps if isinstance(step, RemoveLayers) for layer in step.layers}
    removable = removable_layers(model)
    stand_ins: set[int] = set()
    for run in runs_of(removed):
        gone = removed - stand_ins
        choices = (layer for layer in run if _may_stay(model, removable, layer, gone))
        if (stand_in := next(choices, None)) is None:
            log.warning(
                "no MLP stands in for layers %s: %s cannot keep one of them without its attention",
                run,
                model.config.model_type,
            )
        else:
            stand_ins.add(stand_in)
    fewer = [_without(step, stand_ins) for step in steps]
    drops = [DropSublayers(attention=tuple(sorted(stand_ins)))] if stand_ins else []
    return (*(step for step in fewer if step.named), *drops)


def _may_stay(
    model: PreTrainedModel, removable: RemovableLayers, layer: int, removed: Collection[int]
) -> bool:
    """Return whether a layer can stay of those that are removed, without its attention."""
    others = {*removed} - {layer}
    return (
        layer not in leading_attentions(model, others)
        and layer not in dropped(model, "mlp")
        and not removable.fault(others)
    )


def _without(step: Step, layers: Collection[int]) -> Step:
    """Return a step that removes layers, without some of them; any other step as it is."""
    if not isinstance(step, RemoveLayers):
        return step
    return RemoveLayers(tuple(layer for layer in step.layers if layer not in layers))
