"""Carries out a sparsify step: layer by layer, each on the output of the sparse layers before.

A layer runs twice: the dense layer's inputs give the statistics of all its matrices, as in the
released codes; the sparse layer's output is the input of the next layer. Magnitude needs no data
and runs no layer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunelight.calibration.kept_layers import KeptLayers, holding
from prunelight.calibration.layer_inputs.input_statistics import InputStatistics
from prunelight.calibration.layer_walk import LayerWalk
from prunelight.calibration.statistics import Hessian, InputNorm
from prunelight.calibration.windows import Windows
from prunelight.models.families.architectures import is_sliced
from prunelight.models.families.layers import decoder_layers, layers_path
from prunelight.models.families.matrices import Matrix, layer_matrices, matrices, naming_matrices
from prunelight.models.sizes import zero_share
from prunelight.planning.steps import Sparsify, renumbered
from prunelight.pruning.sparsity.alps import ALPS, alps_stacked
from prunelight.pruning.sparsity.masks import (
    Amount,
    Pattern,
    check_width,
    magnitude_mask,
    wanda_mask,
    wanda_variant_mask,
)
from prunelight.pruning.sparsity.sparsegpt import SparseGPT, sparsegpt_stacked
from prunelight.pruning.sparsity.swaps import swapped_mask
from prunelight.pruning.step_kind import StepContext, StepKind
from prunelight.runtime.arguments import at_least, check_choice, checked_value
from prunelight.runtime.processes import Job, ProcessGroup

log = logging.getLogger(__name__)

_OUTLIER_FACTOR = 5.0  # OWL's M

SOLVERS = ("magnitude", "wanda", "wanda_variant", "sparsegpt", "alps")

# The settings of the solvers that correct weights; they read a Hessian, the others norms.
_SETTINGS: dict[str, type[SparseGPT | ALPS]] = {"sparsegpt": SparseGPT, "alps": ALPS}

SWAPPING = ("wanda", "wanda_variant", "alps")  # solvers whose zeros can be swapped afterwards


@dataclass
class SparsifyOutcome:
    """What a sparsify step did.

    Attributes:
        sparsity: name of a matrix -> its share of zeros now.
        layer_sparsity: share of zeros in all matrices of a decoder layer, one number a layer.
        reconstruction_error: ||Y' - Y||^2 / ||Y - X||^2, one number a decoder layer, with its input
            X, dense output Y and sparse output Y' over the first micro-batch of each process. A
            sliced model divides by ||Y||^2. Empty for magnitude.
        notes: warnings of the run, for its report.
        outliers_kept: share of a layer's outliers that are no zeros now, one number a decoder
            layer. An outlier is a weight with |W| * ||X|| above 5 times the layer's mean, before
            the layer was pruned (OWL, arXiv:2310.05175). Empty for magnitude.
    """

    sparsity: dict[str, float] = field(default_factory=dict)
    layer_sparsity: list[float] = field(default_factory=list)
    reconstruction_error: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    outliers_kept: list[float] = field(default_factory=list)

    def add(self, layer: SparsifyOutcome) -> None:
        """Add what the step did to one more layer."""
        self.sparsity.update(layer.sparsity)
        self.reconstruction_error += layer.reconstruction_error
        self.notes += layer.notes
        self.outliers_kept += layer.outliers_kept


@torch.no_grad()
def sparsify(
    model: PreTrainedModel,
    step: Sparsify,
    windows: Windows | None = None,
    *,
    device: torch.device | None = None,
    offload: bool = False,
    kept: KeptLayers | None = None,
) -> SparsifyOutcome:
    """Put the zeros of a step into a model, in place.

    Args:
        model: its decoder layers are numbered as in the step.
        step: which matrices, how many zeros, by which solver.
        windows: calibration windows; magnitude needs none.
        device: where the layers compute; None takes the model's own.
        offload: keep the calibration states on the CPU.
        kept: gets each layer when it is sparse; those that it has are not pruned again.

    Raises:
        ValueError: if the step does not fit the model, or windows are missing; nothing has changed
            then. Also if activations are NaN or Inf; names the matrix.
        TypeError: if the model's weights are quantized or its layers cannot be run one by one.
    """
    check_step(model, step)
    check_data(step, windows)
    outcome = SparsifyOutcome()
    if step.solver == "magnitude":
        for index, layer in enumerate(decoder_layers(model)):
            with holding(kept, index, layer):
                for matrix in layer_matrices(model, index):
                    if matrix.name in step.sparsity:
                        zero_by_magnitude(matrix, step)
                        _note_zeros(outcome, matrix)
        _note_layers(outcome, model)
        return outcome
    assert windows is not None  # check_data
    with LayerWalk(
        model, windows, device=device, offload=offload, label=f"sparsify ({step.solver})"
    ) as walk:
        if step.solver in _SETTINGS:
            known = matrices(model)
            chosen = [known[name] for name in step.sparsity]
            _note_scarce(chosen, walk.counted(), step.solver, outcome)
        for index, _ in walk.layers(kept):
            part = SparsifyOutcome()
            if kept is not None and index in kept.facts:
                part = SparsifyOutcome(**kept.facts[index])
                walk.advance()
            else:
                sparsify_layer(model, step, walk, index, part)
            outcome.add(part)
            if kept is not None:
                kept.note(index, part)
    _note_layers(outcome, model)
    return outcome


def zero_by_magnitude(matrix: Matrix, step: Sparsify) -> None:
    """Put the zeros of a step into one matrix, its smallest weights, in place.

    Raises:
        ValueError: if a weight is NaN or Inf; names the matrix.
    """
    with naming_matrices(matrix):
        for view in matrix.views():
            view.masked_fill_(magnitude_mask(view, amount_of(step, matrix.name)), 0)


def sparsify_layer(
    model: PreTrainedModel,
    step: Sparsify,
    walk: LayerWalk,
    index: int,
    outcome: SparsifyOutcome,
    *,
    count_outliers: bool = True,
) -> None:
    """Put the zeros of a step into one decoder layer, in place, and walk on to the next layer.

    Args:
        model: the layers before this one are sparse already.
        step: its solver reads data.
        walk: at this layer, inside `walk.layers()`.
        index: of the layer.
        outcome: gets what was done.
        count_outliers: note the share of outliers that were kept, which reads all weights.
    """
    chosen = [m for m in layer_matrices(model, index) if m.name in step.sparsity]
    products = step.solver in _SETTINGS or _swaps_of(step) > 0
    statistic: Callable[[int], InputNorm] = Hessian if products else InputNorm
    inputs = InputStatistics(chosen, statistic)
    before = dense = walk.states[0].to(walk.device)
    for batch in range(len(walk.states) if chosen else 1):
        with inputs.watching(walk.masks[batch]):
            output = walk.forward(batch)
        dense = output if batch == 0 else dense
    inputs.pool(walk.group)
    for matrix in inputs.idle():
        _note(outcome, f"{matrix.name} was not used by any text: pruned by magnitude")
        zero_by_magnitude(matrix, step)
        _note_zeros(outcome, matrix)
    limit = _OUTLIER_FACTOR * _mean_score(inputs) if count_outliers else 0.0
    num_outliers, num_kept = 0, 0
    # Ranks share the solves of a whole layer; a mask is found sooner than sent.
    ranks, groups = walk.group if products else ProcessGroup(), inputs.groups()
    for together in [groups] if ranks.size > 1 else [[group] for group in groups]:
        solved = [matrix for group in together for matrix in group]
        outliers = [_outliers(m, inputs, limit) if count_outliers else [] for m in solved]
        ranks.do_shared([job for group in together for job in _jobs(group, step, inputs, outcome)])
        for matrix, of_views in zip(solved, outliers, strict=True):
            _note_zeros(outcome, matrix)
            for view, places in zip(matrix.views(), of_views, strict=count_outliers):
                num_outliers += len(places[0])
                num_kept += int(view[places].count_nonzero())
    if count_outliers:
        outcome.outliers_kept.append(num_kept / num_outliers if num_outliers else 1.0)
    if index + 1 < len(decoder_layers(model)):
        walk.advance()
        sparse = walk.states[0].to(walk.device)
    else:
        sparse = walk.forward(0)
    real = slice(None) if walk.masks[0] is None else walk.masks[0]
    x, y, pruned = (state[real].float() for state in (before, dense, sparse))
    change = y if is_sliced(model) else y - x  # y of a sliced model has another basis than x
    sums = torch.stack([(pruned - y).square().sum(), change.square().sum()])
    error, scale = walk.group.sum(sums)
    outcome.reconstruction_error.append((error / scale.clamp(min=1e-30)).item())


def _mean_score(inputs: InputStatistics[Any]) -> float:
    """Return the mean of |W| * ||X|| over the matrices of a layer."""
    total, count = 0.0, 0
    for matrix in [matrix for group in inputs.groups() for matrix in group]:
        for view, statistic in zip(matrix.views(), inputs.of(matrix), strict=True):
            norms = statistic.squares.to(view.device).sqrt()  # 0 for an expert without a token
            total += float(view.abs().sum(0, dtype=torch.float32) @ norms)
            count += view.numel()
    return total / max(1, count)


def _outliers(
    matrix: Matrix, inputs: InputStatistics[Any], limit: float
) -> list[tuple[Tensor, ...]]:
    """Return rows and columns of the weights with |W| * ||X|| above a limit, for each view."""
    return [
        (view.abs() * statistic.squares.to(view.device).sqrt() > limit).nonzero(as_tuple=True)
        for view, statistic in zip(matrix.views(), inputs.of(matrix), strict=True)
    ]


def _jobs(
    group: Sequence[Matrix], step: Sparsify, inputs: InputStatistics[Any], outcome: SparsifyOutcome
) -> Iterator[Job]:
    """Yield the solves of matrices that share an input: one, or one for each expert."""
    statistics = inputs.of(group[0])
    unseen = sum(statistic.tokens == 0 for statistic in statistics)
    if unseen:  # experts: every other matrix reads all tokens
        _note(outcome, f"{unseen} experts of {group[0].name} saw no token: pruned by magnitude")
    for position, statistic in enumerate(statistics):
        with naming_matrices(*group):
            statistic.norms()  # raises if an input was NaN or Inf, on all ranks alike
        views = [matrix.views()[position] for matrix in group]
        width = views[0].shape[1]
        # Columns are corrected one after another, by all later ones; the Hessian is factorized.
        cost = width**2 * (width + sum(len(view) for view in views))
        yield Job(float(cost), views, partial(_solve, group, views, statistic, step))


@torch.no_grad()
def _solve(
    group: Sequence[Matrix], views: Sequence[Tensor], statistic: InputNorm, step: Sparsify
) -> None:
    """Prune views of matrices that share an input, in place.

    Raises:
        ValueError: if a weight or an input is NaN or Inf; names the matrices.
    """
    amounts = [amount_of(step, matrix.name) for matrix in group]
    with naming_matrices(*group):
        if step.solver in _SETTINGS:
            hessian = _hessian(statistic).to(views[0].device)
            for view, weight in zip(views, _corrected(step, views, hessian, amounts), strict=True):
                view.copy_(weight)
            return
        norms = statistic.norms().to(views[0].device)
        for view, amount in zip(views, amounts, strict=True):
            pruned = _wanda(step.solver, view, norms, amount)
            if swaps := _swaps_of(step):
                hessian = _hessian(statistic).to(view.device)
                pruned = swapped_mask(view, pruned, hessian, amount, swaps)
            view.masked_fill_(pruned, 0)


def _hessian(statistic: InputNorm) -> Tensor:
    assert isinstance(statistic, Hessian)  # see sparsify_layer
    return statistic.result()


def _corrected(
    step: Sparsify, views: Sequence[Tensor], hessian: Tensor, amounts: Sequence[Amount]
) -> list[Tensor]:
    """Return the weights of a solver that corrects what it keeps; they share an input."""
    settings = _SETTINGS[step.solver](**_own_options(step))
    if isinstance(settings, ALPS):
        return alps_stacked(views, hessian, amounts, settings, swaps=_swaps_of(step))
    return sparsegpt_stacked(views, hessian, amounts, settings)


def _swaps_of(step: Sparsify) -> int:
    """Return the rounds of swaps that a step asks for."""
    return int(step.options.get("swaps", 0))


def _own_options(step: Sparsify) -> dict[str, Any]:
    """Return the options of a step that are its solver's own settings."""
    return {name: value for name, value in step.options.items() if name != "swaps"}


def _wanda(solver: str, view: Tensor, norms: Tensor, amount: Amount) -> Tensor:
    if solver == "wanda_variant":
        assert isinstance(amount, float)  # check_step
        return wanda_variant_mask(view, norms, amount)
    return wanda_mask(view, norms, amount)


def _note_scarce(
    chosen: Sequence[Matrix], tokens: int, solver: str, outcome: SparsifyOutcome
) -> None:
    """Warn of matrices with more inputs than calibration tokens: their Hessians are singular."""
    scarce = [matrix for matrix in chosen if matrix.in_features > tokens]
    if scarce:
        _note(
            outcome,
            f"calibration holds {tokens} tokens, fewer than the {scarce[0].in_features} inputs of "
            f"{scarce[0].name} ({len(scarce)} such matrices): {_SETTINGS[solver].__name__} then "
            "depends on its dampening; calibrate on more text",
        )


def _note_zeros(outcome: SparsifyOutcome, matrix: Matrix) -> None:
    parameter = matrix.parameter
    outcome.sparsity[matrix.name] = 1 - int(parameter.count_nonzero()) / parameter.numel()


def _note_layers(outcome: SparsifyOutcome, model: PreTrainedModel) -> None:
    for index in range(len(decoder_layers(model))):
        parameters = (matrix.parameter for matrix in layer_matrices(model, index))
        outcome.layer_sparsity.append(zero_share(parameters))


def _note(outcome: SparsifyOutcome, text: str) -> None:
    log.warning(text)
    outcome.notes.append(text)


def amount_of(step: Sparsify, name: str) -> Amount:
    """Return the zeros that a step asks of one matrix: a share, or an N:M of its own."""
    share = float(step.sparsity[name])
    if step.pattern is None:
        return share
    of = Pattern.parse(step.pattern).of
    return Pattern(round(of * (1 - share)), of)


def check_data(step: Sparsify, windows: Windows | None) -> None:
    """Check that a step has the data it needs.

    Raises:
        ValueError: if the step needs windows and there are none.
    """
    if windows is None and step.solver != "magnitude":
        raise ValueError(f"solver={step.solver!r} needs calibration windows; pass them to apply")


def check_step(model: PreTrainedModel, step: Sparsify) -> None:
    """Check a sparsify step against a model.

    Raises:
        ValueError: for an unknown matrix, solver or option, a share outside [0, 1), a pattern that
            does not divide a width (named), or a share that the pattern cannot give.
        TypeError: if the weights are quantized.
    """
    check_choice("solver", step.solver, SOLVERS)
    step.check(len(decoder_layers(model)))
    known = matrices(model)
    unknown = [name for name in step.sparsity if name not in known]
    if unknown:
        raise ValueError(
            f"{unknown[0]} is no matrix of the decoder layers of {model.config.model_type}; the "
            f"first one is {next(iter(known), 'missing')}"
        )
    _check_options(step)
    if step.pattern is None:
        return
    pattern = Pattern.parse(str(step.pattern))  # a hand-written plan may hold a number
    if step.solver == "wanda_variant":
        raise ValueError(f"solver='wanda_variant' chooses by rows and knows no pattern={pattern}")
    for name, share in step.sparsity.items():
        check_width(pattern, known[name].in_features, name)
        if abs(pattern.of * share - round(pattern.of * share)) > 1e-6:
            raise ValueError(f"sparsity={share} of {name} is no whole number of {pattern.of}ths")


def _check_options(step: Sparsify) -> None:
    try:
        check_swaps(step.options.get("swaps", 0), step.solver)
    except TypeError as error:  # a plan written by hand
        raise ValueError(str(error)) from error
    own = _own_options(step)
    if kind := _SETTINGS.get(step.solver):
        try:
            kind(**own)
        except TypeError as error:
            raise ValueError(f"options={own} are not those of {kind.__name__}") from error
    elif own:
        raise ValueError(f"options={own} have no effect on solver={step.solver!r}")


def check_swaps(swaps: int, solver: str) -> None:
    """Check rounds of swaps against the solver whose zeros they would improve.

    Raises:
        ValueError: if they are no whole number from 0 on, or have no effect.
    """
    checked_value("swaps", swaps, int, at_least(0))
    if swaps and solver not in SWAPPING:
        raise ValueError(
            f"{swaps=} has no effect with solver={solver!r}; take one of {', '.join(SWAPPING)}"
        )


def _check(model: PreTrainedModel, step: Sparsify, context: StepContext) -> None:
    check_step(model, step)
    check_data(step, context.windows)


def _carry_out(model: PreTrainedModel, step: Sparsify, context: StepContext) -> SparsifyOutcome:
    sparsity = renumbered(step.sparsity, layers_path(model), context.removed)
    return sparsify(
        model,
        replace(step, sparsity=sparsity),
        context.windows,
        device=context.device,
        offload=context.offload,
        kept=context.kept_layers(model, step),
    )


def _rehearse(model: PreTrainedModel, step: Sparsify, context: StepContext) -> None:
    """Check that the matrices are still there, and as wide as the pattern needs."""
    sparsity = renumbered(step.sparsity, layers_path(model), context.removed)
    check_step(model, replace(step, sparsity=sparsity))


SPARSIFY = StepKind(
    _check,
    _carry_out,
    follows_slicing=True,
    needs_windows=lambda step: step.solver != "magnitude",
    rehearse=_rehearse,
    changes_weights=True,
    keeps_layers=True,
)
