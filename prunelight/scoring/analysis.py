"""An analysis of a model's hidden states from layer to layer, before anything is pruned.

It holds CKA of all pairs of layers (SLM, arXiv:2502.19159, Fig. 1), Block Influence, angular
distance over every run of layers (Gromov et al., arXiv:2403.17887, Fig. 4), norms of tokens, and
the share of attention to the first token, where sinks are (Xiao et al., arXiv:2309.17453). It costs
one forward without the head, and one of a few windows with eager attention: other kernels do not
return attention weights.
"""

# B sequences, T tokens, D hidden, L layers

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunelight.calibration.cka import CKA
from prunelight.calibration.shared_windows import group_of
from prunelight.calibration.statistics import MeanCosine, check_finite, exact_median
from prunelight.calibration.windows import (
    Windows,
    check_windows,
    counted_positions,
    first_positions,
    last_positions,
    micro_batches,
    split_windows,
)
from prunelight.models.families.architectures import is_sliced
from prunelight.models.families.layers import decoder_layers
from prunelight.models.forward import evaluating, forward_without_head, watching_layers
from prunelight.planning.fingerprints import describe_model, describe_windows
from prunelight.runtime.arguments import check_choice
from prunelight.runtime.finite import check_is_model
from prunelight.runtime.processes import ProcessGroup
from prunelight.scoring.angular_distance import angular_distance

KERNELS = ("linear", "rbf")

_ATTENTION_BATCHES = 4  # micro-batches whose attention weights are averaged

_ATTENTION_TOKENS = 256  # T of these micro-batches: attention weights are (B, heads, T, T)


@dataclass(frozen=True)
class Analysis:
    """The result of `analyze`; the L + 1 states are those before layer 0 and after each layer."""

    model: dict[str, Any]  # name, sizes and fingerprint, as in a plan
    calibration: dict[str, Any]  # windows, as in a plan
    settings: dict[str, Any]  # arguments of `analyze`
    cka: list[list[float]]  # of every pair of states, (L + 1, L + 1)
    block_influence: list[float]  # of each layer, in [0, 2]
    block_influence_first_token: list[float]  # of the first token of each window alone
    # Row n - 1 holds the distances over n consecutive layers, by their first layer; in [0, 1].
    angular_distance: list[list[float]]
    token_norms: dict[str, list[float]]  # "median", "largest" and "first token" -> L + 1 norms
    # Of each layer, the share of later tokens' attention to the first; None without weights.
    attention_to_first_token: list[float | None]


@torch.no_grad()
def analyze(
    model: PreTrainedModel,
    windows: Windows,
    *,
    kernel: Literal["linear", "rbf"] = "linear",
    ignore_first_tokens: int = 1,
) -> Analysis:
    """Analyze a model's hidden states; the model is unchanged.

    Args:
        model: any causal language model whose decoder layers can be found.
        windows: calibration windows, as for a plan.
        kernel: kernel of CKA: "linear", or "rbf", whose width is the median distance.
        ignore_first_tokens: tokens at the start of each window that do not count in CKA and Block
            Influence. Where the first token is a sink, it dominates CKA with the linear kernel.

    Raises:
        ValueError: if an argument is out of its range, a hidden state is NaN or Inf, or no token
            counts.
        TypeError: if the decoder layers cannot be found, or the model is sliced.
    """
    check_is_model(model)
    check_choice("kernel", kernel, KERNELS)
    if is_sliced(model):
        raise TypeError(
            "this model is sliced: each of its layers has hidden states in a basis of its own, "
            "which cannot be compared; analyze the dense one"
        )
    check_windows(model, windows)
    ids, _ = split_windows(windows)
    if not 0 <= ignore_first_tokens < ids.shape[1]:
        raise ValueError(
            f"ignore_first_tokens={ignore_first_tokens} must lie in [0, {ids.shape[1] - 1}], less "
            "than a window holds"
        )
    sums = _StateSums(len(decoder_layers(model)), kernel)
    with evaluating(model):
        for batch in micro_batches(model, windows, label="analysis"):
            sums.add(model, batch, ignore_first_tokens)
    sums.pool(group_of(windows))
    return Analysis(
        model=describe_model(model),
        calibration=describe_windows(*split_windows(windows)),
        settings={"kernel": kernel, "ignore_first_tokens": ignore_first_tokens},
        cka=sums.cka.result().tolist(),
        block_influence=[1 - cosine.result() for cosine in sums.cosines],
        block_influence_first_token=[1 - cosine.first_result() for cosine in sums.cosines],
        angular_distance=[(row / sums.samples).tolist() for row in sums.angles],
        token_norms=sums.token_norms(group_of(windows)),
        attention_to_first_token=attention_to_first_token(model, windows),
    )


class _StateSums:
    """Sums over micro-batches; only `norms`, one number a token, grow with the windows."""

    def __init__(self, num_layers: int, kernel: str) -> None:
        self.cka = CKA(num_layers + 1, kernel)
        self.cosines = [MeanCosine() for _ in range(num_layers)]
        self.angles = [torch.zeros(num_layers - n, dtype=torch.float64) for n in range(num_layers)]
        self.samples = 0
        self.norms: list[list[Tensor]] = [[] for _ in range(num_layers + 1)]
        self.first_norms: list[list[Tensor]] = [[] for _ in range(num_layers + 1)]

    def add(self, model: PreTrainedModel, batch: dict[str, Tensor], ignored: int) -> None:
        """Run the model on one micro-batch and add its hidden states."""
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        counted = counted_positions(mask, mask.shape, ignored)
        first, last, real = first_positions(mask), last_positions(batch), mask.bool()
        kernels: list[Tensor] = []
        ends: list[Tensor] = []

        def visit(index: int, inputs: Tensor, outputs: Tensor) -> None:
            cosine = self.cosines[index]
            cosine.update(inputs, outputs, counted, first)
            cosine.settle()
            check_finite(index, cosine.total + cosine.first_total, outputs)
            for state in (inputs, outputs)[index > 0 :]:  # the inputs only of layer 0
                state_index = len(kernels)
                kernels.append(self.cka.kernels(state[counted]))
                ends.append(state[last])
                norms = torch.linalg.vector_norm(state, dim=-1, dtype=torch.float32)
                self.norms[state_index].append(norms[real].cpu())
                self.first_norms[state_index].append(norms[first].cpu())

        with watching_layers(model, visit):
            forward_without_head(model, batch)
        self.cka.add(kernels)
        states = torch.stack(ends)  # (L + 1, B, D)
        self.samples += states.shape[1]
        for size, row in enumerate(self.angles, start=1):
            row += angular_distance(states[:-size], states[size:]).sum(1).cpu().double()

    def pool(self, group: ProcessGroup) -> None:
        """Add up the sums of all ranks, in place; `norms` stay those of this rank."""
        self.cka.pool(group)
        for cosine in self.cosines:
            cosine.pool(group)
        self.samples = int(group.totals(self.samples)[0])
        self.angles = [group.sum(row) for row in self.angles]

    def token_norms(self, group: ProcessGroup) -> dict[str, list[float]]:
        firsts = [group.gather(torch.cat(norms).tolist()) for norms in self.first_norms]
        largest = [group.gather(torch.cat(norms).max().item()) for norms in self.norms]
        return {
            "median": [exact_median(partial(iter, norms), group) for norms in self.norms],
            "largest": [max(values) for values in largest],
            "first token": [
                torch.tensor([*chain.from_iterable(values)]).mean().item() for values in firsts
            ],
        }


@torch.no_grad()
def attention_to_first_token(model: PreTrainedModel, windows: Windows) -> list[float | None]:
    """Return for each layer the mean share of attention that later tokens pay to the first token.

    The mean is over all heads and all later tokens that are no padding, of a few windows cut to 256
    tokens. It is None for layers without attention weights. The model is unchanged.
    """
    ids, mask = split_windows(windows)
    mask = torch.ones_like(ids) if mask is None else mask
    # Windows are cut from the first column that holds a real token.
    start = int(mask.argmax(1).min())
    columns = slice(start, start + _ATTENTION_TOKENS)
    cut_windows = {"input_ids": ids[:, columns], "attention_mask": mask[:, columns]}
    sums = [[0.0, 0] for _ in decoder_layers(model)]  # summed shares and number of tokens

    def add(layer_sums: list[Any], module: nn.Module, args: Any, output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if isinstance(weights, Tensor) and weights.shape[2:] == (*later.shape[1:],) * 2:
            to_first = weights[torch.arange(len(first)), :, :, first].float().mean(1)  # (B, T)
            layer_sums[0] += to_first[later].sum().item()
            layer_sums[1] += int(later.sum())

    with evaluating(model), ExitStack() as undo:
        # Only eager attention returns its weights.
        undo.callback(model.set_attn_implementation, model.config._attn_implementation)
        model.set_attn_implementation("eager")
        for layer, layer_sums in zip(decoder_layers(model), sums, strict=True):
            for module in [*layer.modules()][1:]:
                undo.enter_context(module.register_forward_hook(partial(add, layer_sums)))
        for batch in islice(micro_batches(model, cut_windows, tokens=1024), _ATTENTION_BATCHES):
            real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            first = real.int().argmax(1)
            later = real & (real.cumsum(1) > 1)  # (B, T)
            forward_without_head(model, batch)
    return [total / count if count else None for total, count in sums]
