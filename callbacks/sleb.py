"""SLEB: remove decoder layers one by one, each time the least important one (arXiv:2402.09025).

After each removal, the model is measured again without each of the remaining layers. The released
code runs the whole model for each candidate. Here the layers below a candidate run only once.
"""

from __future__ import annotations

import math
from operator import itemgetter
from typing import Literal

import torch
from transformers import PreTrainedModel

from prunelight.calibration.windows import Windows
from prunelight.callbacks.base import OWN_CLASS_HEALING, DepthHealing, PruningCallback
from prunelight.models.families.layers import decoder_layers
from prunelight.models.families.removable import removable_layers
from prunelight.planning.layer_choice import (
    check_depth_target,
    layers_left,
    layers_to_remove,
    resolve_indices,
)
from prunelight.planning.plan import Plan
from prunelight.planning.steps import RemoveLayers
from prunelight.runtime.arguments import at_least, checked, within
from prunelight.runtime.finite import check_weights
from prunelight.scoring.model_variants import LazyReplay, VariantReplay, similarities_without


class SLEB(PruningCallback):
    """Remove whole decoder layers greedily.

    Args:
        ratio: share of the decoder layers to remove, in [0, 1), rounded to whole layers.
        num_layers: how many layers to remove; give either this or ratio.
        criterion: similarity to the dense model that a removal should keep high: "nll" (the
            paper), "kl", "cosine", "cka" or "cosine_flat", as in `SlidingLayerMerging`.
        protected: layers never to remove; the paper spares the first and the last.
        offload_activations: keep the hidden states on the CPU: num_samples * seq_len * hidden_size
            * (layers + 1) numbers.
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
        criterion: Literal["cosine", "cka", "kl", "nll", "cosine_flat"] = "nll",
        protected: list[int] | None = None,
        offload_activations: bool = False,
        heal: DepthHealing = "none",
    ) -> None:
        check_depth_target(ratio, num_layers)
        self.ratio, self.num_layers, self.criterion = ratio, num_layers, criterion
        self.protected = [0, -1] if protected is None else list(protected)
        self.offload_activations, self.heal = offload_activations, heal
        self.drops_sublayers = heal in OWN_CLASS_HEALING

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError if too few layers may be removed, or layers depend on each other."""
        total = len(decoder_layers(model))
        count = layers_to_remove(self.ratio, self.num_layers, total)
        removable_layers(model).choose([0.0] * total, count, self.protected)

    def layers_left(self, total: int) -> int:
        """Return how many decoder layers stay; raise ValueError if too few may be removed."""
        return layers_left(total, self.ratio, self.num_layers, self.protected)

    @torch.no_grad()
    def plan(self, model: PreTrainedModel, windows: Windows) -> Plan:
        """Choose the layers to remove; the model is unchanged.

        Raises:
            ValueError: if the arguments or the windows do not fit the model.
            TypeError: if the model's layers cannot be run one by one.
        """
        check_weights(model)
        self.check(model)
        self.check_calibration(model, windows)
        total = len(decoder_layers(model))
        count = layers_to_remove(self.ratio, self.num_layers, total)
        protected = resolve_indices(self.protected, total)
        removable = removable_layers(model)
        removed: list[int] = []
        first_round: dict[int, float] = {}  # layer -> similarity without the layer, in round one
        similarity = 1.0
        # A variant of n layers without layer i takes n - 1 - i forwards; the model itself, all.
        forwards = total + sum(n * (n - 1) // 2 + n for n in range(total - count + 1, total + 1))
        variants = VariantReplay(
            model,
            windows,
            self.criterion,
            device=self.device,
            offload=self.offload_activations,
            expected_forwards=forwards,
        )
        with LazyReplay(variants) as replay:
            for _ in range(count):
                candidates = [
                    layer
                    for layer in range(total)
                    if layer not in protected and layer not in removed
                    if removable.can_go([*removed, layer], count, protected)
                ]
                scores = similarities_without(
                    model, windows, self.criterion, (*removed,), candidates, replay=replay
                )
                best, similarity = max(scores.items(), key=itemgetter(1))
                if not math.isfinite(similarity):
                    raise ValueError(
                        f"no {len(removed) + 1}. layer can be removed: every choice leaves NaN "
                        "states; load the model in bfloat16 or float32"
                    )
                first_round = first_round or {
                    i: score for i, score in scores.items() if math.isfinite(score)
                }
                removed.append(best)
            forwards = replay.layer_forwards
        without = [first_round.get(i) for i in range(total)]
        return self.make_plan(
            model,
            windows,
            RemoveLayers(tuple(removed)),
            scores={"similarity_without": without} if first_round else {},
            found={"order": removed, "similarity": similarity, "layer_forwards": forwards},
        )
