"""Which argument of a method removes a share of all parameters: found by counting, not by trying.

Layers, neurons and widths come in whole numbers. So each method has a ladder of choices, with the
share of all parameters that each removes, and the nearest choice is taken. In a series of methods a
later one makes up for what earlier ones rounded. The table of a comparison gives the share that was
counted on the pruned model.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from transformers import PreTrainedModel

from prunelight.callbacks.base import PruningCallback
from prunelight.callbacks.slicegpt import SliceGPT
from prunelight.comparison.methods import OWN_RATIOS, Entrant, Series
from prunelight.models.families.layers import decoder_layers
from prunelight.models.families.removable import removable_layers
from prunelight.models.placement import copy_without_values
from prunelight.models.sizes import depth_unit_sizes, parameter_count
from prunelight.pruning.remove_layers import remove_layers
from prunelight.pruning.slicing.shared_rotation import shared_parameters
from prunelight.pruning.slicing.slice_hidden import check_sliceable
from prunelight.pruning.slicing.targets import allowed_widths, residual_dims, sliced_parameters
from prunelight.scoring.width_scores import (
    allowed_groups,
    projection_parts,
    unit_size,
    widths_of,
)

STEP = 0.01  # between shares that need no whole number
NEAR_ENOUGH = 0.75  # of a target that is out of reach: what is taken instead


@dataclass(frozen=True)
class Rung:
    """A choice on the ladder of a method.

    Attributes:
        arguments: of the method; of the first one, in a series.
        share: of all parameters that this removes; of zeros, for a method that puts zeros.
        then: arguments of the later methods of a series.
    """

    arguments: dict[str, Any]
    share: float
    then: tuple[dict[str, Any], ...] = ()


def callbacks_of(entrant: Entrant | Series, rung: Rung) -> list[PruningCallback]:
    """Return the methods of a row, made for a choice."""
    each = (rung.arguments, *rung.then)
    return [part.make(given) for part, given in zip(entrant.parts, each, strict=True)]


class Outlines:
    """A model with fewer decoder layers, without values: on the meta device, to count on.

    Args:
        model: that is not changed.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.total = model, len(decoder_layers(model))
        self._known = {self.total: model}

    def of(self, num_layers: int, protected: Sequence[int] | None = None) -> PreTrainedModel:
        """Return the model with so many layers; those of `protected` stay."""
        if num_layers not in self._known:
            self._known[num_layers] = shorter(self.model, num_layers, protected)
        return self._known[num_layers]


def check_rung(entrant: Entrant | Series, rung: Rung, outlines: Outlines) -> None:
    """Check each method of a row against the model that it will find.

    Args:
        entrant: the row.
        rung: its choice.
        outlines: of the dense model.

    Raises:
        ValueError, TypeError: if one cannot prune it so.
    """
    left = outlines.total
    for part, method in zip(entrant.parts, callbacks_of(entrant, rung), strict=True):
        method.check(outlines.of(left, part.arguments.get("protected")))
        left = method.layers_left(left)


def own_amount(entrant: Entrant | Series) -> Rung:
    """Return the choice of a row whose own arguments say how much it removes."""
    return Rung({}, 0.0, ({},) * (len(entrant.parts) - 1))


def nearest(entrant: Entrant | Series, model: PreTrainedModel, target: float) -> Rung:
    """Return the choice whose share is nearest to a target; of equal ones, the smaller.

    Args:
        entrant: the method.
        model: the dense model.
        target: share of all parameters to remove, or of zeros.

    Raises:
        ValueError, TypeError: if the method cannot prune this model, or not so far.
    """
    if isinstance(entrant, Series):
        return _nearest_of_series(entrant, Outlines(model), target)
    if entrant.puts_zeros:
        return Rung({"sparsity": target}, target)
    if _meets_parameters(entrant):
        return Rung({"parameter_ratio": target}, target)
    if entrant.kind == "budget":
        return _budget(target)
    return _nearest_rung(entrant, ladder(entrant, model), target)


def _nearest_rung(entrant: Entrant, rungs: Sequence[Rung], target: float) -> Rung:
    best = min(rungs, key=lambda rung: (abs(rung.share - target), rung.share))
    if best.share < NEAR_ENOUGH * target and best is rungs[-1]:
        raise ValueError(
            f"{entrant.label} can remove at most {best.share:.1%} of the parameters of this model, "
            f"not {target:.1%}; lower the amount"
        )
    return best


def _nearest_of_series(series: Series, outlines: Outlines, target: float) -> Rung:
    """Return the choices of a series, each counted on the model that the earlier ones leave."""
    left, gone, aim, chosen = outlines.model, 0.0, 0.0, []
    for part, share in zip(series.parts, series.share, strict=True):
        last = part is series.parts[-1]
        aim = target if last else aim + share * target
        wanted = (aim - gone) / (1 - gone)  # of the model that this part finds
        if part.removes_layers:
            # Layers are shares of the decoder's weights where zeros are, of all parameters else.
            whole = sum(depth_unit_sizes(left)) if series.puts_zeros else parameter_count(left)
            scale = parameter_count(left) / whole
            rungs = [Rung(r.arguments, r.share * scale) for r in ladder(part, left)]
            if wanted < rungs[0].share / 2:
                raise ValueError(
                    f"{part.label} gets {wanted:.1%} to remove in {series.label}, less than half "
                    f"of one decoder layer ({rungs[0].share:.1%}); raise the amount or its share"
                )
            rung = _nearest_rung(part, rungs, wanted)
        elif wanted <= 0:
            raise ValueError(
                f"nothing is left for {part.label} in {series.label}: whole layers before it "
                f"remove {gone:.1%} of {target:.1%}; raise the amount or its share"
            )
        else:
            rung = nearest(part, left, wanted)
        chosen.append(rung.arguments)
        gone += rung.share * (1 - gone)
        if not last:
            count = len(decoder_layers(left)) - rung.arguments["num_layers"]
            left = outlines.of(count, part.arguments.get("protected"))
    return Rung(chosen[0], gone, tuple(chosen[1:]))


def shorter(
    model: PreTrainedModel, num_layers: int, protected: Sequence[int] | None = None
) -> PreTrainedModel:
    """Return the model with fewer decoder layers, without values: on the meta device, to count on.

    Args:
        model: that is not changed.
        num_layers: that stay.
        protected: layers that must stay.
    """
    left = copy_without_values(model)
    total = len(decoder_layers(left))
    alike = [0.0] * total
    remove_layers(left, removable_layers(left).choose(alike, total - num_layers, protected or []))
    return left


def own_ratio(entrant: Entrant | Series, share: float) -> Rung:
    """Return the choice that a method is asked for where amounts are shares of its own measure.

    Args:
        entrant: the method.
        share: of the decoder layers, of the hidden width, of the neurons, or of zeros.

    Raises:
        ValueError: if the method has no argument for such a share.
    """
    if isinstance(entrant, Series):
        raise ValueError(
            f"{entrant.label} holds several callbacks, each with a measure of its own; compare it "
            "with equal='parameters'"
        )
    name = OWN_RATIOS.get(entrant.kind, "ratio")
    if name not in inspect.signature(entrant.made).parameters:
        raise ValueError(
            f"{entrant.label} has no argument {name} to be asked by; compare it with "
            "equal='parameters'"
        )
    return Rung({name: share}, share)


def ladder(entrant: Entrant | Series, model: PreTrainedModel) -> list[Rung]:
    """Return all choices of a method for a model, from the least to the most that it removes.

    Raises:
        ValueError, TypeError: if the method cannot prune this model, or there is no choice.
    """
    if isinstance(entrant, Series):
        rungs = _of_series(entrant, model)
    elif entrant.puts_zeros:
        rungs = [Rung({"sparsity": share}, share) for share in _shares(0.95)]
    elif _meets_parameters(entrant):
        rungs = [Rung({"parameter_ratio": share}, share) for share in _shares(0.9)]
    elif entrant.kind == "budget":
        rungs = [*map(_budget, _shares(0.9))]
    elif entrant.kind == "depth":
        rungs = [*_depth(entrant, model)]
    elif entrant.kind == "width":
        rungs = [*_width(entrant, model)]
    else:
        rungs = [*_slicing(entrant, model)]
    rungs = sorted((rung for rung in rungs if rung.share > 0), key=lambda rung: rung.share)
    if not rungs:
        raise ValueError(f"{entrant.label} cannot make this model smaller")
    return rungs


def _of_series(series: Series, model: PreTrainedModel) -> list[Rung]:
    """Return the choices of a series at shares in small steps, each once.

    Raises:
        ValueError, TypeError: that of the last step, if there is no choice.
    """
    outlines, found = Outlines(model), dict[str, Rung]()
    fault: ValueError | TypeError | None = None
    for share in _shares(0.9):
        try:
            rung = _nearest_of_series(series, outlines, share)
        except (ValueError, TypeError) as error:
            fault = error
            continue
        found.setdefault(repr((rung.arguments, rung.then)), rung)
    if fault is not None and not found:
        raise fault
    return [*found.values()]


def _shares(most: float) -> list[float]:
    return [round(STEP * number, 6) for number in range(1, round(most / STEP) + 1)]


def _budget(share: float) -> Rung:
    """Return the choice of a method that is given what is left, and finds what to remove."""
    return Rung({"budget": round(1 - share, 6)}, share)


def _meets_parameters(entrant: Entrant) -> bool:
    """Whether a slicing finds its widths for a share of parameters by itself, in small steps."""
    return entrant.kind == "slicing" and not issubclass(entrant.made, SliceGPT)


def _depth(entrant: Entrant, model: PreTrainedModel) -> Iterator[Rung]:
    """Yield numbers of decoder layers, or of sublayers, all of their mean size."""
    sizes = depth_unit_sizes(model, entrant.arguments.get("granularity", "layer"))
    total = parameter_count(model)
    for number in range(1, len(sizes)):
        yield Rung({"num_layers": number}, number * fmean(sizes) / total)


def _width(entrant: Entrant, model: PreTrainedModel) -> Iterator[Rung]:
    """Yield numbers of MLP neurons; heads go as the config says, beside them."""
    total, before = parameter_count(model), widths_of(model)
    method = entrant.make({"neuron_ratio": 0.0})
    multiple = getattr(method, "multiple", 1)
    parts = [projection_parts(model, i, widths) for i, widths in enumerate(before)]
    if not parts[0]["neurons"]:
        raise TypeError(f"{model.config.model_type} has experts, whose neurons cannot be pruned")

    sizes = {kind: [unit_size(part[kind]) for part in parts] for kind in ("heads", "neurons")}
    layers_of: Any = getattr(method, "pruned_layers", lambda model: range(len(before)))
    pruned = layers_of(model)
    skips = len(pruned) < len(before)
    removed_heads = 0.0
    wanted: Any = getattr(method, "num_key_value_heads", None), getattr(method, "head_ratio", None)
    if wanted != (None, None):
        groups = [widths.groups for widths in before]
        kept = wanted[0] or fmean(groups) * (1 - wanted[1])
        if skips:  # the others lose more
            own = [groups[i] for i in pruned]
            kept = (kept * len(groups) - sum(groups) + sum(own)) / len(pruned)
        if getattr(method, "allocation", "uniform") == "uniform":
            allowed = range(1, min(groups) + 1) if skips else allowed_groups(model)
            kept = min(allowed, key=lambda count: abs(count - kept))
        removed_heads = sum((groups[i] - kept) * sizes["heads"][i] for i in pruned)
    neurons = [widths.neurons for widths in before]
    for blocks in range(1, min(neurons[i] for i in pruned) // multiple + 1):
        kept = blocks * multiple
        removed = sum((neurons[i] - kept) * sizes["neurons"][i] for i in pruned)
        ratio = sum(neurons[i] - kept for i in pruned) / sum(neurons)
        if 0 <= ratio < 1:
            yield Rung({"neuron_ratio": ratio}, (removed + removed_heads) / total)


def _slicing(entrant: Entrant, model: PreTrainedModel) -> Iterator[Rung]:
    """Yield widths of SliceGPT."""
    check_sliceable(model)
    method: Any = entrant.make({"slice_ratio": 0.0})
    hidden, total = model.config.hidden_size, parameter_count(model)
    layers = model.config.num_hidden_layers
    shared = method.rotation == "shared"
    widths = (
        allowed_widths(model, method.round_to)
        if shared
        else range(method.round_to, hidden + 1, method.round_to)
    )
    for width in widths:
        if shared:
            left = shared_parameters(model, width)
        else:
            left = sliced_parameters(
                model, residual_dims(model, [width] * layers, method.embedding)
            )
        yield Rung({"slice_ratio": 1 - width / hidden}, 1 - left / total)
