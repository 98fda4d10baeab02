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
from prunelight.models.families.config_fields import decoder_config
from prunelight.models.families.layers import decoder_layers
from prunelight.models.families.own_classes.dropped_sublayers import (
    CLASSES,
    PREFIX,
    GapOperator,
    gap_layers,
    layers_of,
    put_operators,
)
from prunelight.models.families.own_classes.registration import family_of, prefix_of, take_class
from prunelight.pruning.healing.error_sums import token_weights
from prunelight.pruning.healing.held_out import fitted_and_held_out
from prunelight.pruning.healing.writers import Writer

_STATES, _INPUTS = 0, 1  # kinds of what is known of a token
# What may be fitted, as the first and the last kind that it is multiplied with: M, D, or both.
_OPERATOR, _WRITER, _BOTH = (_STATES, _STATES), (_INPUTS, _INPUTS), (_STATES, _INPUTS)
_ROUNDING = 1e-6  # of float64 solves


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
        TypeError: if no class of ours describes such a model, or accelerate placed it.
    """
    if reason := _why_not(model):
        kind = model.config.model_type
        raise TypeError(f"heal='operator' cannot be had for {kind}: {reason}; take heal='linear'")


def _why_not(model: PreTrainedModel) -> str:
    kind = model.config.model_type
    if prefix_of(kind) not in ("", PREFIX):
        return "its layers are sliced, or of different widths"
    if decoder_config(model.config) is not model.config:
        return "its text decoder is a part of a larger model"
    try:
        own = CLASSES[family_of(kind)]
    except KeyError:
        own = None
    if own is None or not issubclass(own, type(model)):
        return f"{type(model).__name__} is no causal language model of transformers' own table"
    if layers_of(model) is not decoder_layers(model):
        return "its decoder layers are not the first list of as many modules"
    if any("forward" in vars(layer) for layer in decoder_layers(model)):
        return "accelerate placed it (device_map); load it without"
    return ""


def put_gap_operators(model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Put matrices of zeros behind layers that have none, in place; model and config change class.

    Args:
        model: that `check_operators` takes.
        layers: present indices.
    """
    at_gaps = {*gap_layers(model.config), *layers}
    config: Any = model.config
    take_class(model, CLASSES[family_of(config.model_type)])
    config.gap_operators = [index in at_gaps for index in range(config.num_hidden_layers)]
    put_operators(model)


def fit_gap(
    walk: LayerWalk,
    operator: GapOperator,
    writer: Writer | None,
    target_of: Callable[[int], Tensor],
    ridges: Sequence[float],
) -> GapFit:
    """Return what brings the walk's current layer closest to the dense states behind its gap.

    Args:
        walk: at the layer.
        operator: behind the layer; where it is not zero, M goes behind it, and it alone is fitted.
        writer: the last matrix of the layer, if that can be fitted too.
        target_of: returns the states (B, T, D) that it should hand on for a micro-batch.
        ridges: to choose among.
    """
    if operator.weight.any():
        writer = None
    width = operator.in_features
    kinds = (width,) if writer is None else (width, writer.weight.shape[1])
    observe = partial(_observe, writer)
    fitted_on, held_out, energy = fitted_and_held_out(walk, observe, target_of, width, kinds)
    total = fitted_on + held_out
    before = float(held_out.energy)
    errors = {
        (part, ridge): held_out.of_kinds(*part).error(fitted_on.of_kinds(*part).fit(ridge))
        for part in ([_OPERATOR] if writer is None else [_OPERATOR, _WRITER, _BOTH])
        for ridge in ridges
    }
    for (part, ridge), after in sorted(errors.items(), key=lambda item: item[1]):
        if not after < before:
            break
        solution = total.of_kinds(*part).fit(ridge)
        matrices = _taken_apart(solution, part, width)
        if matrices is not None:
            shares = before / energy, after / energy
            return GapFit(ridge, *shares, *matrices, fitted_on.tokens, sum(kinds))
    same = before / energy
    return GapFit(0.0, same, same, None, None, fitted_on.tokens, sum(kinds))


def _taken_apart(
    solution: Tensor, part: tuple[int, int], width: int
) -> tuple[Tensor | None, Tensor | None] | None:
    """Return M, and the change of the writer's weight, of what was fitted.

    What the writer adds goes through M as well, so that its own change is (1 + M)^-1 D. Where 1 + M
    has no inverse to speak of, there are none.
    """
    if part == _OPERATOR:
        return solution, None
    if part == _WRITER:
        return None, solution
    operator, wanted = solution[:, :width], solution[:, width:]
    through = torch.eye(width).to(operator) + operator
    change = torch.linalg.solve_ex(through, wanted).result
    missed = (through @ change - wanted).norm()
    return (operator, change) if bool(missed <= _ROUNDING * wanted.norm()) else None


@torch.no_grad()
def put_operator(operator: GapOperator, fitted: Tensor) -> None:
    """Let what is handed on go through one more matrix M (D, D): (1 + M) (1 + M') = 1 + M''."""
    old = operator.weight.to(fitted)
    operator.weight.data = (old + fitted + fitted @ old).to(operator.weight)


def _observe(
    writer: Writer | None, forward: Callable[[], Tensor], target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a fit at a gap needs to know of some tokens, see `held_out.Observe`.

    Known are the states (B, T, D), and the inputs of the writer (B, T, I) behind them.
    """
    if writer is None:
        states = forward().float()
        target = target.to(states)
        return states, target - states, token_weights(target)
    inputs, missing, weights = writer.observe(forward, target)
    missing = missing * writer.scale
    states = target.to(missing) - missing
    return torch.cat([states, writer.scale * inputs.float()], -1), missing, weights
