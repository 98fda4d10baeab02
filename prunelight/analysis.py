"""What a model's hidden states look like from layer to layer: a look before anything is pruned.

CKA of all pairs of layers (SLM, arXiv:2502.19159, Fig. 1), Block Influence, angular distance of all
windows (Gromov et al., arXiv:2403.17887, Fig. 4), token norms and the attention that goes to the
first token, where sinks are (Xiao et al., arXiv:2309.17453). One forward without the head, and
one of a few windows with plain attention, whose weights other kernels do not give.
"""

# B sequences, T tokens, D hidden, L layers

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunelight.architecture import decoder_layers, is_sliced
from prunelight.calibration import (
    Windows,
    check_windows,
    counted_positions,
    evaluating,
    first_positions,
    micro_batches,
    run_layers,
    split_windows,
    watching_layers,
)
from prunelight.plan import describe_model, describe_windows
from prunelight.scoring import angular_distance, check_finite, last_positions
from prunelight.shares import Ranks, ranks_of
from prunelight.statistics import CKA, MeanCosine, exact_median

KERNELS = ("linear", "rbf")
_ATTENTION_BATCHES = 4  # micro-batches whose attention weights are looked at
_ATTENTION_TOKENS = 256  # of each: weights are (B, heads, T, T)


@dataclass(frozen=True)
class Analysis:
    """What was found; states are those before layer 0 and after each layer, L + 1 of them.

    Attributes:
        model: facts about the model, as in a plan.
        calibration: facts about the windows.
        settings: kernel and ignored tokens.
        cka: of every pair of states, (L + 1, L + 1).
        block_influence: of each layer, in [0, 2].
        block_influence_first_token: of the first token of each window alone.
        angular_distance: row n - 1 holds the windows of n layers by their first layer, in [0, 1].
        token_norms: "median", "largest" and "first token" -> L + 1 norms.
        attention_to_first_token: of each layer, the share of attention that later tokens pay to
            the first, in [0, 1]; None for layers whose weights cannot be had.
    """

    model: dict[str, Any]
    calibration: dict[str, Any]
    settings: dict[str, Any]
    cka: list[list[float]]
    block_influence: list[float]
    block_influence_first_token: list[float]
    angular_distance: list[list[float]]
    token_norms: dict[str, list[float]]
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
        windows: token ids (N, T), or with an attention_mask.
        kernel: of CKA: "linear", or "rbf" with the median distance.
        ignore_first_tokens: tokens at the start of each window that do not count in CKA and Block
            Influence. Where the first is a sink, the linear kernel sees little else.

    Raises:
        ValueError: if an argument is out of its range, a hidden state is NaN or Inf, or no token
            counts.
        TypeError: if the decoder layers cannot be found, or the model is sliced.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel={kernel!r} must be one of {', '.join(KERNELS)}")
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
    seen = _Seen(len(decoder_layers(model)), kernel)
    with evaluating(model):
        for batch in micro_batches(model, windows, label="analysis"):
            mask = batch.get("attention_mask")
            counted = counted_positions(mask, batch["input_ids"].shape, ignore_first_tokens)
            if counted is None:
                counted = torch.ones_like(batch["input_ids"], dtype=torch.bool)
            seen.begin(batch, counted.to(model.device))
            with watching_layers(model, seen.visit):
                run_layers(model, batch)
            seen.end()
    seen.pool(ranks_of(windows))
    return Analysis(
        model=describe_model(model),
        calibration=describe_windows(*split_windows(windows)),
        settings={"kernel": kernel, "ignore_first_tokens": ignore_first_tokens},
        cka=seen.cka.result().tolist(),
        block_influence=[1 - layer.result() for layer in seen.cosines],
        block_influence_first_token=[1 - layer.first_result() for layer in seen.cosines],
        angular_distance=[(row / seen.samples).tolist() for row in seen.angles],
        token_norms=seen.token_norms(ranks_of(windows)),
        attention_to_first_token=attention_to_first_token(model, windows),
    )


class _Seen:
    """Sums over micro-batches; nothing here grows with the windows but one norm a token."""

    def __init__(self, num_layers: int, kernel: str) -> None:
        self.cka = CKA(num_layers + 1, kernel)
        self.cosines = [MeanCosine() for _ in range(num_layers)]
        self.angles = [torch.zeros(num_layers - n, dtype=torch.float64) for n in range(num_layers)]
        self.samples = 0
        self.norms: list[list[Tensor]] = [[] for _ in range(num_layers + 1)]
        self.first_norms: list[list[Tensor]] = [[] for _ in range(num_layers + 1)]

    def begin(self, batch: dict[str, Tensor], counted: Tensor) -> None:
        mask = batch.get("attention_mask")
        self.counted, self.first = counted, first_positions(mask)
        self.real = torch.ones_like(counted) if mask is None else mask.bool()
        self.last = last_positions(batch)
        self.kernels: list[Tensor] = []
        self.ends: list[Tensor] = []

    def visit(self, index: int, inputs: Tensor, outputs: Tensor) -> None:
        cosine = self.cosines[index]
        cosine.update(inputs, outputs, self.counted, self.first)
        check_finite(index, cosine.total + cosine.first_total, outputs)
        for place, state in ((0, inputs), (index + 1, outputs)):
            if place == 0 and index > 0:
                continue
            self.kernels.append(self.cka.kernels(state[self.counted]))
            self.ends.append(state[self.last])
            norms = torch.linalg.vector_norm(state, dim=-1, dtype=torch.float32)
            first = norms[:, 0] if self.first is None else norms[self.first]
            self.norms[place].append(norms[self.real].cpu())
            self.first_norms[place].append(first.cpu())

    def end(self) -> None:
        self.cka.add(self.kernels)
        states = torch.stack(self.ends)  # (L + 1, B, D)
        self.samples += states.shape[1]
        for size, row in enumerate(self.angles, start=1):
            row += angular_distance(states[:-size], states[size:]).sum(1).double().cpu()

    def pool(self, ranks: Ranks) -> None:
        """Add up the sums of all ranks, in place; norms stay those of this one."""
        self.cka.pool(ranks)
        for cosine in self.cosines:
            cosine.pool(ranks)
        self.samples = int(ranks.totals(self.samples)[0])
        self.angles = [ranks.sum(row) for row in self.angles]

    def token_norms(self, ranks: Ranks) -> dict[str, list[float]]:
        firsts = [ranks.gather(torch.cat(norms).tolist()) for norms in self.first_norms]
        largest = [ranks.gather(torch.cat(norms).max().item()) for norms in self.norms]
        return {
            "median": [exact_median(partial(iter, norms), ranks) for norms in self.norms],
            "largest": [max(values) for values in largest],
            "first token": [
                torch.tensor([*chain.from_iterable(values)]).mean().item() for values in firsts
            ],
        }


@torch.no_grad()
def attention_to_first_token(model: PreTrainedModel, windows: Windows) -> list[float | None]:
    """Return for each layer the mean share of attention that tokens pay to the first one.

    Over all heads and all later tokens that are no padding, of a few windows cut to 256 tokens;
    None for layers without attention weights.

    Args:
        model: unchanged.
        windows: token ids (N, T), or with an attention_mask.
    """
    ids, mask = split_windows(windows)
    mask = torch.ones_like(ids) if mask is None else mask
    # From each window's first real token on.
    start = int(mask.argmax(1).min())
    part = slice(start, start + _ATTENTION_TOKENS)
    cut = {"input_ids": ids[:, part], "attention_mask": mask[:, part]}
    sums = [[0.0, 0] for _ in decoder_layers(model)]
    with evaluating(model), _plain_attention(model):
        for batch in islice(micro_batches(model, cut, tokens=1024), _ATTENTION_BATCHES):
            real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            first = real.int().argmax(1)
            later = real & (real.cumsum(1) > 1)  # (B, T)
            with _watching_attention(model, sums, first, later):
                run_layers(model, batch)
    return [total / count if count else None for total, count in sums]


@contextmanager
def _plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let attention run as plain products, whose weights can be seen."""
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation("eager")
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def _watching_attention(
    model: PreTrainedModel, sums: list[list[Any]], first: Tensor, later: Tensor
) -> Iterator[None]:
    handles = []
    for layer, own in zip(decoder_layers(model), sums, strict=True):

        def add(module: nn.Module, args: Any, output: Any, own: list[Any] = own) -> None:
            weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if isinstance(weights, Tensor) and weights.shape[2:] == (*later.shape[1:],) * 2:
                to_first = weights[torch.arange(len(first)), :, :, first].float().mean(1)  # (B, T)
                own[0] += to_first[later].sum().item()
                own[1] += int(later.sum())

        handles += [m.register_forward_hook(add) for m in layer.modules() if m is not layer]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
