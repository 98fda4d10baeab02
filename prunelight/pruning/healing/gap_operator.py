"""A matrix behind the layer before a gap, fitted together with the layer's last matrix.

The layer then hands on x + M x. Ghosted Layers (arXiv:2605.15491) fits M alone. Here the change D
of the layer's last matrix is fitted with it, since both are linear in what is known of a token: its
state y and the inputs h of that matrix. Held-out windows choose between the three: M, D, or both.
"""

# B sequences, T tokens, D hidden, I in_features

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunelight.calibration.layer_walk import LayerWalk
from prunelight.models.families.layers import decoder_layers
from prunelight.models.families.own_classes.dropped_sublayers import (
    CLASSES,
    GapOperator,
    gap_layers,
    layers_of,
    put_operators,
    take_class,
)
from prunelight.models.families.own_classes.registration import family_of, prefix_of
from prunelight.pruning.healing.error_sums import ErrorSums, token_weights
from prunelight.pruning.healing.held_out import split_positions
from prunelight.pruning.healing.writers import Writer
from prunelight.runtime.devices import float64_device

_STATES, _INPUTS = 0, 1  # kinds of inputs of the fit
_CANDIDATES = {"operator": (_STATES, _STATES), "writer": (_INPUTS, _INPUTS), "both": (0, 1)}


@dataclass(frozen=True)
class GapFit:
    """What was fitted at a gap.

    Attributes:
        ridge: that was taken; 0 if no fit lowers the error on held-out windows.
        error_before: weighted squared error there against the dense states, as a share of them.
        error_after: with what was fitted.
        operator: M, float64 (D, D), or None.
        change: of the weight of the writer, float64 (D, I), or None.
        tokens: that it was fitted on.
        inputs: how many numbers are known of each token.
    """

    ridge: float
    error_before: float
    error_after: float
    operator: Tensor | None
    change: Tensor | None
    tokens: int
    inputs: int


def check_operators(model: PreTrainedModel) -> None:
    """Check that matrices can be put behind the model's layers.

    Raises:
        TypeError: if no class of ours describes such a model.
    """
    kind = model.config.model_type
    why = ""
    if prefix_of(kind) not in ("", prefix_of(CLASSES["llama"].config_class.model_type)):
        why = "its layers are sliced, or of different widths"
    else:
        try:
            own = CLASSES[family_of(kind)]
        except KeyError:
            own = None
        if own is None or not issubclass(own, type(model)):
            why = f"{type(model).__name__} is no causal language model of transformers' own table"
        elif layers_of(model) is not decoder_layers(model):
            why = "its decoder layers are not the first list of as many modules"
    if why:
        raise TypeError(f"heal='operator' has no class for {kind}: {why}; take heal='linear'")


def put_gap_operators(model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Put matrices of zeros behind layers that have none, in place; model and config change class.

    Args:
        model: that `check_operators` takes.
        layers: present indices.
    """
    at_gaps = {*gap_layers(model.config), *layers}
    take_class(model)
    config: Any = model.config
    config.gap_operators = [index in at_gaps for index in range(config.num_hidden_layers)]
    put_operators(model)


def fit_gap(
    walk: LayerWalk,
    writer: Writer | None,
    target_of: Callable[[int], Tensor],
    ridges: Sequence[float],
) -> GapFit:
    """Return what brings the walk's current layer closest to the dense states behind its gap.

    Args:
        walk: at the layer.
        writer: its last matrix, if that can be fitted too.
        target_of: returns the states (B, T, D) that it should hand on for a micro-batch.
        ridges: to choose among.
    """
    fitted_on, held_out, energy = _sums(walk, writer, target_of)
    before = float(held_out.energy)
    candidates = _CANDIDATES if writer is not None else {"operator": _CANDIDATES["operator"]}
    errors = {
        (kinds, ridge): held_out.of_kinds(*kinds).error(fitted_on.of_kinds(*kinds).fit(ridge))
        for kinds in candidates.values()
        for ridge in ridges
    }
    kinds, ridge = min(errors, key=lambda tried: errors[tried])
    after, inputs = errors[kinds, ridge], sum(fitted_on.kinds)
    if not after < before:
        same = before / energy
        return GapFit(0.0, same, same, None, None, fitted_on.tokens, inputs)
    solution = (fitted_on + held_out).of_kinds(*kinds).fit(ridge)
    operator = solution[:, : fitted_on.kinds[_STATES]] if _STATES in kinds else None
    change = solution[:, -fitted_on.kinds[_INPUTS] :] if _INPUTS in kinds else None
    if operator is not None and change is not None:  # what the writer adds goes through M as well
        through = torch.eye(len(operator)).to(operator) + operator
        change = torch.linalg.lstsq(through, change).solution
    errors_told = before / energy, after / energy
    return GapFit(ridge, *errors_told, operator, change, fitted_on.tokens, inputs)


@torch.no_grad()
def put_operator(operator: GapOperator, fitted: Tensor) -> None:
    """Let what is handed on go through one more matrix M (D, D): (1 + M) (1 + M') = 1 + M''."""
    old = operator.weight.to(fitted)
    operator.weight.data = (old + fitted + fitted @ old).to(operator.weight)


def _sums(
    walk: LayerWalk, writer: Writer | None, target_of: Callable[[int], Tensor]
) -> tuple[ErrorSums, ErrorSums, float]:
    """Return the sums over windows to fit on and over those held out, and the latter's energy."""
    place = float64_device(walk.device)
    sums: list[ErrorSums] = []
    energy = 0.0
    for batch, split in enumerate(split_positions(walk)):
        target = target_of(batch)
        known, missing, weights = _observe(partial(walk.forward, batch), writer, target)
        if not sums:
            width = target.shape[-1]
            kinds = (width, *([] if writer is None else [known.shape[-1] - width]))
            sums = [ErrorSums.empty(width, kinds, place) for _ in range(2)]
        for own, rows in zip(sums, split, strict=True):
            if bool(rows.any()):
                own.update(known[rows], missing[rows], weights[rows])
        rows = split[1]
        energy += float((target[rows].square().sum(-1) * weights[rows]).sum())
    for own in sums:
        own.pool(walk.group)
    return sums[0], sums[1], max(walk.group.totals(energy)[0], 1e-30)


def _observe(
    forward: Callable[[], Tensor], writer: Writer | None, target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a fit at a gap needs to know of some tokens.

    Returns:
        What is known of the tokens (B, T, D + I), or (B, T, D) without writer; what is missing of
        their states (B, T, D); their weights (B, T).
    """
    if writer is None:
        states = forward().float()
        target = target.to(states)
        return states, target - states, token_weights(target)
    inputs, missing, weights = writer.observe(forward, target)
    missing = missing * writer.scale
    states = target.to(missing) - missing
    return torch.cat([states, writer.scale * inputs.float()], -1), missing, weights
