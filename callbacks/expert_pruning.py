"""ExpertPruning: remove the experts that a mixture of experts misses least (REAP).

REAP (arXiv:2510.13999) scores an expert by gate x norm of its output: the mean over the tokens that
are routed to it. Each layer loses its experts of the lowest scores, and its router their rows. All
layers lose equal numbers, so that a stock config describes the result.
"""

from __future__ import annotations

import logging
from typing import Literal

import torch
from transformers import PreTrainedModel

from prunelight.calibration.windows import Windows
from prunelight.callbacks.base import PruningCallback
from prunelight.models.families.experts.layout import Experts, experts_of
from prunelight.models.families.experts.routed import check_scorable
from prunelight.models.families.layers import decoder_layers
from prunelight.planning.layer_choice import check_one_target
from prunelight.planning.plan import Plan
from prunelight.planning.steps import RemoveExperts
from prunelight.runtime.arguments import at_least, checked, within
from prunelight.runtime.finite import check_weights
from prunelight.scoring.experts.expert_scores import expert_scores

log = logging.getLogger(__name__)


class ExpertPruning(PruningCallback):
    """Remove experts of every mixture-of-experts layer; shared experts and dense layers stay.

    Args:
        num_experts: how many experts of each layer to remove. Give either this or ratio.
        ratio: share of the experts of each layer to remove, in [0, 1), rounded to whole experts; of
            a router that picks groups first, to whole experts of each group.
        score: "reap", the mean of gate x norm of the output over routed tokens, or "frequency", the
            share of tokens that are routed to the expert.

    Raises:
        ValueError: if an argument is out of its range.
    """

    @checked(num_experts=at_least(0), ratio=within(0, 1))
    def __init__(
        self,
        num_experts: int | None = None,
        ratio: float | None = None,
        score: Literal["reap", "frequency"] = "reap",
    ) -> None:
        check_one_target({"num_experts": num_experts, "ratio": ratio}, "experts")
        self.num_experts, self.ratio, self.score = num_experts, ratio, score

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError or TypeError if the experts cannot be scored, or too few would stay."""
        experts, count = self._checked(model)
        if self.ratio and not count:
            log.warning("ratio=%s removes none of %d experts", self.ratio, experts.count)

    @torch.no_grad()
    def plan(self, model: PreTrainedModel, windows: Windows) -> Plan:
        """Choose the experts to remove; the model is unchanged.

        Raises:
            ValueError: if the arguments or the windows do not fit the model.
            TypeError: if the model has no experts, or they cannot be scored.
        """
        check_weights(model)
        experts, count = self._checked(model)
        self.check_calibration(model, windows)
        scores = expert_scores(model, windows, self.score)
        removed = {
            str(layer): tuple(lowest_experts(of_layer.tolist(), count, experts.groups))
            for layer, of_layer in scores.items()
        }
        total = len(decoder_layers(model))
        means: list[float | None] = [None] * total  # a layer without experts has none
        lost: list[float | None] = [None] * total
        for layer, of_layer in scores.items():
            means[layer] = float(of_layer.mean())
            gone = float(of_layer[[*removed[str(layer)]]].sum())
            lost[layer] = gone / max(float(of_layer.sum()), torch.finfo(torch.float32).tiny)
        return self.make_plan(
            model,
            windows,
            RemoveExperts(removed),
            scores={f"expert_{self.score}": means, "share_of_experts_score_removed": lost},
            found={
                "num_experts_before": experts.count,
                "num_experts": experts.count - count,
                "experts_per_token": experts.top_k,
                "layers_with_experts": experts.layers,
                "experts_without_tokens": {
                    str(layer): int((of_layer == 0).sum()) for layer, of_layer in scores.items()
                },
                "expert_scores": {
                    str(layer): [float(f"{score:.6g}") for score in of_layer.tolist()]
                    for layer, of_layer in scores.items()
                },
            },
        )

    def _checked(self, model: PreTrainedModel) -> tuple[Experts, int]:
        """Return the experts of a model, and how many of each layer to remove."""
        experts = experts_of(model)
        check_scorable(model, experts)
        return experts, self._count(experts)

    def _count(self, experts: Experts) -> int:
        """Return how many experts of each layer to remove."""
        if self.num_experts is not None:
            experts.check_count(self.num_experts)
            return self.num_experts
        assert self.ratio is not None  # the constructor
        count = experts.groups * round(self.ratio * experts.per_group)
        experts.check_count(count, f"ratio={self.ratio}, number of experts removed")
        return count


def lowest_experts(scores: list[float], count: int, groups: int = 1) -> list[int]:
    """Return the experts of the lowest scores, as many of each group; of equal ones the later.

    Args:
        scores: one an expert; those of a group are neighbours.
        count: how many to choose, a multiple of groups.
        groups: number of groups, of equal size.
    """
    size, chosen = len(scores) // groups, list[int]()
    for start in range(0, len(scores), size):
        group = sorted(range(start, start + size), key=lambda expert: (scores[expert], -expert))
        chosen += group[: count // groups]
    return sorted(chosen)
