"""SLEB: remove decoder layers one by one, each the one that is missed least (arXiv:2402.09025).

After each removal all layers that are left are measured again, without those that are gone. The
released code runs the whole model for each candidate; here the layers below it are run once.
"""

from __future__ import annotations

import math
from operator import itemgetter
from typing import Literal

import torch
from transformers import PreTrainedModel

from prunelight.calibration.windows import Windows, check_windows
from prunelight.callbacks.base import PruningCallback
from prunelight.models.families.layers import decoder_layers
from prunelight.planning.layer_choice import (
    check_depth_target,
    layers_to_remove,
    lowest_scores,
    resolve_indices,
)
from prunelight.planning.plan import Plan
from prunelight.planning.steps import RemoveLayers
from prunelight.pruning.remove_layers import check_removable
from prunelight.runtime.arguments import check_choice
from prunelight.scoring.model_variants import VariantReplay
from prunelight.scoring.similarity import CRITERIA


class SLEB(PruningCallback):
    """Remove whole decoder layers greedily.

    Args:
        ratio: share of the decoder layers to remove, in [0, 1), rounded to whole layers.
        num_layers: how many layers to remove; exactly one of the two.
        criterion: what must stay high: "nll" (the paper), "kl", "cosine" or "cka", as in
            `SlidingLayerMerging`.
        protected: layers never to remove; the paper spares the first and the last.
        offload_activations: keep the hidden states on the CPU: num_samples * seq_len * hidden_size
            * (layers + 1) numbers.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(
        self,
        ratio: float | None = None,
        num_layers: int | None = None,
        criterion: Literal["cosine", "cka", "kl", "nll"] = "nll",
        protected: list[int] | None = None,
        offload_activations: bool = False,
    ) -> None:
        check_depth_target(ratio, num_layers)
        check_choice("criterion", criterion, CRITERIA)
        self.ratio, self.num_layers, self.criterion = ratio, num_layers, criterion
        self.protected = [0, -1] if protected is None else list(protected)
        self.offload_activations = offload_activations

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError if too few layers may be removed, or they depend on each other."""
        total = len(decoder_layers(model))
        lowest_scores(
            [0.0] * total, layers_to_remove(self.ratio, self.num_layers, total), self.protected
        )
        check_removable(model)

    @torch.no_grad()
    def plan(self, model: PreTrainedModel, windows: Windows) -> Plan:
        """Choose the layers to remove; the model is unchanged.

        Raises:
            ValueError: if the arguments or the windows do not fit the model.
            TypeError: if its layers cannot be run one by one.
        """
        self.check(model)
        check_windows(model, windows)
        total = len(decoder_layers(model))
        count = layers_to_remove(self.ratio, self.num_layers, total)
        protected = resolve_indices(self.protected, total)
        removed: list[int] = []
        first: dict[int, float] = {}  # similarity without each layer, of the first round
        similarity = 1.0
        with VariantReplay(
            model, windows, self.criterion, device=self.device, offload=self.offload_activations
        ) as replay:
            for _ in range(count):
                scores = {
                    place: replay.score(place, replay.layers[place + 1 :])
                    for place, unit in enumerate(replay.layers)
                    if unit.index not in protected
                }
                best, similarity = max(scores.items(), key=itemgetter(1))
                if not math.isfinite(similarity):
                    raise ValueError(
                        f"no {len(removed) + 1}. layer can be removed: every choice leaves NaN "
                        "states; load the model in bfloat16 or float32"
                    )
                first = first or {i: s for i, s in scores.items() if math.isfinite(s)}
                removed.append(replay.layers[best].index)
                replay.replace(best, replay.layers[best + 1 :])
            forwards = replay.layer_forwards
        return self.make_plan(
            model,
            windows,
            RemoveLayers(tuple(removed)),
            scores={"similarity_without": [first.get(i) for i in range(total)]} if first else {},
            found={"order": removed, "similarity": similarity, "layer_forwards": forwards},
        )
