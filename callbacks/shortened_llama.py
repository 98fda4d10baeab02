"""Shortened LLaMA: remove the decoder layers of lowest importance, at once (arXiv:2402.02834).

Importance is the rise of the loss without a layer ("perplexity"), or the sum over a layer's weights
of |W * dL/dW| ("taylor") or |W| ("magnitude"). For the last two, the paper protects the first and
last layers ("+"). The released code rebuilds the model without each layer. Here the inputs of all
layers are kept, and only the layers above a removed one run again.
"""

from __future__ import annotations

import math
from typing import Literal

from transformers import PreTrainedModel

from prunelight.calibration.windows import Windows
from prunelight.callbacks.base import (
    OWN_CLASS_HEALING,
    DepthHealing,
    PruningCallback,
    check_depth_healing,
)
from prunelight.models.engines import check_engines, engine_patterns, known_engines
from prunelight.models.families.layers import decoder_layers
from prunelight.models.families.matrices import matrices
from prunelight.models.families.removable import removable_layers
from prunelight.planning.layer_choice import check_depth_target, layers_left, layers_to_remove
from prunelight.planning.plan import Plan
from prunelight.planning.steps import RemoveLayers
from prunelight.runtime.arguments import at_least, checked, within
from prunelight.runtime.finite import check_weights
from prunelight.scoring.importance import magnitude_scores, taylor_scores
from prunelight.scoring.model_variants import LazyReplay, VariantReplay, similarities_without

SCORES = ("perplexity", "taylor", "magnitude")

ENDS = [0, 1, 2, 3, -2, -1]  # the paper's, for "taylor" and "magnitude"


class ShortenedLlama(PruningCallback):
    """Remove whole decoder layers by their importance.

    Args:
        ratio: share of the decoder layers to remove, in [0, 1), rounded to whole layers.
        num_layers: how many layers to remove; give either this or ratio.
        score: "perplexity" (rise of the NLL without the layer, in nats), "taylor" or "magnitude".
        protected: layers never to remove; None protects the first four and the last two for
            "taylor" and "magnitude", as the paper does, and no layer for "perplexity".
        offload_activations: keep the hidden states on the CPU, as in `SLEB`.
        loads_in: programs that must read the result as transformers does, as in `ShortGPT`.
        heal: "linear" then fits weights anew, in closed form, to the dense model's hidden states;
            "operator" puts a matrix before each gap as well; "layer" trains whole layers instead,
            one at a time. "mlp" lets one MLP stand in for each run of layers and trains that. What
            "operator" and "mlp" leave needs prunelight to load. See docs/healing.md. All need 2
            calibration windows or more.

    Raises:
        ValueError: if an argument is out of its range.
    """

    @checked(ratio=within(0, 1), num_layers=at_least(0))
    def __init__(
        self,
        ratio: float | None = None,
        num_layers: int | None = None,
        score: Literal["perplexity", "taylor", "magnitude"] = "perplexity",
        protected: list[int] | None = None,
        offload_activations: bool = False,
        loads_in: list[str] | None = None,
        heal: DepthHealing = "none",
    ) -> None:
        check_depth_target(ratio, num_layers)
        check_depth_healing(heal, loads_in=loads_in)
        self.ratio, self.num_layers, self.score = ratio, num_layers, score
        self.protected = None if protected is None else list(protected)
        self.offload_activations = offload_activations
        self.loads_in, self.heal = known_engines(loads_in), heal
        self.drops_sublayers = heal in OWN_CLASS_HEALING

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError if too few layers may be removed, TypeError for quantized weights."""
        self._choose(model, [0.0] * len(decoder_layers(model)))
        if self.score != "perplexity":
            matrices(model)  # raises for quantized weights

    def layers_left(self, total: int) -> int:
        """Return how many decoder layers stay; raise ValueError if too few may be removed."""
        return layers_left(total, self.ratio, self.num_layers, self.protected or ())

    def plan(self, model: PreTrainedModel, windows: Windows) -> Plan:
        """Score the decoder layers and choose which to remove; the model is unchanged.

        Raises:
            ValueError: if the arguments or the windows do not fit the model, or gradients are NaN
                or Inf.
        """
        check_weights(model)
        self.check(model)
        self.check_calibration(model, windows)
        if self.score == "taylor":
            scores = taylor_scores(model, windows)
        elif self.score == "magnitude":
            scores = magnitude_scores(model)
        else:
            total = len(decoder_layers(model))
            variants = VariantReplay(
                model,
                windows,
                "nll",
                device=self.device,
                offload=self.offload_activations,
                expected_forwards=total * (total + 1) // 2,
            )
            with LazyReplay(variants) as replay:
                layers = [*range(total)]
                found = similarities_without(model, windows, "nll", (), layers, replay=replay)
            similarities = [found[layer] for layer in layers]
            # A similarity that underflows to 0 has no logarithm.
            scores = [-math.log(max(similarity, 1e-300)) for similarity in similarities]
        step = RemoveLayers(tuple(self._choose(model, scores)))
        return self.make_plan(model, windows, step, scores={self.score: scores})

    def _choose(self, model: PreTrainedModel, scores: list[float]) -> list[int]:
        protected = self.protected
        if protected is None:
            ends = [] if self.score == "perplexity" else ENDS
            protected = [i for i in ends if -len(scores) <= i < len(scores)]
        count = layers_to_remove(self.ratio, self.num_layers, len(scores))
        removable = removable_layers(model)
        patterns = engine_patterns(model.config, self.loads_in)
        layers = removable.choose(scores, count, protected, patterns)
        check_engines(removable.models.config_without(layers), self.loads_in)
        return layers
