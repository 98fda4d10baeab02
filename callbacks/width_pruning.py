"""Width pruning: fewer attention heads and MLP neurons, the same number in every layer.

The result is a stock model. SLM (arXiv:2502.19159) reports depth pruning followed by width pruning.
Whole key-value groups are removed, with their query heads. Each layer keeps its own best groups and
neurons. prunelight/scoring/width_scores.py defines the scores.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunelight.calibration.windows import Windows, check_windows
from prunelight.callbacks.base import PruningCallback
from prunelight.planning.plan import Plan
from prunelight.planning.steps import PruneWidth
from prunelight.pruning.prune_width import check_width
from prunelight.run.method import PruningMethod
from prunelight.run.run_state import Run
from prunelight.runtime.arguments import check_choice
from prunelight.scoring.width_scores import SCORES, allowed_groups, width_scores, widths_of

log = logging.getLogger(__name__)

FIELDS: dict[str, str] = {"heads": "num_key_value_heads", "neurons": "intermediate_size"}


class WidthPruning(PruningCallback):
    """Prune attention heads and MLP neurons to uniform widths.

    Args:
        neuron_ratio: share of the MLP neurons to remove, in [0, 1); the number kept is rounded to
            the nearest multiple of `multiple`.
        head_ratio: share of the key-value groups to remove, in [0, 1); the number kept is rounded
            to the nearest one that the config class accepts.
        intermediate_size: number of neurons to keep, instead of `neuron_ratio`.
        num_key_value_heads: number of key-value groups to keep, instead of `head_ratio`.
        score: "wanda", "fluctuation" (FLAP) or "taylor" (LLM-Pruner; needs gradients).
        multiple: what the number of neurons must be a multiple of, for fast kernels.
        correction: fit the output projections by least squares on the calibration windows, to
            give what they gave with all inputs.

    Raises:
        ValueError: if an argument is out of its range, two arguments set the same width, or no
            argument sets one.
    """

    follows_slicing = True

    def __init__(
        self,
        neuron_ratio: float | None = None,
        head_ratio: float | None = None,
        intermediate_size: int | None = None,
        num_key_value_heads: int | None = None,
        score: Literal["taylor", "wanda", "fluctuation"] = "wanda",
        multiple: int = 64,
        correction: bool = True,
    ) -> None:
        pairs = (
            ("neuron_ratio", neuron_ratio, "intermediate_size", intermediate_size),
            ("head_ratio", head_ratio, "num_key_value_heads", num_key_value_heads),
        )
        for name, ratio, other, number in pairs:
            if ratio is not None and number is not None:
                raise ValueError(f"{name}={ratio} and {other}={number}: give one of the two")
            if ratio is not None and not 0 <= ratio < 1:
                raise ValueError(f"{name}={ratio} must lie in [0, 1); 0.2 removes one in five")
            if number is not None and number < 1:
                raise ValueError(f"{other}={number} must be at least 1")
        if all(x is None for x in (*pairs[0][1::2], *pairs[1][1::2])):
            raise ValueError("nothing to prune: give neuron_ratio, head_ratio, or what is left")
        check_choice("score", score, SCORES)
        if multiple < 1:
            raise ValueError(f"multiple={multiple} must be at least 1")
        if intermediate_size is not None and intermediate_size % multiple:
            near = max(1, round(intermediate_size / multiple)) * multiple
            raise ValueError(
                f"intermediate_size={intermediate_size} must be a multiple of {multiple}; take "
                f"{near}, or set multiple"
            )
        self.neuron_ratio, self.head_ratio = neuron_ratio, head_ratio
        self.intermediate_size, self.num_key_value_heads = intermediate_size, num_key_value_heads
        self.score, self.multiple, self.correction = score, multiple, correction

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError or TypeError if the model cannot take the widths asked for."""
        layers = [str(i) for i in range(model.config.num_hidden_layers)]
        counts, before = self._targets(model), widths_of(model).fields
        kept = {kind: dict.fromkeys(layers, (*range(n),)) for kind, n in counts.items()}
        check_width(model, PruneWidth(kept.get("heads", {}), kept.get("neurons", {})))
        for kind, name in (("heads", "head_ratio"), ("neurons", "neuron_ratio")):
            if getattr(self, name) and counts[kind] == before[FIELDS[kind]]:
                log.warning("%s=%s removes none of %d", name, getattr(self, name), counts[kind])

    def widths(self, model: PreTrainedModel) -> dict[str, int]:
        """Return how many inputs the output projections of attention and MLP keep."""
        before = widths_of(model)
        inputs = {
            "neurons": ("intermediate_size", 1),
            "heads": ("num_attention_heads * head_dim", before.heads * before.head_dim),
        }
        return {inputs[k][0]: count * inputs[k][1] for k, count in self._targets(model).items()}

    def check_run(self, run: Run, methods: Sequence[PruningMethod]) -> None:
        """Raise ValueError if an earlier method drops sublayers."""
        for other in methods[: methods.index(self)]:
            if other.drops_sublayers:
                raise ValueError(
                    f"{type(other).__name__} drops sublayers before WidthPruning; put "
                    "WidthPruning before it"
                )

    @torch.no_grad()
    def plan(self, model: PreTrainedModel, windows: Windows) -> Plan:
        """Choose the groups and neurons that every layer keeps; the model is unchanged.

        Raises:
            ValueError: if the arguments or the windows do not fit the model, or activations or
                gradients are NaN or Inf.
            TypeError: if the attention and MLP modules of the family are not known.
        """
        self.check(model)
        check_windows(model, windows)
        counts, before = self._targets(model), widths_of(model).fields
        kept: dict[str, dict[str, tuple[int, ...]]] = {}
        kept_shares: dict[str, list[float]] = {}
        widths: dict[str, int] = {}
        for kind, scores in width_scores(model, windows, self.score, [*counts]).items():
            kept[kind], kept_shares[f"share_of_{kind}_score_kept"] = _best(scores, counts[kind])
            field = FIELDS[kind]
            widths |= {field: counts[kind], f"{field}_before": before[field]}
        step = PruneWidth(kept.get("heads", {}), kept.get("neurons", {}), self.correction)
        return self.make_plan(model, windows, step, scores=kept_shares, found=widths)

    def _targets(self, model: PreTrainedModel) -> dict[str, int]:
        """Return how many groups ("heads") and neurons each layer keeps, of the kinds to prune."""
        widths, counts = widths_of(model), dict[str, int]()
        if self.num_key_value_heads is not None:
            counts["heads"] = self.num_key_value_heads
        if self.head_ratio is not None:
            groups = widths.groups * (1 - self.head_ratio)
            counts["heads"] = min(allowed_groups(model), key=lambda count: abs(count - groups))
        if self.intermediate_size is not None:
            counts["neurons"] = self.intermediate_size
        if self.neuron_ratio is not None:
            most = max(1, widths.neurons // self.multiple)
            neurons = widths.neurons * (1 - self.neuron_ratio)
            counts["neurons"] = min(max(1, round(neurons / self.multiple)), most) * self.multiple
        if counts.get("neurons", 0) > widths.neurons:
            raise ValueError(
                f"intermediate_size={counts['neurons']} must be at most the model's "
                f"{widths.neurons}; lower it, or multiple={self.multiple}"
            )
        return counts


def _best(scores: list[Tensor], count: int) -> tuple[dict[str, tuple[int, ...]], list[float]]:
    """Return the `count` highest scores' indices of each layer, and their share of its scores."""
    kept = [torch.topk(score, count).indices.sort().values for score in scores]
    shares = [
        (score[k].sum() / score.sum().clamp(min=1e-30)).item()
        for score, k in zip(scores, kept, strict=True)
    ]
    return {str(i): tuple(k.tolist()) for i, k in enumerate(kept)}, shares
