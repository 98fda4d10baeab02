"""Which decoder layers to remove when the layer before each gap is healed: a greedy search.

One layer goes at a time: the one without which the healed model is nearest to the dense one, by KL
on windows that no fit sees. Layers below a gap do not change, so a candidate costs one fit of one
layer and the layers above it on a few windows. After the first round only the candidates that were
best so far are tried. In the end each removed layer is put back once, and another goes in its place
where that is better.
"""

# L layers, N windows, T tokens, D hidden

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from prunelight.calibration.shared_windows import group_of, share_windows
from prunelight.calibration.windows import Windows, split_windows
from prunelight.models.families.layers import decoder_layers
from prunelight.pruning.searches.healed_variants import HealedVariants
from prunelight.scoring.model_variants import VariantReplay

log = logging.getLogger(__name__)

_POOL = 14  # candidates that are tried after the first round
_FEWEST_JUDGES, _JUDGED_SHARE = 2, 16  # windows that judge: one of 16, 2 at least
_FITTED_PER_JUDGE = 3


@dataclass(frozen=True)
class DepthSearch:
    """What the search found.

    Attributes:
        removed: the layers to remove, in the order in which they were chosen.
        divergence: KL to the dense model of the healed model on the windows that judged, in nats.
        path: the layers as they went one by one, before any exchange, each with the KL then.
        first_round: KL without each layer alone, healed; None where it cannot go, or leaves NaN.
        exchanges: (layer that was put back, layer that went instead).
        forwards: what the search cost, in forwards of the dense model over all calibration
            windows; solves and the head are left out.
    """

    removed: list[int]
    divergence: float
    path: list[tuple[int, float]]
    first_round: list[float | None]
    exchanges: list[tuple[int, int]]
    forwards: float


def search_windows(windows: Windows, fewest_fitted: int = 1) -> tuple[Windows, Windows]:
    """Return the windows to fit on, and those that judge: spread evenly over all.

    One window of 16 judges, 2 at least; three times as many are fitted on.

    Args:
        windows: calibration windows, (N, T).
        fewest_fitted: how many must be left to fit on.

    Raises:
        ValueError: if there are too few windows, or fewer of one kind than processes.
    """
    ids, mask = split_windows(windows)
    group = group_of(windows)
    judges = max(_FEWEST_JUDGES, len(ids) // _JUDGED_SHARE, group.size)
    fewest = judges + fewest_fitted
    if len(ids) < fewest:
        raise ValueError(
            f"{len(ids)} windows: {judges} of them judge the search and the others are fitted on; "
            f"calibrate on {fewest} or more, better on 32"
        )
    count = min(len(ids), judges * (1 + _FITTED_PER_JUDGE))
    spread = [i * len(ids) // count for i in range(count)]
    judging = {spread[i * count // judges + count // judges - 1] for i in range(judges)}

    def chosen(rows: Sequence[int]) -> Windows:
        named = {"input_ids": ids[rows]}
        if mask is not None:
            named["attention_mask"] = mask[rows]
        return share_windows(named, group)

    return chosen([i for i in spread if i not in judging]), chosen(sorted(judging))


def finite_or_none(number: float) -> float | None:
    """Return a number that JSON can hold: None for NaN and Inf."""
    return number if math.isfinite(number) else None


@torch.no_grad()
def search_depth(
    model: PreTrainedModel,
    windows: Windows,
    count: int,
    *,
    may_go: Callable[[Sequence[int]], bool],
    heals: bool = True,
    look_back: bool = True,
    device: torch.device | None = None,
    offload: bool = False,
) -> DepthSearch:
    """Choose `count` decoder layers to remove; the model is unchanged afterwards.

    Args:
        model: whose layers are chosen.
        windows: calibration windows (N, T).
        count: how many layers go.
        may_go: tells whether these layers can be among those that go.
        heals: heal the layer before each gap, by `heal_step`'s rule with a fixed ridge.
        look_back: exchange removed layers in the end where that is better.
        device: where the layers compute; None takes the model's own.
        offload: keep the states on the CPU.

    Raises:
        ValueError: if there are too few windows, or every choice leaves NaN states.
        TypeError: if the layers cannot be run one by one.
    """
    total = len(decoder_layers(model))
    if not count:
        return DepthSearch([], 0.0, [], [None] * total, [], 0.0)
    fitted, judging = search_windows(windows)
    with (
        VariantReplay(model, judging, "kl", device=device, offload=offload) as judges,
        HealedVariants(
            model, fitted, judges, heals=heals, device=device, offload=offload
        ) as variants,
    ):
        last_known: dict[int, float] = {}
        first_round: dict[int, float] = {}

        def candidates() -> list[int]:
            """Return the layers that may go next: the best so far after the first round."""
            free = [i for i in range(total) if i not in variants.removed]
            free = [i for i in free if may_go([*variants.removed, i])]
            free.sort(key=lambda i: last_known.get(i, math.inf))
            return free[:_POOL] if first_round else free

        def best() -> int:
            scores = {layer: variants.divergence_without(layer) for layer in candidates()}
            last_known.update(scores)
            chosen = min(scores, key=lambda layer: scores[layer], default=None)
            if chosen is None or not math.isfinite(scores[chosen]):
                raise ValueError(
                    f"no {len(variants.removed) + 1}. layer can be removed: every choice leaves "
                    "NaN states; load the model in bfloat16 or float32"
                )
            return chosen

        path = []
        for _ in range(count):
            layer = best()
            first_round = first_round or dict(last_known)
            variants.remove(layer)
            path.append((layer, variants.divergence))
            log.info("removed layer %d: KL %.4f", layer, variants.divergence)
        exchanges = []
        for layer in list(variants.removed) if look_back and count > 1 else ():
            before, kept = variants.divergence, list(variants.removed)
            variants.restore([other for other in kept if other != layer])
            other = best()
            variants.remove(other)
            if variants.divergence < before:
                exchanges.append((layer, other))
                log.info("layer %d went instead of %d: KL %.4f", other, layer, variants.divergence)
            else:
                variants.restore(kept)
        parts = (fitted, variants.layer_forwards), (judging, judges.layer_forwards)
        spent = sum(forwards * len(split_windows(part)[0]) for part, forwards in parts)
        return DepthSearch(
            list(variants.removed),
            variants.divergence,
            path,
            [finite_or_none(first_round.get(i, math.inf)) for i in range(total)],
            exchanges,
            spent / total / len(split_windows(windows)[0]),
        )
