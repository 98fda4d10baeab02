"""Carries out a heal step: some layers are fitted to the dense hidden states.

The dense and the pruned model walk side by side over the same windows. A layer that is healed gets
the states of the pruned and healed layers before it. Its last matrix is fitted by ridge regression
so that the layer hands on what the dense model hands to the next layer that is left. ReplaceMe
(arXiv:2505.02819) does this for one gap and one linear map; here the matrix itself is fitted.

Tokens weigh 1 / ||dense state||: massive activations are a thousand times as large as others. Their
tokens count all the same, because a layer that writes them must go on doing so. Every fourth window
is held out. It chooses the ridge, and a fit that does not lower its error there is discarded.

Mode "operator" also puts a matrix behind the layer before each gap, see `gap_operator.py`.

Mode "layer" then trains all matrices of the layer, see `tune.py`. It needs no matrix that adds to
the states, so that it heals families whose layers norm what their MLP gives, or end in experts.
"""

# B sequences, T tokens, D hidden, I in_features

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunelight.calibration.kept_layers import KeptLayers
from prunelight.calibration.layer_walk import LayerWalk
from prunelight.calibration.statistics import check_finite
from prunelight.calibration.windows import Windows
from prunelight.models.families.layers import decoder_layers, layers_path
from prunelight.models.families.matrices import layer_matrices
from prunelight.models.families.own_classes.dropped_sublayers import GapOperator
from prunelight.planning.steps import Heal, PruneWidth, SliceHidden, Sparsify, renumber
from prunelight.pruning.healing.ends import dense_ends
from prunelight.pruning.healing.gap_operator import (
    check_operators,
    fit_gap,
    put_gap_operators,
    put_operator,
)
from prunelight.pruning.healing.held_out import fitted_and_held_out
from prunelight.pruning.healing.tune import tune_layer
from prunelight.pruning.healing.writers import Writer, check_healable, kept_zeros, writer_of
from prunelight.pruning.step_kind import StepContext, StepKind
from prunelight.runtime.devices import float64_device

log = logging.getLogger(__name__)

_ROTATION_ROUNDING = 0.02  # bfloat16's, and some room


@dataclass
class HealOutcome:
    """What a heal step did; lists have one number for each layer that it names.

    Attributes:
        healed: matrices that were fitted in closed form.
        ridge: the ridge that was taken, or 0 where no closed form was.
        error_before: weighted squared error of the layer's output against the dense states on the
            windows that were held out, divided by that of the dense states themselves.
        error_after: the same with the fitted weights.
        notes: warnings of the run, for its report.
        epochs: after how many passes a layer's trained weights were taken, 0 where none were; of
            mode "layer" alone.
        fitted: the last names of the matrices that were fitted; of mode "operator" alone.
    """

    healed: list[str] = field(default_factory=list)
    ridge: list[float] = field(default_factory=list)
    error_before: list[float] = field(default_factory=list)
    error_after: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)
    fitted: list[str] = field(default_factory=list)

    def add(self, ridge: float, before: float, after: float) -> None:
        """Note what the closed form did to a layer."""
        self.ridge.append(ridge)
        self.error_before.append(before)
        self.error_after.append(after)

    def extend(self, layer: HealOutcome) -> None:
        """Add what the step did to one more layer."""
        for name, values in asdict(layer).items():
            getattr(self, name).extend(values)


@torch.no_grad()
def heal(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    step: Heal,
    windows: Windows,
    *,
    ends: dict[int, int],
    rotated: bool = False,
    sparse: bool = False,
    device: torch.device | None = None,
    offload: bool = False,
    kept: KeptLayers | None = None,
) -> HealOutcome:
    """Fit each layer that the step names, in place.

    Args:
        model: after the other steps of the plan.
        dense: before them; its layers are those that the step counts.
        step: which layers, which ridges.
        windows: calibration windows, (N, T).
        ends: layer that is left -> last dense layer that it stands for, see `dense_ends`.
        rotated: the states of the model are sliced rotations of the dense states.
        sparse: the plan put zeros into the model, so that each zero stays.
        device: where the layers compute; None takes the model's own.
        offload: keep the calibration states on the CPU.
        kept: gets each layer when it is healed; those that it has are not fitted again.

    Raises:
        ValueError: if activations are NaN or Inf; some layers may be healed by then.
    """
    outcome = HealOutcome()
    with (
        LayerWalk(dense, windows, device=device, offload=offload) as dense_walk,
        LayerWalk(model, windows, device=device, offload=offload, label="heal") as walk,
    ):
        ahead = dense_walk.layers()
        layers = walk.layers(kept)
        for (index, module), (layer, end) in zip(layers, sorted(ends.items()), strict=True):
            for dense_index, _ in ahead:
                dense_walk.advance()
                if dense_index == end:
                    break
            part = HealOutcome()
            if kept is not None and index in kept.facts:
                part = HealOutcome(**kept.facts[index])
            elif layer in step.layers:
                for state in dense_walk.states:
                    check_finite(end, state.abs().max().item(), state)
                writer = writer_of(walk, index)
                turn = _rotation(dense, layer, writer) if rotated and writer else None
                target_of = partial(_target, walk, dense_walk.states, turn)
                at_gap = step.mode == "operator" and end > layer
                if at_gap:
                    _fit_gap(walk, index, module, writer, target_of, step.ridges, sparse, part)
                elif writer is None:
                    part.add(0.0, 0.0, 0.0)
                else:
                    _fit_writer(walk, writer, target_of, step.ridges, sparse, part)
                if step.mode == "layer":
                    _tune(walk, index, module, target_of, step.epochs, sparse, part)
                elif writer is None and not at_gap:
                    reason = "no matrix of it adds to the hidden states"
                    if hasattr(module, "gap_operator"):
                        reason = "an earlier run put a matrix behind it; take heal='operator'"
                    _note(part, f"layer {layer} was not healed: {reason}")
                if step.mode == "operator":
                    part.fitted.append(", ".join(name.split(".")[-1] for name in part.healed))
            outcome.extend(part)
            if kept is not None:
                kept.note(index, part)
            if index + 1 < len(ends):
                walk.advance()
    return outcome


def _rotation(dense: PreTrainedModel, layer: int, writer: Writer) -> Tensor:
    """Return the matrix (D, d) that turns dense states into those that a slice step keeps.

    The step has turned the writer's outputs too, so both weights tell it: W'^T = W^T Q.

    Raises:
        ValueError: if no such matrix leads from one weight to the other.
    """
    path = layers_path(dense)
    _, _, own_name = writer.matrix.name.removeprefix(f"{path}.").partition(".")
    name = f"{path}.{layer}.{own_name}"
    place = float64_device(writer.weight.device)
    wide = {matrix.name: matrix for matrix in layer_matrices(dense, layer)}[name].views()[0]
    before, after = (weight.to(place).double().T for weight in (wide, writer.weight))
    turn = torch.linalg.lstsq(before, after).solution
    difference = float((before @ turn - after).norm() / after.norm())
    if len(before) < before.shape[1] or difference > _ROTATION_ROUNDING:
        raise ValueError(
            f"{name} does not tell how slicing turned the hidden states (off by {difference:.1g}): "
            "slice in a plan of its own, without heal"
        )
    return turn


def _target(walk: LayerWalk, dense_states: list[Tensor], turn: Tensor | None, batch: int) -> Tensor:
    """Return the states (B, T, D) that a layer should hand on for a micro-batch, float32."""
    target = dense_states[batch].to(walk.device).float()
    return target if turn is None else target @ turn.to(target)


def _fit_gap(
    walk: LayerWalk,
    index: int,
    module: nn.Module,
    writer: Writer | None,
    target_of: Callable[[int], Tensor],
    ridges: Sequence[float],
    sparse: bool,
    outcome: HealOutcome,
) -> None:
    """Fit the matrix behind the walk's current layer, in place, if that helps held-out windows.

    The layer's last matrix is fitted with it, unless it has zeros to keep.
    """
    operator = module.gap_operator
    assert isinstance(operator, GapOperator)
    if writer is not None and kept_zeros(writer.weight, sparse) is not None:
        writer = None
    fitted = fit_gap(walk, operator, writer, target_of, ridges)
    name = f"{layers_path(walk.model)}.{index}.gap_operator"
    if fitted.tokens < fitted.inputs:
        _note(
            outcome,
            f"{name} was fitted on {fitted.tokens} tokens, fewer than the {fitted.inputs} numbers "
            "that are known of each: the ridge decides the rest; calibrate on more text",
        )
    outcome.add(fitted.ridge, fitted.error_before, fitted.error_after)
    if fitted.change is not None:
        assert writer is not None
        writer.put(writer.weight.to(fitted.change) + fitted.change)
        outcome.healed.append(writer.matrix.name)
    if fitted.operator is not None:
        put_operator(operator, fitted.operator)
        outcome.healed.append(name)
    elif not operator.weight.any():
        better = "the last matrix of the layer alone" if outcome.healed else "the old weights"
        _note(
            outcome,
            f"{name} stays zero: held-out windows prefer {better}; heal='linear' leaves a model "
            "without it",
        )
    log.info(
        "gap behind layer %d: %s with ridge %g: error %.3g -> %.3g of the dense states on held-out "
        "windows",
        index,
        ", ".join(outcome.healed) or "nothing fitted",
        fitted.ridge,
        fitted.error_before,
        fitted.error_after,
    )


def _fit_writer(
    walk: LayerWalk,
    writer: Writer,
    target_of: Callable[[int], Tensor],
    ridges: Sequence[float],
    sparse: bool,
    outcome: HealOutcome,
) -> None:
    """Fit the writer of the walk's current layer, in place, if that helps held-out windows."""
    features, inputs = writer.weight.shape
    sums = fitted_and_held_out(walk, writer.observe, target_of, features, (inputs,))
    fitted_on, held_out, energy = sums
    scale = energy / writer.scale**2  # as the errors are
    mask = kept_zeros(writer.weight, sparse)
    if fitted_on.tokens < inputs:
        _note(
            outcome,
            f"{writer.matrix.name} was fitted on {fitted_on.tokens} tokens, fewer than its "
            f"{inputs} inputs: the ridge decides the rest; calibrate on more text",
        )
    before = held_out.error(torch.zeros_like(held_out.cross))
    # Zeros make a fit slow: they do not take part in the choice of the ridge.
    errors = {ridge: held_out.error(fitted_on.fit(ridge)) for ridge in ridges}
    ridge = min(errors, key=lambda tried: errors[tried])
    after = errors[ridge]
    if mask is not None:
        after = held_out.error(fitted_on.fit(ridge, mask))
    better = after < before
    outcome.add(ridge if better else 0.0, before / scale, (after if better else before) / scale)
    if not better:
        log.info("%s keeps its weights: no fit helps held-out windows", writer.matrix.name)
        return
    change = (fitted_on + held_out).fit(ridge, mask)
    writer.put(writer.weight.to(change.device).double() + change)
    outcome.healed.append(writer.matrix.name)
    log.info(
        "%s fitted with ridge %g: error %.3g -> %.3g of the dense states on held-out windows",
        writer.matrix.name,
        ridge,
        outcome.error_before[-1],
        outcome.error_after[-1],
    )


def _tune(
    walk: LayerWalk,
    index: int,
    module: nn.Module,
    target_of: Callable[[int], Tensor],
    epochs: int,
    sparse: bool,
    outcome: HealOutcome,
) -> None:
    """Tune the walk's current layer, in place, if that helps held-out windows."""
    trained = [matrix.parameter for matrix in layer_matrices(walk.model, index)]
    masks = {parameter: kept_zeros(parameter, sparse) for parameter in trained}
    tuned = tune_layer(walk, index, module, masks, target_of, epochs)
    outcome.epochs.append(tuned.epochs)
    if not outcome.ridge[-1]:
        outcome.error_before[-1] = tuned.before
    outcome.error_after[-1] = tuned.after
    log.info(
        "layer %d tuned for %d epochs: error %.3g -> %.3g of the dense states on held-out windows",
        index,
        tuned.epochs,
        tuned.before,
        tuned.after,
    )


def _note(outcome: HealOutcome, text: str) -> None:
    log.warning(text)
    outcome.notes.append(text)


def _check(model: PreTrainedModel, step: Heal, context: StepContext) -> None:
    if any(isinstance(earlier, Heal) for earlier in context.earlier):
        raise ValueError("heal once, as the last step of a plan")
    if context.windows is None:
        raise ValueError("heal needs calibration windows; pass them to apply")
    check_healable(model, context.windows, step.mode)
    if step.mode == "operator":
        _check_operators(model, step, context)


def _check_operators(model: PreTrainedModel, step: Heal, context: StepContext) -> None:
    check_operators(model)
    if not _gaps(step, context, len(decoder_layers(model))):
        raise ValueError(
            f"heal with mode='operator' puts matrices before gaps, and none of layers="
            f"{list(step.layers)} lies before one; take mode='linear'"
        )
    if any(isinstance(other, PruneWidth) and other.leaves_own_class for other in context.earlier):
        raise TypeError(
            "no class describes layers of different widths with matrices at gaps; take "
            "heal='linear'"
        )


def _gaps(step: Heal, context: StepContext, num_layers: int) -> list[int]:
    """Return the layers of a step, counted as in the dense model, behind which layers are gone."""
    ends = dense_ends(context.earlier, num_layers)
    return [layer for layer in step.layers if ends.get(layer, layer) > layer]


def _carry_out(model: PreTrainedModel, step: Heal, context: StepContext) -> HealOutcome:
    assert context.windows is not None  # _check
    assert context.dense is not None  # apply
    _put_operators(model, step, context, len(decoder_layers(context.dense)))
    return heal(
        model,
        context.dense,
        step,
        context.windows,
        ends=dense_ends(context.earlier, len(decoder_layers(context.dense))),
        rotated=any(isinstance(earlier, SliceHidden) for earlier in context.earlier),
        sparse=any(isinstance(earlier, Sparsify) for earlier in context.earlier),
        device=context.device,
        offload=context.offload,
        kept=context.kept_layers(model, step),
    )


def _put_operators(
    model: PreTrainedModel, step: Heal, context: StepContext, num_layers: int
) -> None:
    if step.mode == "operator":
        gaps = _gaps(step, context, num_layers)
        put_gap_operators(model, context.renumber(gaps))


def _rehearse(model: PreTrainedModel, step: Heal, context: StepContext) -> None:
    left = len(decoder_layers(model))
    _put_operators(model, step, context, left + len(context.removed))
    assert all(renumber(layer, context.removed) < left for layer in step.layers)


HEAL = StepKind(
    _check,
    _carry_out,
    follows_slicing=True,
    needs_windows=lambda step: True,
    needs_dense=True,
    keeps_layers=True,
    rehearse=_rehearse,
)
