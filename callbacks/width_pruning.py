"""Width pruning: fewer attention heads and MLP neurons.

With the same number in every layer the result is a stock model. SLM (arXiv:2502.19159) reports
depth pruning followed by width pruning. Whole key-value groups are removed, with their query heads.
Each layer keeps its own best groups and neurons. prunelight/scoring/width_scores.py defines the
scores.

How many a layer keeps can also follow from its scores. With `allocation="flap"` groups and neurons
of all layers are ranked in one list, by FLAP's standardised fluctuations (arXiv:2312.11983), until
their parameters meet one budget. With `allocation="global"` each kind has its own number, and any
score is compared by its share of its layer's sum. With `allocation="dlp"` it follows from DLP's
shares of zeros (arXiv:2505.23807), which here are shares of groups and neurons to remove. DLP's
released code has no structured form that runs.
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
from prunelight.callbacks.base import Healing, PruningCallback
from prunelight.models.families.architectures import is_sliced
from prunelight.models.families.layers import decoder_layers, layers_path
from prunelight.models.families.matrices import layer_matrices
from prunelight.models.families.own_classes.layer_widths import LISTS
from prunelight.planning.plan import Plan
from prunelight.planning.sparsity_shares import (
    clipping_excess,
    deal_blocks,
    dlp,
    fit_to_target,
    spend_budget,
)
from prunelight.planning.steps import PruneWidth
from prunelight.pruning.healing.writers import first_writer
from prunelight.pruning.prune_width import check_width
from prunelight.run.method import PruningMethod
from prunelight.run.run_state import Run
from prunelight.runtime.arguments import at_least, checked, within
from prunelight.runtime.finite import check_weights
from prunelight.scoring.weight_scores import weight_scores
from prunelight.scoring.width_scores import (
    Widths,
    allowed_groups,
    projection_parts,
    standardised_scores,
    unit_size,
    width_scores,
    widths_of,
)

log = logging.getLogger(__name__)

FIELDS: dict[str, str] = {"heads": "num_key_value_heads", "neurons": "intermediate_size"}

PER_LAYER = {field: name for name, field in LISTS.items()}  # the same for different widths

ALLOCATIONS = ("uniform", "global", "flap", "dlp")

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
            give what they gave with all inputs. "bias" gives them a bias instead, the mean of what
            is gone on the calibration windows (FLAP); no stock class has it. None fits them, unless
            `heal` fits all of the same matrices, which alone is better.
        allocation: "uniform" keeps equal numbers in all layers: a stock model. "global" keeps those
            of all layers whose shares of their layer's score are highest; at least one group and
            `multiple` neurons a layer. "flap" ranks groups and neurons together by standardised
            fluctuations, each by its parameters: `head_ratio` and `neuron_ratio` say which kinds
            may go, and together how many parameters. "dlp" keeps more in layers whose median of
            |W| * ||X|| is low, by DLP's shares. Ratios are then of all layers together, numbers are
            means. Such a model needs prunelight to load, unless all widths are equal.
        export_remote_code: put the code of its class beside a result whose widths differ, which
            then loads without prunelight under trust_remote_code.
        alpha: half the spread of the shares of "dlp"; None takes the paper's 0.15. 0 is uniform.
        skip_first: number of first layers that stay whole; LLM-Pruner leaves 4 of 32. The others
            lose more: ratios count over all layers, and numbers are means of all.
        skip_last: number of last layers that stay whole; LLM-Pruner leaves 2 of 32.
        heal: "linear" then fits weights anew, in closed form, to the dense model's hidden states;
            "layer" trains whole layers to them too, one at a time. See docs/healing.md. Both need 2
            calibration windows or more.

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
        skip_first=at_least(0),
        skip_last=at_least(0),
    )
    def __init__(
        self,
        neuron_ratio: float | None = None,
        head_ratio: float | None = None,
        intermediate_size: int | None = None,
        num_key_value_heads: int | None = None,
        score: Literal["taylor", "wanda", "fluctuation"] = "wanda",
        multiple: int = 64,
        correction: bool | Literal["bias"] | None = None,
        allocation: Literal["uniform", "global", "flap", "dlp"] = "uniform",
        export_remote_code: bool = False,
        alpha: float | None = None,
        skip_first: int = 0,
        skip_last: int = 0,
        heal: Healing = "none",
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
        if allocation == "flap" and score != "fluctuation":
            raise ValueError(
                f"allocation='flap' ranks standardised fluctuations, not {score=}; set "
                "score='fluctuation', or allocation='global'"
            )
        self.stays_stock = (
            allocation == "uniform" and correction != "bias" and not skip_first + skip_last
        )
        if export_remote_code and self.stays_stock:
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
        self.alpha, self.skip_first, self.skip_last = alpha, skip_first, skip_last
        self.heal = heal
        self.follows_slicing = self.stays_stock

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError or TypeError if the model cannot take the widths asked for."""
        before, counts = widths_of(model), self._counts(model)
        if not self.stays_stock and is_sliced(model):
            raise TypeError(f"this model is sliced: no class of it has {self._own_class_reason()}")
        kept = {
            kind: {str(i): tuple(range(count)) for i, count in enumerate(numbers)}
            for kind, numbers in counts.items()
        }
        check_width(model, PruneWidth(kept.get("heads", {}), kept.get("neurons", {})))
        if self.allocation == "flap":
            return  # one kind may well keep all
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
        first = self.skip_first  # of those that are pruned
        return {
            inputs[kind][0]: numbers[first] * inputs[kind][1] for kind, numbers in counts.items()
        }

    def _own_class_reason(self) -> str:
        """Return what no stock class has, and how to do without."""
        if self.allocation != "uniform":
            return "layers of different widths; set allocation='uniform'"
        if self.correction == "bias":
            return "biases of output projections; set correction=True"
        return "layers of different widths; leave skip_first and skip_last out"

    def check_run(self, run: Run, methods: Sequence[PruningMethod]) -> None:
        """Raise ValueError if a method beside this one leaves a model that it cannot prune."""
        for other in methods[: methods.index(self)]:
            if other.drops_sublayers:
                raise ValueError(
                    f"{type(other).__name__} drops sublayers, or puts matrices at gaps, before "
                    "WidthPruning; put WidthPruning before it"
                )
        for other in methods if not self.stays_stock else ():
            if other.drops_sublayers or other.slices:
                does = (
                    "drops sublayers or puts matrices at gaps"
                    if other.drops_sublayers
                    else "slices hidden states"
                )
                raise ValueError(
                    f"{type(other).__name__} {does}, and no class describes such a model with "
                    f"{self._own_class_reason()}"
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
        kinds = [*self._means(before)]
        flap = self.allocation == "flap"
        scores = (
            standardised_scores(model, windows, kinds)
            if flap
            else width_scores(model, windows, self.score, kinds)
        )
        kept: dict[str, dict[str, tuple[int, ...]]] = {}
        kept_shares: dict[str, list[float]] = {}
        found: dict[str, Any] = {}
        medians = self._medians(model, windows)
        for kind, counts in self._counts(model, scores, medians).items():
            kept[kind] = _best(scores[kind], counts)
            tell = _lowest if flap else _share_kept  # standardised scores have no sum
            name = f"lowest_{kind}_score_kept" if flap else f"share_of_{kind}_score_kept"
            kept_shares[name] = [*map(tell, scores[kind], kept[kind].values())]
            field = FIELDS[kind]
            equal = self.allocation == "uniform" and len(set(counts)) == 1
            found |= {field: counts[0]} if equal else {PER_LAYER[field]: counts}
            found[f"{field}_before"] = max(_numbers(before, kind))
        correction = self._correction(model, windows, kinds)
        step = PruneWidth(kept.get("heads", {}), kept.get("neurons", {}), correction)
        kept_shares |= {"median": medians} if medians else {}
        return self.make_plan(model, windows, step, scores=kept_shares, found=found)

    def _correction(
        self, model: PreTrainedModel, windows: Windows, kinds: Sequence[str]
    ) -> bool | Literal["bias"]:
        """Return how the step makes up for what is gone of these kinds."""
        if self.correction is not None:
            return self.correction
        if self.heal == "none" or [*kinds] != ["neurons"]:
            return True
        output = projection_parts(model, 0, widths_of(model)[0])["neurons"][-1].matrix
        healed = f"{layers_path(model)}.0.{first_writer(model, windows)}"
        return healed != output.name

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

    def pruned_layers(self, model: PreTrainedModel) -> range:
        """Return the decoder layers that are pruned, without those that are skipped.

        Raises:
            ValueError: if all are skipped.
        """
        total = len(decoder_layers(model))
        if self.skip_first + self.skip_last >= total:
            raise ValueError(
                f"skip_first={self.skip_first} and skip_last={self.skip_last} leave none of the "
                f"{total} decoder layers to prune; lower one of them"
            )
        return range(self.skip_first, total - self.skip_last)

    def _counts(
        self,
        model: PreTrainedModel,
        scores: Mapping[str, Sequence[Tensor]] | None = None,
        medians: Sequence[float] = (),
    ) -> dict[str, list[int]]:
        """Return how many groups and neurons each layer keeps, of the kinds to prune.

        Args:
            model: before it is pruned.
            scores: of each layer, by kind; without them "global" and "flap" give one answer of
                many.
            medians: DLP's score of each layer; without them "dlp" gives one answer of many.

        Raises:
            ValueError: if the layers do not have so many, or those that are pruned cannot lose so
                many.
        """
        before, pruned = widths_of(model), self.pruned_layers(model)
        numbers = {kind: _numbers(before, kind) for kind in self._means(before)}
        for kind in numbers:
            self._check_number(kind, numbers[kind], self._block(kind))
        means = {
            kind: self._mean_left(kind, numbers[kind], mean, pruned)
            for kind, mean in self._means(before).items()
        }
        some = {kind: [numbers[kind][i] for i in pruned] for kind in numbers}
        # Layers that stay whole beside narrow ones are of our class, which has any number.
        whole = len(pruned) == len(before)
        allowed = allowed_groups(model) if "heads" in numbers and whole else []
        own = {k: [x[i] for i in pruned] for k, x in scores.items()} if scores is not None else None
        if self.allocation == "flap":
            blocks = self._flap_blocks(model, some, means, own, allowed)
        else:
            of_layers = [medians[i] for i in pruned] if medians else []
            blocks = {
                kind: self._blocks(
                    kind,
                    some[kind],
                    means[kind],
                    None if own is None else own[kind],
                    of_layers,
                    allowed if kind == "heads" else [],
                )
                for kind in numbers
            }
        for kind, counts in blocks.items():
            for layer, count in zip(pruned, counts, strict=True):
                numbers[kind][layer] = count * self._block(kind)
        return numbers

    def _block(self, kind: str) -> int:
        """Return how many groups or neurons go or stay together."""
        return self.multiple if kind == "neurons" else 1

    def _mean_left(
        self, kind: str, numbers: Sequence[int], mean: float, pruned: Sequence[int]
    ) -> float:
        """Return how many groups or neurons a mean layer of those that are pruned keeps.

        Args:
            kind: "heads" or "neurons".
            numbers: of groups or neurons of all layers.
            mean: how many a mean layer of all keeps.
            pruned: the layers that are pruned.

        Raises:
            ValueError: if layers are skipped, and the others cannot lose so many.
        """
        if len(pruned) == len(numbers):
            return mean
        own = sum(numbers[layer] for layer in pruned)
        left = (mean * len(numbers) - (sum(numbers) - own)) / len(pruned)
        if self.allocation != "flap" and round(left / self._block(kind)) < 1:
            most = 1 - (sum(numbers) - own + len(pruned) * self._block(kind)) / sum(numbers)
            raise ValueError(
                f"the {len(pruned)} layers that skip_first={self.skip_first} and skip_last="
                f"{self.skip_last} leave cannot lose {1 - mean * len(numbers) / sum(numbers):.3g} "
                f"of all {kind}, at most {most:.3g}; lower {self._asked(kind)}, or skip fewer"
            )
        return left

    def _asked(self, kind: str) -> str:
        """Return the argument that says how many groups or neurons go, with its value."""
        ratio = "head_ratio" if kind == "heads" else "neuron_ratio"
        name = ratio if getattr(self, ratio) is not None else FIELDS[kind]
        return f"{name}={getattr(self, name)}"

    def _blocks(
        self,
        kind: str,
        numbers: Sequence[int],
        mean: float,
        scores: Sequence[Tensor] | None,
        medians: Sequence[float],
        allowed: Collection[int],
    ) -> list[int]:
        """Return how many blocks of one kind each layer keeps.

        Args:
            kind: "heads" or "neurons".
            numbers: of groups or neurons of each layer.
            mean: how many of them a mean layer keeps.
            scores: of each layer's groups or neurons.
            medians: DLP's score of each layer.
            allowed: numbers that all layers can have, if no other; empty allows any.
        """
        block = self._block(kind)
        most = [max(1, number // block) for number in numbers]  # whole blocks of each layer
        total = min(max(len(most), round(mean * len(most) / block)), sum(most))
        if self.allocation == "dlp":
            ratio = max(0.0, 1 - mean * len(most) / sum(numbers))
            return _deal(self._wanted(numbers, ratio, medians, block), most, total, allowed)
        if self.allocation == "global":
            layers = [torch.ones(number) for number in most]
            if scores is not None:
                layers = [_shares(*x, block) for x in zip(scores, most, strict=True)]
            return _spread(layers, total, allowed)
        if getattr(self, FIELDS[kind]) is not None:
            return [round(mean / block)] * len(most)
        if kind == "heads" and allowed:
            return [min(allowed, key=lambda count: abs(count - mean))] * len(most)
        if kind == "neurons":
            self._check_rounding(mean, block)
        return [min(round(mean / block), *most)] * len(most)

    def _flap_blocks(
        self,
        model: PreTrainedModel,
        numbers: Mapping[str, Sequence[int]],
        means: Mapping[str, float],
        scores: Mapping[str, Sequence[Tensor]] | None,
        allowed: Collection[int],
    ) -> dict[str, list[int]]:
        """Return how many blocks of each kind each layer keeps, of all ranked in one list.

        Args:
            model: before it is pruned.
            numbers: kind -> groups or neurons of each layer that is pruned.
            means: kind -> how many of them a mean layer would keep, whose parameters are kept.
            scores: kind -> standardised scores of each layer; without them all are equal.
            allowed: numbers of groups that all layers can have, if no other; empty allows any.

        Raises:
            ValueError: if one group and `multiple` neurons a layer have more parameters than that.
        """
        ranked: dict[str, list[list[float]]] = {kind: [] for kind in numbers}
        sizes: list[float] = []
        budget = 0.0
        widths = widths_of(model)
        for kind, of_layers in numbers.items():
            block = self._block(kind)
            for position, layer in enumerate(self.pruned_layers(model)):
                number = of_layers[position]
                score = torch.zeros(number) if scores is None else scores[kind][position]
                unit = unit_size(projection_parts(model, layer, widths[layer])[kind])
                ranked[kind].append(_block_means(score, max(1, number // block), block))
                sizes.append(block * unit)
                budget += means[kind] * unit
        together = [scores for of_kind in ranked.values() for scores in of_kind]
        try:
            counts = iter(spend_budget(together, sizes, budget))
        except ValueError as error:
            raise ValueError(
                f"{' and '.join(map(self._asked, numbers))} would leave {max(0, budget):.0f} "
                "parameters of the layers that are pruned, and one block each has "
                f"{sum(sizes):.0f}; lower a ratio"
            ) from error
        blocks = {kind: [next(counts) for _ in of_layers] for kind, of_layers in numbers.items()}
        if allowed:
            blocks["heads"] = _allowed_counts(blocks["heads"], ranked["heads"], allowed)
        return blocks

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
        skips = bool(self.skip_first + self.skip_last)
        if kind == "heads" and self.allocation == "uniform" and not skips:
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


def _block_means(score: Tensor, most: int, block: int) -> list[float]:
    """Return the mean score of a layer's blocks, of the best ones first; arguments of `_shares`."""
    best = score.double().sort(descending=True).values[: most * block]
    means: list[float] = best.view(most, block).mean(1).tolist()
    return means


def _allowed_counts(
    counts: Sequence[int], layers: Sequence[Sequence[float]], allowed: Collection[int]
) -> list[int]:
    """Return the numbers that layers keep, without one that all have and no config class accepts.

    The layer whose last kept score is lowest then loses that one.

    Args:
        counts: of each layer.
        layers: scores of each layer in descending order.
        allowed: numbers that all layers can have, if no other.
    """
    counts = [*counts]
    while len(set(counts)) == 1 and counts[0] not in allowed:
        last = [scores[count - 1] for scores, count in zip(layers, counts, strict=True)]
        counts[last.index(min(last))] -= 1
    return counts


def _best(scores: Sequence[Tensor], counts: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Return the indices of each layer's highest scores, by layer."""
    kept = [torch.topk(s, n).indices.sort().values for s, n in zip(scores, counts, strict=True)]
    return {str(i): tuple(k.tolist()) for i, k in enumerate(kept)}


def _share_kept(score: Tensor, kept: Sequence[int]) -> float:
    """Return the share of a layer's score in what it keeps."""
    return (score[[*kept]].sum() / score.sum().clamp(min=1e-30)).item()


def _lowest(score: Tensor, kept: Sequence[int]) -> float:
    """Return the lowest score of what a layer keeps."""
    return score[[*kept]].min().item()
