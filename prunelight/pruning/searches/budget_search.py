"""The best model that costs no more than a budget, of layers removed and MLPs narrowed.

Layers go in the order of `search_depth`. For some numbers of layers, from none to as many as meet
the budget alone, the rest of the budget is met by fewer neurons in the layers left: equally many in
each, or as the curves of `width_curves.py` say. Each such candidate is carried out on a copy of the
model, healed, and judged by its KL to the dense model on windows that no fit sees. Between the best
number of layers and its neighbours more are tried. Then layers of the best one switch neurons, see
`level_switches.py`, which makes one more candidate. So depth alone and width alone are always among
the candidates, and what is predicted stands beside what was measured.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from transformers import PreTrainedModel

from prunelight.calibration.layer_walk import LayerWalk
from prunelight.calibration.windows import Windows
from prunelight.models.families.layers import layers_path
from prunelight.models.families.removable import RemovableLayers, removable_layers
from prunelight.models.placement import copy_of_same_memory
from prunelight.planning.plan import Plan
from prunelight.planning.steps import RemoveLayers, Step
from prunelight.pruning.apply import apply
from prunelight.pruning.healing.ends import heal_step
from prunelight.pruning.healing.writers import first_writer
from prunelight.pruning.searches.costs import LayerCosts
from prunelight.pruning.searches.depth_search import (
    DepthSearch,
    finite_or_none,
    search_depth,
    search_windows,
)
from prunelight.pruning.searches.healed_variants import HealedVariants
from prunelight.pruning.searches.level_switches import switched_widths
from prunelight.pruning.searches.width_curves import (
    Curve,
    best_widths,
    equal_widths,
    neurons_kept,
    predicted,
    width_curves,
)
from prunelight.runtime.progress import logging_from
from prunelight.scoring.model_variants import VariantReplay
from prunelight.scoring.similarity import divergence_of

log = logging.getLogger(__name__)

_SPLITS = 3  # parts into which the way from no layer to as many as may go is cut at first


@dataclass(frozen=True)
class Candidate:
    """One way to meet a budget.

    Attributes:
        layers: that are removed.
        neurons: layer -> neurons that it keeps; empty where all MLPs stay whole.
        cost: of the model that is left, as a share of the dense model's.
        predicted_kl: sum of what was measured of its parts alone, in nats.
        kl: to the dense model, measured, in nats; inf where states are NaN.
        switched: layers have switched neurons, see `level_switches.py`.
    """

    layers: tuple[int, ...]
    neurons: dict[int, int]
    cost: float
    predicted_kl: float
    kl: float = math.inf
    switched: bool = False

    @property
    def words(self) -> str:
        """What goes, in words."""
        counts = self.neurons.values()
        least, most = min(counts, default=0), max(counts, default=0)
        widths = f"{least}" if least == most else f"{least} to {most}"
        narrow = f", {widths} neurons left in the others" if counts else ""
        narrow += ", switched" if self.switched else ""
        removed = f"{len(self.layers)} layer{'s' * (len(self.layers) != 1)} removed"
        return removed + narrow


@dataclass(frozen=True)
class BudgetSearch:
    """What the search found.

    Attributes:
        steps: of the best candidate, without healing.
        best: the candidate.
        candidates: all that were measured, the best first.
        depth: the search for layers.
        curves: of each layer, see `width_curves`; empty where no MLP can be narrowed.
    """

    steps: tuple[Step, ...]
    best: Candidate
    candidates: list[Candidate]
    depth: DepthSearch
    curves: list[Curve] = field(default_factory=list)

    @property
    def facts(self) -> dict[str, Any]:
        """What a plan keeps of the search; JSON values."""
        rows = [
            {
                "removes": candidate.words,
                "layers": list(candidate.layers),
                "cost": candidate.cost,
                "kl": finite_or_none(candidate.kl),
                "predicted_kl": candidate.predicted_kl,
            }
            for candidate in self.candidates
        ]
        return {
            "cost_left": self.best.cost,
            "kl_of_search": self.best.kl,
            "kl_predicted": self.best.predicted_kl,
            "candidates": rows,
            "depth_order": self.depth.removed,
        }


def most_layers(costs: LayerCosts, budget: float, protected: Sequence[int] = ()) -> int:
    """Return how many layers meet a budget by depth alone, even if the cheapest go; one stays.

    Args:
        costs: of the dense model.
        budget: in the unit of the costs.
        protected: layers that stay.
    """
    total, excess = len(costs.layers), costs.total() - budget
    rounding = 1e-9 * sum(costs.layers) / total
    free = sorted(costs.layers[layer] for layer in range(total) if layer not in protected)
    free = free if protected else free[:-1]
    saved = 0.0
    for count, cost in enumerate(free):
        if saved >= excess - rounding:
            return count
        saved += cost
    return len(free)


def least_cost(costs: LayerCosts, protected: Sequence[int], multiple: int) -> float:
    """Return the least that a model can cost with one layer left, or the protected ones."""
    left = sorted(
        range(len(costs.layers)), key=lambda layer: (layer not in protected, costs.layers[layer])
    )[: max(1, len(protected))]
    removed = [layer for layer in range(len(costs.layers)) if layer not in left]
    kept = {layer: min(multiple, costs.neurons[layer]) for layer in left if costs.neurons[layer]}
    return costs.total(removed, kept)


@torch.no_grad()
def search_budget(
    model: PreTrainedModel,
    windows: Windows,
    costs: LayerCosts,
    budget: float,
    order: Sequence[Sequence[int]],
    *,
    heals: bool,
    by_layer: bool,
    multiple: int,
    protected: Sequence[int] = (),
    device: torch.device | None = None,
    offload: bool = False,
) -> BudgetSearch:
    """Find what to remove; the model is unchanged.

    Args:
        model: the dense model.
        windows: calibration windows, (N, T).
        costs: of its parts.
        budget: the most that the result may cost, in the same unit.
        order: MLP neurons of each layer, the best first; empty where none can be pruned.
        heals: candidates are healed before they are judged, in closed form, if the family has one.
        by_layer: layers may keep different numbers of neurons, which no stock class has.
        multiple: what numbers of neurons are multiples of.
        protected: layers that are not removed.
        device: where the layers compute.
        offload: keep the calibration states on the CPU.

    Raises:
        ValueError: if no candidate meets the budget; names the nearest.
    """
    removable = removable_layers(model)
    count = _most_that_go(removable, most_layers(costs, budget, protected), protected)
    dearest_first = [-cost for cost in costs.layers]
    some = removable.choose(dearest_first, count, protected) if count else []
    if unmet := _unmet(costs, budget, some, multiple if order else None):
        raise ValueError(unmet)
    places: dict[str, Any] = {"device": device, "offload": offload}
    depth = search_depth(
        model,
        windows,
        count,
        may_go=lambda layers: (
            not {*protected} & {*layers} and removable.can_go(layers, count, protected)
        ),
        heals=heals,
        **places,
    )
    fitted, judging = search_windows(windows)
    heals = heals and first_writer(model, windows) is not None
    dense = copy_of_same_memory(model)  # as it is outside the replay, which moves its parts
    with VariantReplay(model, judging, "kl", **places) as judges, ExitStack() as stack:
        variants = HealedVariants(model, fitted, judges, heals=heals, order=order, **places)
        curves: list[Curve] = []
        if order and costs.total() > budget:
            stack.enter_context(variants)
            curves = width_curves(variants, costs.neurons, multiple)
        ways = _Ways(costs, budget, depth, curves, multiple, removable, by_layer=by_layer)
        path = layers_path(model)
        # Healing fits a narrow MLP to the dense states; a correction before it would be undone.
        steps_of = partial(_steps, order=order, correction=not variants.heals_neurons)
        tried: dict[int, Candidate] = {}
        measured: list[Candidate] = []

        def measure(way: Candidate) -> Candidate:
            steps = steps_of(way)
            healing = heal_step(steps, len(costs.layers), path) if heals else []
            kl = _measured(dense, (*steps, *healing), fitted, judging, judges, places)
            done = replace(way, kl=kl)
            log.info(
                "%s: KL %.4f, predicted %.4f; costs %.1f %% of the dense model",
                done.words,
                kl,
                done.predicted_kl,
                100 * done.cost,
            )
            measured.append(done)
            return done

        def measure_all(layers: int) -> None:
            for way in ways.of(layers):
                done = measure(way)
                if layers not in tried or done.kl < tried[layers].kl:
                    tried[layers] = done

        parts = {round(count * part / _SPLITS) for part in range(_SPLITS + 1)}
        for layers in sorted(parts | ways.by_depth_alone()):
            measure_all(layers)
        if not measured:
            raise ValueError(
                _unmet(costs, budget, depth.removed, multiple if order else None)
                or "the family lets none of the layers go that were chosen; set protected"
            )
        best = min(tried, key=lambda layers: tried[layers].kl)
        for layers in _between(best, [*tried]):
            measure_all(layers)
        start = min(measured, key=lambda candidate: candidate.kl)
        if by_layer and start.neurons and math.isfinite(start.kl):
            variants.restore(start.layers)
            kept = switched_widths(variants, start.neurons, curves, costs, budget, multiple)
            if kept != start.neurons:
                measure(ways.switched(start, kept))
    measured.sort(key=lambda candidate: candidate.kl)
    if not math.isfinite(measured[0].kl):
        raise ValueError("every candidate leaves NaN states; load the model in bfloat16 or float32")
    return BudgetSearch(steps_of(measured[0]), measured[0], measured, depth, curves)


def _most_that_go(removable: RemovableLayers, count: int, protected: Sequence[int]) -> int:
    """Return the largest number of layers, up to a count, that the family lets go together."""
    for number in range(count, 0, -1):
        try:
            removable.choose([0.0] * removable.total, number, protected)
        except ValueError:
            continue
        return number
    return 0


class _Ways:
    """The candidates for each number of layers that go."""

    def __init__(
        self,
        costs: LayerCosts,
        budget: float,
        depth: DepthSearch,
        curves: Sequence[Curve],
        multiple: int,
        removable: RemovableLayers,
        *,
        by_layer: bool,
    ) -> None:
        self._costs, self._budget, self._depth = costs, budget, depth
        self._curves, self._multiple, self._removable = curves, multiple, removable
        self._by_layer = by_layer

    def of(self, count: int) -> Iterator[Candidate]:
        """Yield the ways to meet the budget with this number of layers removed."""
        costs, budget, multiple = self._costs, self._budget, self._multiple
        layers = self._removed(count)
        if self._removable.fault(layers):
            return
        if costs.total(layers) <= budget:
            yield self._way(layers, {}, count)
            return
        if not self._curves:
            return
        widths = []
        if not (self._by_layer and layers):  # width alone is always tried so
            widths.append(equal_widths(costs, layers, budget, multiple))
        if self._by_layer:
            widths.append(best_widths(costs, self._curves, layers, budget, multiple))
        for kept in widths:
            if kept is not None:
                yield self._way(layers, kept, count)

    def by_depth_alone(self) -> set[int]:
        """Return the least number of layers that meets the budget without narrow MLPs, if any."""
        costs = self._costs
        counts = range(len(self._depth.removed) + 1)
        fits = (n for n in counts if costs.total(self._removed(n)) <= self._budget)
        return {*islice(fits, 1)}

    def switched(self, start: Candidate, kept: dict[int, int]) -> Candidate:
        """Return a candidate with other numbers of neurons."""
        change = predicted(self._curves, self._costs, kept)
        change -= predicted(self._curves, self._costs, start.neurons)
        return replace(
            start,
            neurons=kept,
            cost=self._costs.total(start.layers, kept) / self._costs.total(),
            predicted_kl=start.predicted_kl + change,
            switched=True,
            kl=math.inf,
        )

    def _removed(self, count: int) -> tuple[int, ...]:
        """Return so many layers: all that the search chose, or those that went first."""
        depth = self._depth
        whole = count == len(depth.removed)
        return tuple(sorted(depth.removed if whole else [x for x, _ in depth.path[:count]]))

    def _way(self, layers: tuple[int, ...], kept: dict[int, int], count: int) -> Candidate:
        depth = self._depth
        whole = count == len(depth.removed)
        kl = depth.divergence if whole else depth.path[count - 1][1] if count else 0.0
        return Candidate(
            layers,
            kept,
            self._costs.total(layers, kept) / self._costs.total(),
            kl + predicted(self._curves, self._costs, kept),
        )


def _steps(way: Candidate, *, order: Sequence[Sequence[int]], correction: bool) -> tuple[Step, ...]:
    steps: list[Step] = []
    if way.layers or not way.neurons:
        steps.append(RemoveLayers(way.layers))
    if way.neurons:
        steps.append(neurons_kept(order, way.neurons, correction=correction))
    return tuple(steps)


def _between(best: int, tried: Sequence[int]) -> list[int]:
    """Return the numbers half way between the best one and those tried beside it."""
    below = max((x for x in tried if x < best), default=best)
    above = min((x for x in tried if x > best), default=best)
    return sorted({(below + best) // 2, (best + above + 1) // 2} - {*tried})


def _measured(
    dense: PreTrainedModel,
    steps: tuple[Step, ...],
    fitted: Windows,
    judging: Windows,
    judges: VariantReplay,
    places: dict[str, Any],
) -> float:
    """Return the KL to the dense model, in nats, of a copy on which steps were carried out."""
    plan = Plan("", {}, {}, steps)
    # Lines for each matrix, and warnings of the few windows of the search, are the last apply's.
    with logging_from("prunelight.pruning", logging.ERROR):
        pruned = apply(copy.deepcopy(dense), plan, fitted, strict=False, **places)
    with LayerWalk(pruned, judging, **places) as walk:
        for _ in walk.layers():
            walk.advance()
        return divergence_of(judges.similarity_of(walk.states))


def _unmet(costs: LayerCosts, budget: float, removed: Sequence[int], multiple: int | None) -> str:
    """Return why a budget cannot be met with these layers removed; "" if it can.

    Args:
        costs: of the dense model.
        budget: in the same unit.
        removed: as many layers as may go.
        multiple: the fewest neurons of an MLP; None where MLPs stay whole.
    """
    fewest = {
        layer: count if multiple is None else min(count, multiple)
        for layer, count in enumerate(costs.neurons)
    }
    least = costs.total(removed, fewest)
    if least <= budget:
        return ""
    narrow = "" if multiple is None else f" and {multiple} neurons in each MLP that is left"
    return (
        f"budget={budget / costs.total():.3g} cannot be met: with {len(removed)} layers removed, "
        f"as many as the family lets go,{narrow} {least / costs.total():.3g} of the dense model is "
        "left; take a larger budget"
    )
