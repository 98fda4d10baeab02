"""Which decoder layers can make up for what a plan takes, and which dense states they aim at.

A layer hands its states to the next layer that is left. Between two layers that are neighbours now,
dense layers may be gone: the lower one then stands for itself and for them. So the target of a
layer is the dense state that the next layer left used to get. Layers are counted as in the dense
model.
"""

from __future__ import annotations

from collections.abc import Sequence

from prunelight.planning.steps import (
    DropSublayers,
    Heal,
    MergeLayers,
    PruneWidth,
    SliceHidden,
    Sparsify,
    Step,
    layer_of,
)


def dense_ends(steps: Sequence[Step], num_layers: int) -> dict[int, int]:
    """Return for each layer that is left the last dense layer that it stands for.

    Args:
        steps: of a plan.
        num_layers: of the dense model.
    """
    removed = {layer for step in steps for layer in step.removed}
    left = [layer for layer in range(num_layers) if layer not in removed]
    ends = dict(zip(left, [*(layer - 1 for layer in left[1:]), num_layers - 1], strict=True))
    for window in _mixed_windows(steps):  # the merged layer stands for the whole window
        if (before := window[0] - 1) in ends:
            ends[before] = before
    return ends


def layers_to_heal(steps: Sequence[Step], num_layers: int, layers_path: str) -> list[int]:
    """Return the layers left whose task has grown or whose weights have changed.

    These are the layer before each gap, a layer that stands for a merged window, and each layer
    that was narrowed or sliced, that lost a sublayer or that got zeros. Nothing lies before a gap
    at the start, which is not healed.

    Args:
        steps: of a plan.
        num_layers: decoder layers of the dense model.
        layers_path: dotted path of the decoder layers, which names of matrices begin with.
    """
    ends = dense_ends(steps, num_layers)
    changed = {layer for layer, end in ends.items() if end > layer}
    changed |= {window[-1] for window in _mixed_windows(steps)}
    for step in steps:
        if isinstance(step, DropSublayers | PruneWidth):
            changed |= {*step.named}
        elif isinstance(step, SliceHidden):
            changed |= {*ends}
        elif isinstance(step, Sparsify):
            changed |= {layer_of(name, layers_path) for name in step.sparsity}
    return sorted(changed & {*ends})


def heal_step(
    steps: Sequence[Step], num_layers: int, layers_path: str, mode: str = "linear"
) -> list[Heal]:
    """Return the step that heals what other steps take; none if no layer can make up for it."""
    layers = layers_to_heal(steps, num_layers, layers_path)
    return [Heal(tuple(layers), mode)] if layers else []


def _mixed_windows(steps: Sequence[Step]) -> list[tuple[int, ...]]:
    """Return the windows whose merged layer has other weights than their highest layer."""
    merges = [step for step in steps if isinstance(step, MergeLayers) and step.merge != "top"]
    return [window for step in merges for window in step.groups]
