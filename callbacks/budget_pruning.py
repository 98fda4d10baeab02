"""BudgetPruning: our own planner. A budget is given, and what to remove is found by trying.

Depth, width, or some of both: which of them costs a model least differs from one to the next, and
with the budget. Every way is carried out on a copy, healed, and judged by its KL to the dense model
on windows that no fit sees; see prunelight/pruning/searches/budget_search.py.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from prunelight.calibration.windows import Windows
from prunelight.callbacks.base import Healing, PruningCallback
from prunelight.callbacks.width_pruning import FIELDS, PER_LAYER
from prunelight.evaluation.serving.by_layer import (
    cache_bytes_by_layer,
    measure_latency_table,
    read_latency_table,
)
from prunelight.models.families.layers import decoder_layers
from prunelight.planning.layer_choice import resolve_indices
from prunelight.planning.plan import Plan
from prunelight.pruning.searches.budget_search import Candidate, least_cost, search_budget
from prunelight.pruning.searches.costs import LayerCosts, byte_costs, parameter_costs, time_costs
from prunelight.pruning.searches.depth_search import search_windows
from prunelight.runtime.arguments import at_least, checked, within
from prunelight.runtime.finite import check_weights
from prunelight.scoring.width_scores import width_scores


class BudgetPruning(PruningCallback):
    """Remove layers and MLP neurons until a model costs a share of the dense one.

    Args:
        budget: the most that is left, as a share of the dense model, in [0, 1): 0.75 removes a
            quarter.
        metric: what is counted. "parameters" are all, embeddings included. "memory" is that of the
            weights as they are stored, and of the cache of one sequence. "latency" is the time of
            one step of decoding at batch 1 where the model computes; that of an MLP is taken to go
            with its neurons.
        allocation: "uniform" leaves equally many neurons in each layer: a stock class. "by_layer"
            also tries other numbers for each, by what was measured of each layer alone; such a
            model needs prunelight to load. "none" removes layers alone.
        heal: "linear" fits weights anew, in closed form, in every way that is tried and in the end,
            see docs/healing.md. "layer" trains layers too, in the end. "none" does neither.
        protected: layers never to remove; negative indices count from the end.
        multiple: what numbers of neurons are multiples of, for fast kernels.
        cache_tokens: of metric="memory": length of the sequence in the cache; None for 2048, or as
            many as the model allows.
        latency_table: of metric="latency": a JSON file with times, or a plan that was made with
            them; None times the model.
        export_remote_code: put the code of its class beside a result whose widths differ, which
            then loads without prunelight under trust_remote_code.
        offload_activations: keep the hidden states on the CPU.

    Raises:
        ValueError: if an argument is out of its range or has no effect.
    """

    @checked(budget=within(0, 1), multiple=at_least(1), cache_tokens=at_least(1))
    def __init__(
        self,
        budget: float = 0.75,
        metric: Literal["parameters", "memory", "latency"] = "parameters",
        allocation: Literal["uniform", "by_layer", "none"] = "uniform",
        heal: Healing = "linear",
        protected: list[int] | None = None,
        multiple: int = 64,
        cache_tokens: int | None = None,
        latency_table: str | None = None,
        export_remote_code: bool = False,
        offload_activations: bool = False,
    ) -> None:
        for name, value, only in (
            ("cache_tokens", cache_tokens, "memory"),
            ("latency_table", latency_table, "latency"),
        ):
            if value is not None and metric != only:
                raise ValueError(
                    f"{name}={value} has no effect with metric={metric!r}; leave it out, or set "
                    f"metric={only!r}"
                )
        if export_remote_code and allocation != "by_layer":
            raise ValueError(
                f"export_remote_code=True has no effect with {allocation=}, which leaves a "
                "stock class; leave it out"
            )
        self.budget, self.metric, self.allocation = budget, metric, allocation
        self.heal = heal
        self.protected = list(protected or [])
        self.multiple, self.cache_tokens = multiple, cache_tokens
        self.latency_table, self.export_remote_code = latency_table, export_remote_code
        self.offload_activations = offload_activations

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError if no plan reaches the budget; names the nearest."""
        if self.latency_table is not None:
            read_latency_table(self.latency_table, model)
        self._protected(model)
        if self.metric == "parameters":  # a cache and times need the model to run: see `plan`
            self._check_budget(model, parameter_costs(model))

    def check_calibration(self, model: PreTrainedModel, windows: Windows) -> None:
        """Raise ValueError if the windows do not suffice to fit and to judge."""
        super().check_calibration(model, windows)
        search_windows(windows, fewest_fitted=1 if self.heal == "none" else 2)

    @torch.no_grad()
    def plan(self, model: PreTrainedModel, windows: Windows) -> Plan:
        """Find what to remove; the model is unchanged.

        Raises:
            ValueError: if the arguments or the windows do not fit the model, or no plan reaches the
                budget.
            TypeError: if the model's layers cannot be run one by one, or healed.
        """
        check_weights(model)
        self.check(model)
        self.check_calibration(model, windows)
        costs, facts = self._costs(model)
        self._check_budget(model, costs)
        order: list[list[int]] = []
        if self._narrows(costs):
            scores = width_scores(model, windows, "wanda", ["neurons"])["neurons"]
            order = [score.argsort(descending=True, stable=True).tolist() for score in scores]
        search = search_budget(
            model,
            windows,
            costs,
            self.budget * costs.total(),
            order,
            heals=self.heal != "none",
            by_layer=self.allocation == "by_layer",
            multiple=self.multiple,
            protected=self._protected(model),
            device=self.device,
            offload=self.offload_activations,
        )
        curves = {
            f"kl_narrowed_{place + 1}": [curve[place + 1][1] for curve in search.curves]
            for place in range(min(map(len, search.curves), default=1) - 1)
        }
        first_round = search.depth.first_round
        scores_of = {"kl_without": first_round} if any(first_round) else {}
        return self.make_plan(
            model,
            windows,
            *search.steps,
            scores={**scores_of, **curves},
            found={**search.facts, **self._widths_found(costs, search.best), **facts},
        )

    def _costs(self, model: PreTrainedModel) -> tuple[LayerCosts, dict[str, Any]]:
        """Return the costs of the model's parts, and what the plan keeps of how they were found."""
        if self.metric == "parameters":
            return parameter_costs(model), {}
        if self.metric == "memory":
            return byte_costs(model, cache_bytes_by_layer(model, self.cache_tokens)), {}
        table = (
            measure_latency_table(model)
            if self.latency_table is None
            else read_latency_table(self.latency_table, model)
        )
        costs = time_costs(model, table.rest, table.layers, table.mlps)
        return costs, {"latency_table": table.to_dict()}

    def _widths_found(self, costs: LayerCosts, best: Candidate) -> dict[str, Any]:
        """Return the neurons that layers keep, as `WidthPruning` tells them."""
        if not best.neurons:
            return {}
        field = FIELDS["neurons"]
        kept = [best.neurons.get(layer, 0) for layer in range(len(costs.layers))]
        equal = len({*best.neurons.values()}) == 1
        widths = {field: max(kept)} if equal else {PER_LAYER[field]: kept}
        return {**widths, f"{field}_before": max(costs.neurons)}

    def _check_budget(self, model: PreTrainedModel, costs: LayerCosts) -> None:
        multiple = self.multiple if self._narrows(costs) else max(costs.neurons)
        least = least_cost(costs, self._protected(model), max(1, multiple)) / costs.total()
        if least >= 1:
            raise ValueError(
                f"budget={self.budget} of the {self.metric} cannot be met: nothing may go with "
                f"allocation={self.allocation!r} and protected={self.protected}; protect fewer"
            )
        if self.budget < least:
            raise ValueError(
                f"budget={self.budget} of the {self.metric} cannot be met: the least that can be "
                f"left is {least:.3f}; take {math.ceil(1000 * least) / 1000} or more"
            )

    def _narrows(self, costs: LayerCosts) -> bool:
        return self.allocation != "none" and min(costs.neurons) > 0

    def _protected(self, model: PreTrainedModel) -> list[int]:
        return sorted(resolve_indices(self.protected, len(decoder_layers(model))))
