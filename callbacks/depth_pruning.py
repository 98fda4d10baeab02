"""DepthPruning: our own depth method. Layers go one by one, each time as the healed model needs it.

Block Influence and the losses of Shortened LLaMA or SLEB look at a model that has lost a layer and
nothing else. But the layer before a gap can be fitted to what the dense model hands on after it,
see docs/healing.md, and which layers can go then is another question. Here each candidate is
healed before it is judged, by the KL to the dense model on windows that no fit sees.
"""

from __future__ import annotations

from typing import Literal

import torch
from transformers import PreTrainedModel

from prunelight.calibration.windows import Windows
from prunelight.callbacks.base import (
    OWN_CLASS_HEALING,
    PruningCallback,
    check_depth_healing,
)
from prunelight.models.families.layers import decoder_layers
from prunelight.models.families.removable import removable_layers
from prunelight.models.sizes import depth_unit_sizes, parameter_count
from prunelight.planning.layer_choice import (
    check_one_target,
    layers_for_parameters,
    layers_left,
    layers_to_remove,
    resolve_indices,
)
from prunelight.planning.plan import Plan
from prunelight.planning.steps import RemoveLayers
from prunelight.pruning.searches.depth_search import search_depth, search_windows
from prunelight.runtime.arguments import at_least, checked, within
from prunelight.runtime.finite import check_weights


class DepthPruning(PruningCallback):
    """Remove whole decoder layers greedily, judged after healing.

    Args:
        num_layers: how many layers to remove. Give exactly one of the first three.
        ratio: share of the decoder layers to remove, in [0, 1), rounded to whole layers.
        parameter_ratio: share of all parameters to remove, embeddings included, in [0, 1): the
            nearest whole number of layers.
        heal: "linear" fits the layer before each gap anew, during the search and after it, see
            docs/healing.md. After the search "operator" puts a matrix before each gap as well, with
            which the model needs prunelight to load; "layer" trains the layer before it. "none"
            searches and prunes without.
        protected: layers never to remove; negative indices count from the end.
        look_back: in the end put each removed layer back once, and let another go instead where
            that is better.
        offload_activations: keep the hidden states on the CPU: those of the windows of the search,
            one of four, before each layer, twice.

    Raises:
        ValueError: if an argument is out of its range.
    """

    @checked(num_layers=at_least(0), ratio=within(0, 1), parameter_ratio=within(0, 1))
    def __init__(
        self,
        num_layers: int | None = None,
        ratio: float | None = None,
        parameter_ratio: float | None = None,
        heal: Literal["none", "linear", "operator", "layer"] = "linear",
        protected: list[int] | None = None,
        look_back: bool = True,
        offload_activations: bool = False,
    ) -> None:
        check_one_target(
            {"num_layers": num_layers, "ratio": ratio, "parameter_ratio": parameter_ratio}
        )
        check_depth_healing(heal, parameter_ratio=parameter_ratio)
        self.num_layers, self.ratio, self.parameter_ratio = num_layers, ratio, parameter_ratio
        self.drops_sublayers = heal in OWN_CLASS_HEALING
        self.heal, self.look_back = heal, look_back
        self.protected = list(protected or [])
        self.offload_activations = offload_activations

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError if too few layers may be removed."""
        total = len(decoder_layers(model))
        removable_layers(model).choose([0.0] * total, self._count(model), self.protected)

    def layers_left(self, total: int) -> int:
        """Return how many decoder layers stay; raise ValueError if too few may be removed."""
        if self.parameter_ratio is not None:
            return total  # the share of parameters is known once the model is
        return layers_left(total, self.ratio, self.num_layers, self.protected)

    def check_calibration(self, model: PreTrainedModel, windows: Windows) -> None:
        """Raise ValueError if the windows do not suffice to fit and to judge."""
        super().check_calibration(model, windows)
        search_windows(windows)

    @torch.no_grad()
    def plan(self, model: PreTrainedModel, windows: Windows) -> Plan:
        """Choose the layers to remove; the model is unchanged.

        Raises:
            ValueError: if the arguments or the windows do not fit the model.
            TypeError: if the model's layers cannot be run one by one, or healed.
        """
        check_weights(model)
        self.check(model)
        self.check_calibration(model, windows)
        count, removable = self._count(model), removable_layers(model)
        protected = resolve_indices(self.protected, len(decoder_layers(model)))
        search = search_depth(
            model,
            windows,
            count,
            may_go=lambda layers: (
                not protected & {*layers} and removable.can_go(layers, count, protected)
            ),
            heals=self.heal != "none",
            look_back=self.look_back,
            device=self.device,
            offload=self.offload_activations,
        )
        return self.make_plan(
            model,
            windows,
            RemoveLayers(tuple(search.removed)),
            scores={"kl_without": search.first_round} if count else {},
            found={
                "order": search.removed,
                "exchanges": [list(pair) for pair in search.exchanges],
                "kl_of_search": search.divergence,
                "search_forwards": search.forwards,
            },
        )

    def _count(self, model: PreTrainedModel) -> int:
        """Return how many layers to remove."""
        if self.parameter_ratio is not None:
            sizes = depth_unit_sizes(model, "layer")
            return layers_for_parameters(self.parameter_ratio, sizes, parameter_count(model))
        return layers_to_remove(self.ratio, self.num_layers, len(decoder_layers(model)))
