"""Scores of experts in mixture-of-experts layers (REAP, arXiv:2510.13999).

Two scores of an expert are possible:
    reap       mean over the tokens routed to it of gate x norm of its output
    frequency  share of the tokens that are routed to it
"""

# T tokens, K experts of a token, E experts of a layer

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunelight.calibration.layer_readers import LayerReader, read_layers
from prunelight.calibration.shared_windows import group_of
from prunelight.calibration.windows import Windows, counted_tokens
from prunelight.models.families.experts.layout import experts_of
from prunelight.models.families.experts.routed import check_scorable, watching_experts
from prunelight.scoring.remembered import remembered

SCORES = ("reap", "frequency")


class RoutedSums:
    """Sums over the tokens that are routed to each expert of one layer.

    Attributes:
        saliency: sum of gate x norm of the output, (E,), float64.
        tokens: number of tokens, (E,), float64.
    """

    def __init__(self, num_experts: int) -> None:
        self.saliency = torch.zeros(num_experts, dtype=torch.float64)
        self.tokens = torch.zeros(num_experts, dtype=torch.float64)

    def update(self, indices: Tensor, gates: Tensor, norms: Tensor) -> None:
        """Add tokens: experts, gates and norms of their outputs, (T, K) each."""
        products = gates.float() * norms.float()
        experts = indices.flatten().cpu()
        self.saliency.index_add_(0, experts, products.flatten().cpu().double())
        self.tokens += torch.bincount(experts, minlength=len(self.tokens)).double()

    def reap(self) -> Tensor:
        """Return the mean of gate x norm over routed tokens, (E,); 0 where there are none."""
        return self.saliency / self.tokens.clamp(min=1)


@remembered
@torch.no_grad()
def expert_scores(
    model: PreTrainedModel, windows: Windows, score: str = "reap"
) -> dict[int, Tensor]:
    """Score the experts of every layer that has some, in one forward; the model is unchanged.

    Padding does not count. The gate is the weight by which the model multiplies the output.

    Args:
        model: with experts that `check_scorable` passes.
        windows: calibration windows.
        score: "reap" or "frequency".

    Returns:
        Decoder layer -> scores (E,), float32 on the CPU; 0 for an expert without tokens.

    Raises:
        ValueError: if gates or outputs are NaN or Inf; names the layer.
        TypeError: if the model has no experts, or they cannot be scored.
    """
    reader = ExpertReader(model, windows, norms=score == "reap")
    read_layers(model, windows, [reader], label="experts")
    return reader.result(score)


class ExpertReader(LayerReader):
    """Reads what `expert_scores` returns.

    Args:
        model: with experts that `check_scorable` passes.
        windows: all that will be read.
        norms: read outputs too, which "reap" needs; it costs the experts' forward once more.

    Raises:
        TypeError: if the model has no experts, or they cannot be scored.
    """

    def __init__(self, model: PreTrainedModel, windows: Windows, *, norms: bool = True) -> None:
        self._model, self._group, self._norms = model, group_of(windows), norms
        self._experts = experts_of(model)
        check_scorable(model, self._experts)
        self._sums = {layer: RoutedSums(self._experts.count) for layer in self._experts.layers}
        self._tokens = counted_tokens(windows)

    @contextmanager
    def watching(self, mask: Tensor | None, index: int | None) -> Iterator[None]:
        """Add what tokens that are no padding get from their experts."""
        counted = None if mask is None else mask.flatten()

        def visit(layer: int, indices: Tensor, gates: Tensor, norms: Tensor) -> None:
            if counted is not None:
                indices, gates, norms = (x[counted.to(x.device)] for x in (indices, gates, norms))
            self._sums[layer].update(indices, gates, norms)

        with watching_experts(self._model, self._experts, visit, norms=self._norms, layer=index):
            yield

    def finish(self) -> None:
        """Add up the sums of all ranks."""
        for of_layer in self._sums.values():
            of_layer.saliency = self._group.sum(of_layer.saliency)
            of_layer.tokens = self._group.sum(of_layer.tokens)

    def result(self, score: str) -> dict[int, Tensor]:
        """Return the scores by "reap" or "frequency".

        Raises:
            ValueError: if gates or outputs are NaN or Inf; names the layer.
        """
        scores = {}
        for layer, of_layer in self._sums.items():
            reap = score == "reap"
            values = of_layer.reap() if reap else of_layer.tokens / max(1, self._tokens)
            if not bool(values.isfinite().all()):
                raise ValueError(
                    f"gates or outputs of experts in decoder layer {layer} are NaN or Inf; load "
                    "the model in bfloat16 or float32, or check its weights"
                )
            scores[layer] = values.float()
        return scores
