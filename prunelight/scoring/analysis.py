"""What a model's hidden states look like from layer to layer: a look before anything is pruned.

CKA of all pairs of layers (SLM, arXiv:2502.19159, Fig. 1), Block Influence, angular distance of all
windows (Gromov et al., arXiv:2403.17887, Fig. 4), token norms and the attention that goes to the
first token, where sinks are (Xiao et al., arXiv:2309.17453). One forward without the head, and
one of a few windows with plain attention, whose weights other kernels do not give.
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
from prunelight.runtime.processes import ProcessGroup
from prunelight.scoring.angular_distance import angular_distance

KERNELS = ("linear", "rbf")

_ATTENTION_BATCHES = 4  # micro-batches whose attention weights are looked at

_ATTENTION_TOKENS = 256  # of each: weights are (B, heads, T, T)


@dataclass(frozen=True)
class Analysis:
    """What was found; states are those before layer 0 and after each layer, L + 1 of them."""

    model: dict[str, Any]  # facts, as in a plan
    calibration: dict[str, Any]
    settings: dict[str, Any]
    cka: list[list[float]]  # of every pair of states, (L + 1, L + 1)
    block_influence: list[float]  # of each layer, in [0, 2]
    block_influence_first_token: list[float]  # of the first token of each window alone
    # Row n - 1 holds the windows of n layers by their first layer, in [0, 1].
    angular_distance: list[list[float]]
    token_norms: dict[str, list[float]]  # "median", "largest" and "first token" -> L + 1 norms
    # Share of attention that later tokens pay to the first; None where weights cannot be had.
    attention_to_first_token: list[float | None]


@torch.no_grad()
def analyze(
    model: PreTrainedModel,
    windows: Windows,
    *,
    kernel: Literal["linear", "rbf"] = "linear",
    ignore_first_tokens: int = 1,
) -> Analysis:
    """Look at a model's hidden states; the model is unchanged.

    Args:
        model: any causal language model whose decoder layers can be found.
        windows: as for a plan.
        kernel: of CKA: "linear", or "rbf" with the median distance.
        ignore_first_tokens: tokens at the start of each window that do not count in CKA and Block
            Influence. Where the first is a sink, the linear kernel sees little else.

    Raises:
        ValueError: if an argument is out of its range, a hidden state is NaN or Inf, or no token
            counts.
        TypeError: if the decoder layers cannot be found, or the model is sliced.
    """
    check_choice("kernel", kernel, KERNELS)
    if is_sliced(model):
        raise TypeError(
            "this model is sliced: its layers hand on states in bases of their own, which cannot "
            "be compared; analyze the dense one"
        )
    check_windows(model, windows)
    ids, _ = split_windows(windows)
    if not 0 <= ignore_first_tokens < ids.shape[1]:
        raise ValueError(
            f"ignore_first_tokens={ignore_first_tokens} must lie in [0, {ids.shape[1] - 1}], less "
            "than a window holds"
        )
    seen = _StateSums(len(decoder_layers(model)), kernel)
    with evaluating(model):
        for batch in micro_batches(model, windows, label="analysis"):
            seen.add(model, batch, ignore_first_tokens)
    seen.pool(group_of(windows))
    return Analysis(
        model=describe_model(model),
        calibration=describe_windows(*split_windows(windows)),
        settings={"kernel": kernel, "ignore_first_tokens": ignore_first_tokens},
        cka=seen.cka.result().tolist(),
        block_influence=[1 - layer.result() for layer in seen.cosines],
        block_influence_first_token=[1 - layer.first_result() for layer in seen.cosines],
        angular_distance=[(row / seen.samples).tolist() for row in seen.angles],
        token_norms=seen.token_norms(group_of(windows)),
        attention_to_first_token=attention_to_first_token(model, windows),
    )


class _StateSums:
    """Sums over micro-batches; nothing here grows with the windows but one norm a token."""

    def __init__(self, num_layers: int, kernel: str) -> None:
        self.cka = CKA(num_layers + 1, kernel)
        self.cosines = [MeanCosine() for _ in range(num_layers)]
        self.angles = [torch.zeros(num_layers - n, dtype=torch.float64) for n in range(num_layers)]
        self.samples = 0
        self.norms: list[list[Tensor]] = [[] for _ in range(num_layers + 1)]
        self.first_norms: list[list[Tensor]] = [[] for _ in range(num_layers + 1)]

    def add(self, model: PreTrainedModel, batch: dict[str, Tensor], ignored: int) -> None:
        """Run the model once."""
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        counted = counted_positions(mask, mask.shape, ignored)
        first, last, real = first_positions(mask), last_positions(batch), mask.bool()
        kernels: list[Tensor] = []
        ends: list[Tensor] = []

        def visit(index: int, inputs: Tensor, outputs: Tensor) -> None:
            cosine = self.cosines[index]
            cosine.update(inputs, outputs, counted, first)
            check_finite(index, cosine.total + cosine.first_total, outputs)
            for state in (inputs, outputs)[index > 0 :]:
                place = len(kernels)
                kernels.append(self.cka.kernels(state[counted]))
                ends.append(state[last])
                norms = torch.linalg.vector_norm(state, dim=-1, dtype=torch.float32)
                self.norms[place].append(norms[real].cpu())
                self.first_norms[place].append(norms[first].cpu())

        with watching_layers(model, visit):
            forward_without_head(model, batch)
        self.cka.add(kernels)
        states = torch.stack(ends)  # (L + 1, B, D)
        self.samples += states.shape[1]
        for size, row in enumerate(self.angles, start=1):
            row += angular_distance(states[:-size], states[size:]).sum(1).cpu().double()

    def pool(self, group: ProcessGroup) -> None:
        """Add up the sums of all ranks, in place; norms stay those of this one."""
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
    """Return for each layer the mean share of attention that tokens pay to the first one.

    Over all heads and all later tokens that are no padding, of a few windows cut to 256 tokens;
    None for layers without attention weights. The model is unchanged.
    """
    ids, mask = split_windows(windows)
    mask = torch.ones_like(ids) if mask is None else mask
    # From each window's first real token on.
    start = int(mask.argmax(1).min())
    part = slice(start, start + _ATTENTION_TOKENS)
    cut = {"input_ids": ids[:, part], "attention_mask": mask[:, part]}
    sums = [[0.0, 0] for _ in decoder_layers(model)]

    def add(own: list[Any], module: nn.Module, args: Any, output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if isinstance(weights, Tensor) and weights.shape[2:] == (*later.shape[1:],) * 2:
            to_first = weights[torch.arange(len(first)), :, :, first].float().mean(1)  # (B, T)
            own[0] += to_first[later].sum().item()
            own[1] += int(later.sum())

    with evaluating(model), ExitStack() as undo:
        # As plain products, whose weights can be seen.
        undo.callback(model.set_attn_implementation, model.config._attn_implementation)
        model.set_attn_implementation("eager")
        for layer, own in zip(decoder_layers(model), sums, strict=True):
            for module in [*layer.modules()][1:]:
                undo.enter_context(module.register_forward_hook(partial(add, own)))
        for batch in islice(micro_batches(model, cut, tokens=1024), _ATTENTION_BATCHES):
            real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            first = real.int().argmax(1)
            later = real & (real.cumsum(1) > 1)  # (B, T)
            forward_without_head(model, batch)
    return [total / count if count else None for total, count in sums]
