"""Width pruning: fewer attention heads and MLP neurons.

With the same number in every layer the result is a stock model. SLM (arXiv:2502.19159) reports
depth pruning followed by width pruning. Whole key-value groups are removed, with their query heads.
Each layer keeps its own best groups and neurons. prunelight/scoring/width_scores.py defines the
scores.

How many a layer keeps can also follow from its scores (`allocation="global"`), as in FLAP
(arXiv:2312.11983). FLAP compares scores across layers that are standardised within each layer.
Here they are divided by their layer's sum: standardised scores of two groups are always the same.
With `allocation="dlp"` it follows from DLP's shares of zeros (arXiv:2505.23807), which here are
shares of groups and neurons to remove. DLP's released code has no structured form that runs.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunelight.calibration.windows import Windows
from prunelight.callbacks.base import PruningCallback
from prunelight.models.families.architectures import is_sliced
from prunelight.models.families.layers import decoder_layers
from prunelight.models.families.matrices import layer_matrices
from prunelight.models.families.own_classes.layer_widths import LISTS
from prunelight.planning.plan import Plan
from prunelight.planning.sparsity_shares import clipping_excess, deal_blocks, dlp, fit_to_target
from prunelight.planning.steps import PruneWidth
from prunelight.pruning.prune_width import check_width
from prunelight.run.method import PruningMethod
from prunelight.run.run_state import Run
from prunelight.runtime.arguments import at_least, checked, within
from prunelight.runtime.finite import check_weights
from prunelight.scoring.weight_scores import weight_scores
from prunelight.scoring.width_scores import (
    Widths,
    allowed_groups,
    width_scores,
    widths_of,
)

log = logging.getLogger(__name__)

FIELDS: dict[str, str] = {"heads": "num_key_value_heads", "neurons": "intermediate_size"}

PER_LAYER = {field: name for name, field in LISTS.items()}  # the same for different widths

ALLOCATIONS = ("uniform", "global", "dlp")

ALPHA = 0.15  # of DLP's paper


class WidthPruning(PruningCallback):
    """Prune attention heads and MLP neurons.

    Args:
        neuron_ratio: share of the MLP neurons to remove, in [0, 1); the number kept is rounded to
            the nearest multiple of `multiple`.
        head_ratio: share of the key-value groups to remove, in [0, 1); with uniform widths the
            number kept is rounded to the nearest one that the config class accepts.
        intermediate_size: number of neurons to keep, instead of `neuron_ratio`.
        num_key_value_heads: number of key-value groups to keep, instead of `head_ratio`.
        score: "wanda", "fluctuation" (FLAP) or "taylor" (LLM-Pruner; needs gradients).
        multiple: what the number of neurons must be a multiple of, for fast kernels.
        correction: fit the output projections by least squares on the calibration windows, to
            give what they gave with all inputs.
        allocation: "uniform" keeps equal numbers in all layers: a stock model. "global" keeps those
            of all layers whose shares of their layer's score are highest; at least one group and
            `multiple` neurons a layer. "dlp" keeps more in layers whose median of |W| * ||X|| is
            low, by DLP's shares. Ratios are then of all layers together, numbers are means. Such a
            model needs prunelight to load, unless all widths are equal.
        export_remote_code: put the code of its class beside a result whose widths differ, which
            then loads without prunelight under trust_remote_code.
        alpha: half the spread of the shares of "dlp"; None takes the paper's 0.15. 0 is uniform.
        heal: "linear" then fits weights anew, in closed form, to the dense model's hidden states,
            see docs/healing.md. It needs 2 calibration windows or more.

    Raises:
        ValueError: if an argument is out of its range or has no effect, two arguments set the same
            width, or no argument sets one.
    """

    @checked(
        neuron_ratio=within(0, 1),
        head_ratio=within(0, 1),
        intermediate_size=at_least(1),
        num_key_value_heads=at_least(1),
        multiple=at_least(1),
        alpha=at_least(0),
    )
    def __init__(
        self,
        neuron_ratio: float | None = None,
        head_ratio: float | None = None,
        intermediate_size: int | None = None,
        num_key_value_heads: int | None = None,
        score: Literal["taylor", "wanda", "fluctuation"] = "wanda",
        multiple: int = 64,
        correction: bool = True,
        allocation: Literal["uniform", "global", "dlp"] = "uniform",
        export_remote_code: bool = False,
        alpha: float | None = None,
        heal: Literal["none", "linear"] = "none",
    ) -> None:
        pairs = (
            ("neuron_ratio", neuron_ratio, "intermediate_size", intermediate_size),
            ("head_ratio", head_ratio, "num_key_value_heads", num_key_value_heads),
        )
        for name, ratio, other, number in pairs:
            if ratio is not None and number is not None:
                raise ValueError(f"{name}={ratio} and {other}={number}: give one of the two")
        if all(x is None for x in (*pairs[0][1::2], *pairs[1][1::2])):
            raise ValueError("nothing to prune: give neuron_ratio, head_ratio, or what is left")
        if export_remote_code and allocation == "uniform":
            raise ValueError(
                "export_remote_code=True has no effect with allocation='uniform', which leaves a "
                "stock class; leave it out"
            )
        if alpha is not None and allocation != "dlp":
            raise ValueError(f"{alpha=} has no effect with {allocation=}; set allocation='dlp'")
        if intermediate_size is not None and intermediate_size % multiple:
            near = max(1, round(intermediate_size / multiple)) * multiple
            raise ValueError(
                f"intermediate_size={intermediate_size} must be a multiple of {multiple}; take "
                f"{near}, or set multiple"
            )
        self.neuron_ratio, self.head_ratio = neuron_ratio, head_ratio
        self.intermediate_size, self.num_key_value_heads = intermediate_size, num_key_value_heads
        self.score, self.multiple, self.correction = score, multiple, correction
        self.allocation, self.export_remote_code = allocation, export_remote_code
        self.alpha, self.heal = alpha, heal
        self.follows_slicing = allocation == "uniform"

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError or TypeError if the model cannot take the widths asked for."""
        before, counts = widths_of(model), self._counts(model)
        if self.allocation != "uniform" and is_sliced(model):
            raise TypeError(
                "this model is sliced: its layers cannot have different widths; set "
                "allocation='uniform'"
            )
        kept = {
            kind: {str(i): tuple(range(count)) for i, count in enumerate(numbers)}
            for kind, numbers in counts.items()
        }
        check_width(model, PruneWidth(kept.get("heads", {}), kept.get("neurons", {})))
        for kind, name in (("heads", "head_ratio"), ("neurons", "neuron_ratio")):
            if getattr(self, name) and counts[kind] == (numbers := _numbers(before, kind)):
                log.warning("%s=%s removes none of %d", name, getattr(self, name), max(numbers))

    def widths(self, model: PreTrainedModel) -> dict[str, int]:
        """Return how many inputs the output projections keep, or a divisor of their number."""
        before, counts = widths_of(model)[0], self._counts(model)
        head = before.heads * before.head_dim
        if self.allocation != "uniform":
            divisors = {"neurons": ("multiple", self.multiple), "heads": ("width of a group", head)}
            return dict(divisors[kind] for kind in counts)
        inputs = {
            "neurons": ("intermediate_size", 1),
            "heads": ("num_attention_heads * head_dim", head),
        }
        return {inputs[kind][0]: numbers[0] * inputs[kind][1] for kind, numbers in counts.items()}

    def check_run(self, run: Run, methods: Sequence[PruningMethod]) -> None:
        """Raise ValueError if a method beside this one leaves a model that it cannot prune."""
        for other in methods[: methods.index(self)]:
            if other.drops_sublayers:
                raise ValueError(
                    f"{type(other).__name__} drops sublayers before WidthPruning; put "
                    "WidthPruning before it"
                )
        for other in methods if self.allocation != "uniform" else ():
            if other.drops_sublayers or other.slices:
                does = "drops sublayers" if other.drops_sublayers else "slices hidden states"
                raise ValueError(
                    f"{type(other).__name__} {does}, and no class describes such a model with "
                    "layers of different widths; set allocation='uniform'"
                )

    @torch.no_grad()
    def plan(self, model: PreTrainedModel, windows: Windows) -> Plan:
        """Choose the groups and neurons that each layer keeps; the model is unchanged.

        Raises:
            ValueError: if the arguments or the windows do not fit the model, or activations or
                gradients are NaN or Inf.
            TypeError: if the attention and MLP modules of the family are not known.
        """
        check_weights(model)
        self.check(model)
        self.check_calibration(model, windows)
        before = widths_of(model)
        scores = width_scores(model, windows, self.score, [*self._means(before)])
        kept: dict[str, dict[str, tuple[int, ...]]] = {}
        kept_shares: dict[str, list[float]] = {}
        found: dict[str, Any] = {}
        medians = self._medians(model, windows)
        for kind, counts in self._counts(model, scores, medians).items():
            kept[kind], kept_shares[f"share_of_{kind}_score_kept"] = _best(scores[kind], counts)
            field, uniform = FIELDS[kind], self.allocation == "uniform"
            found |= {field: counts[0]} if uniform else {PER_LAYER[field]: counts}
            found[f"{field}_before"] = max(_numbers(before, kind))
        step = PruneWidth(kept.get("heads", {}), kept.get("neurons", {}), self.correction)
        kept_shares |= {"median": medians} if medians else {}
        return self.make_plan(model, windows, step, scores=kept_shares, found=found)

    def _medians(self, model: PreTrainedModel, windows: Windows) -> list[float]:
        """Return DLP's score of each decoder layer; an empty list if the allocation needs none."""
        if self.allocation != "dlp":
            return []
        scores = weight_scores(model, windows, "median", device=self.device)
        layers = range(len(decoder_layers(model)))
        return [scores[layer_matrices(model, index)[0].name] for index in layers]

    def _means(self, before: Sequence[Widths]) -> dict[str, float]:
        """Return how many groups ("heads") and neurons a mean layer keeps, of those to prune."""
        given = {
            "heads": (self.num_key_value_heads, self.head_ratio),
            "neurons": (self.intermediate_size, self.neuron_ratio),
        }
        means: dict[str, float] = {}
        for kind, (number, ratio) in given.items():
            if number is not None:
                means[kind] = number
            elif ratio is not None:
                means[kind] = sum(_numbers(before, kind)) / len(before) * (1 - ratio)
        return means

    def _counts(
        self,
        model: PreTrainedModel,
        scores: Mapping[str, Sequence[Tensor]] | None = None,
        medians: Sequence[float] = (),
    ) -> dict[str, list[int]]:
        """Return how many groups and neurons each layer keeps, of the kinds to prune.

        Args:
            model: before it is pruned.
            scores: of each layer, by kind; without them "global" gives one answer of many.
            medians: DLP's score of each layer; without them "dlp" gives one answer of many.

        Raises:
            ValueError: if the layers do not have so many.
        """
        before, counts = widths_of(model), dict[str, list[int]]()
        for kind, mean in self._means(before).items():
            numbers, block = _numbers(before, kind), self.multiple if kind == "neurons" else 1
            allowed = allowed_groups(model) if kind == "heads" else []
            self._check_number(kind, numbers, block)
            most = [max(1, number // block) for number in numbers]  # whole blocks of each layer
            total = min(max(len(most), round(mean * len(most) / block)), sum(most))
            if self.allocation == "dlp":
                ratio = max(0.0, 1 - mean * len(most) / sum(numbers))
                blocks = _deal(self._wanted(numbers, ratio, medians, block), most, total, allowed)
            elif self.allocation == "global":
                layers = [torch.ones(number) for number in most]
                if scores is not None:
                    layers = [_shares(*x, block) for x in zip(scores[kind], most, strict=True)]
                blocks = _spread(layers, total, allowed)
            elif getattr(self, FIELDS[kind]) is not None:
                blocks = [round(mean / block)] * len(most)
            elif kind == "heads":
                blocks = [min(allowed, key=lambda count: abs(count - mean))] * len(most)
            else:
                self._check_rounding(mean, block)
                blocks = [min(round(mean / block), *most)] * len(most)
            counts[kind] = [number * block for number in blocks]
        return counts

    def _wanted(
        self, numbers: Sequence[int], ratio: float, medians: Sequence[float], block: int
    ) -> list[float]:
        """Return how many blocks each layer should keep by DLP's shares, before rounding.

        Args:
            numbers: of groups or neurons of each layer.
            ratio: share of them to remove, in [0, 1).
            medians: DLP's score of each layer; of none all are equal.
            block: groups or neurons in a block.
        """
        alpha = ALPHA if self.alpha is None else self.alpha
        shares = dlp(medians or [0.0] * len(numbers), numbers, ratio, alpha)
        if excess := clipping_excess(shares, ratio):
            log.warning(
                "alpha=%s pushes shares to remove to [%.3f, %.3f], %.3f out of [0, 1): clipped, "
                "and the others adjusted to a ratio of %.4g",
                *(alpha, min(shares), max(shares), excess, ratio),
            )
        shares = fit_to_target(shares, numbers, ratio)
        return [n * (1 - share) / block for n, share in zip(numbers, shares, strict=True)]

    def _check_rounding(self, mean: float, block: int) -> None:
        """Raise ValueError if `neuron_ratio` leaves less than half of the smallest width."""
        if round(mean / block) == 0:
            raise ValueError(
                f"neuron_ratio={self.neuron_ratio} would keep {mean:.3g} neurons, the least is "
                f"multiple={block}; lower one of the two"
            )

    def _check_number(self, kind: str, numbers: Sequence[int], block: int) -> None:
        """Raise ValueError if the layers have less than is to be kept."""
        if kind == "heads" and self.allocation == "uniform":
            return  # check_width says which numbers the config class accepts
        asked = getattr(self, FIELDS[kind])
        limit = min(numbers) if self.allocation == "uniform" else sum(numbers) // len(numbers)
        if (asked or 0) > limit or block > min(numbers):
            remedy = f"lower it, or multiple={block}" if kind == "neurons" else "lower it"
            raise ValueError(
                f"{FIELDS[kind]}={asked or block} must be at most the model's {limit}; {remedy}"
            )


def _numbers(layers: Sequence[Widths], kind: str) -> list[int]:
    """Return how many groups ("heads") or neurons each layer has."""
    return [widths.groups if kind == "heads" else widths.neurons for widths in layers]


def _shares(score: Tensor, most: int, block: int) -> Tensor:
    """Return the share of a layer's score in each of its blocks, of the best ones first.

    Args:
        score: of each group or neuron of the layer.
        most: number of whole blocks.
        block: groups or neurons in a block.
    """
    best = score.double().sort(descending=True).values[: most * block]
    return best.view(most, block).sum(1) / score.double().sum().clamp(min=1e-30)


def _spread(layers: Sequence[Tensor], total: int, allowed: Collection[int]) -> list[int]:
    """Return how many blocks each layer keeps: its best one, then the best of all layers.

    Args:
        layers: shares of each layer's blocks, in descending order.
        total: number of blocks in all layers; at least one a layer.
        allowed: numbers that all layers can have, if no other; empty allows any. A forbidden one
            becomes different numbers, of one block less in all.
    """
    rest = [(x, -layer) for layer, shares in enumerate(layers) for x in shares[1:].tolist()]
    chosen = Counter(-layer for _, layer in sorted(rest, reverse=True)[: total - len(layers)])
    counts = [1 + chosen[layer] for layer in range(len(layers))]
    if allowed and len(set(counts)) == 1 and counts[0] not in allowed and total > len(layers):
        return _spread(layers, total - 1, allowed)
    return counts


def _deal(
    wanted: Sequence[float], most: Sequence[int], total: int, allowed: Collection[int]
) -> list[int]:
    """Return how many blocks each layer keeps, near to what it should.

    Args:
        wanted: number of blocks that each layer should keep.
        most: number of blocks of each layer.
        total: number of blocks in all layers; at least one a layer.
        allowed: as in `_spread`.
    """
    counts = deal_blocks(wanted, most, total)
    if allowed and len(set(counts)) == 1 and counts[0] not in allowed and total > len(most):
        return _deal(wanted, most, total - 1, allowed)
    return counts


def _best(
    scores: Sequence[Tensor], counts: Sequence[int]
) -> tuple[dict[str, tuple[int, ...]], list[float]]:
    """Return the indices of each layer's highest scores, and their share of its scores."""
    kept = [torch.topk(s, n).indices.sort().values for s, n in zip(scores, counts, strict=True)]
    shares = [
        (score[k].sum() / score.sum().clamp(min=1e-30)).item()
        for score, k in zip(scores, kept, strict=True)
    ]
    return {str(i): tuple(k.tolist()) for i, k in enumerate(kept)}, shares
