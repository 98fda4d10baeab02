"""An analysis of a model's hidden states from layer to layer, before anything is pruned.

It holds CKA of all pairs of layers (SLM, arXiv:2502.19159, Fig. 1), Block Influence, angular
distance over every run of layers (Gromov et al., arXiv:2403.17887, Fig. 4), norms of tokens, and
the share of attention to the first token, where sinks are (Xiao et al., arXiv:2309.17453). It costs
one forward without the head, and one of a few windows with eager attention: other kernels do not
return attention weights.
"""

# B sequences, T tokens, D hidden, L layers

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunelight.calibration.cka import CKA
from prunelight.calibration.layer_readers import LayerReader, read_layers
from prunelight.calibration.shared_windows import group_of
from prunelight.calibration.statistics import exact_median
from prunelight.calibration.windows import (
    Windows,
    check_windows,
    counted_positions,
    first_positions,
    micro_batches,
    split_windows,
)
from prunelight.models.families.architectures import is_sliced
from prunelight.models.families.layers import decoder_layers
from prunelight.models.placement import compute_device
from prunelight.planning.fingerprints import describe_model, describe_windows
from prunelight.runtime.arguments import check_choice
from prunelight.runtime.finite import check_is_model
from prunelight.scoring.angular_distance import AngularReader
from prunelight.scoring.block_influence import BlockInfluenceReader

KERNELS = ("linear", "rbf")

_ATTENTION_TOKENS = 4096  # of the windows whose attention weights are averaged

_ATTENTION_LENGTH = 256  # T of these windows: attention weights are (B, heads, T, T)


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
    influences = BlockInfluenceReader(model, windows, ignore_first_tokens=ignore_first_tokens)
    angles = AngularReader(model, windows)
    states = _StatesReader(model, windows, kernel, ignore_first_tokens)
    read_layers(model, windows, [influences, angles, states], label="analysis")
    influence = influences.result()
    distances = angles.result(range(1, len(decoder_layers(model)) + 1))
    return Analysis(
        model=describe_model(model),
        calibration=describe_windows(*split_windows(windows)),
        settings={"kernel": kernel, "ignore_first_tokens": ignore_first_tokens},
        cka=states.cka.result().tolist(),
        block_influence=influence.mean,
        block_influence_first_token=influence.first_token,
        angular_distance=[*distances.values()],
        token_norms=states.token_norms(),
        attention_to_first_token=attention_to_first_token(model, windows),
    )


class _StatesReader(LayerReader):
    """Reads how alike hidden states are, and how long.

    One number a token grows with the windows, and the kernels of CKA where layers compute one after
    another: 1 to 2 KB a token and state, on the CPU.

    Args:
        model: whose layers are read.
        windows: all that will be read.
        kernel: of CKA.
        ignored: tokens at the start of each window that do not count in CKA.
    """

    def __init__(self, model: PreTrainedModel, windows: Windows, kernel: str, ignored: int) -> None:
        self._group, self._num_layers = group_of(windows), len(decoder_layers(model))
        self.cka = CKA(self._num_layers + 1, kernel)
        place = compute_device(model)
        # Bool (B, T) of each micro-batch: tokens that count, that are first, that are no padding.
        self._tokens: list[tuple[Tensor, Tensor, Tensor]] = []
        for batch in micro_batches(model, windows):
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).to(place)
            counted, first = counted_positions(mask, mask.shape, ignored), first_positions(mask)
            assert counted is not None
            assert first is not None
            self._tokens.append((counted, first, mask.bool()))
        self._kernels: list[list[Tensor]] = [[] for _ in self._tokens]  # of each micro-batch
        self._norms: list[list[Tensor]] = [[] for _ in range(self._num_layers + 1)]
        self._first_norms: list[list[Tensor]] = [[] for _ in range(self._num_layers + 1)]

    def visit(self, batch: int, index: int, inputs: Tensor, outputs: Tensor) -> None:
        """Keep kernels and norms of the states; add the kernels up when the last layer has them."""
        counted, first, real = self._tokens[batch]
        for place, state in ((index, inputs), (index + 1, outputs))[index > 0 :]:
            self._kernels[batch].append(self.cka.kernels(state[counted]).cpu())
            norms = torch.linalg.vector_norm(state, dim=-1, dtype=torch.float32)
            self._norms[place].append(norms[real].cpu())
            self._first_norms[place].append(norms[first].cpu())
        if index == self._num_layers - 1:
            self.cka.add(self._kernels[batch])
            self._kernels[batch].clear()

    def finish(self) -> None:
        """Add up the similarities of all ranks; norms stay those of this rank."""
        self.cka.pool(self._group)

    def token_norms(self) -> dict[str, list[float]]:
        """Return the norms of each state's tokens, of all ranks."""
        firsts = [self._group.gather(torch.cat(norms).tolist()) for norms in self._first_norms]
        largest = [self._group.gather(torch.cat(norms).max().item()) for norms in self._norms]
        return {
            "median": [exact_median(partial(iter, norms), self._group) for norms in self._norms],
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
    columns = slice(start, start + _ATTENTION_LENGTH)
    rows = slice(max(1, _ATTENTION_TOKENS // len(ids[0, columns])))
    cut_windows = {"input_ids": ids[rows, columns], "attention_mask": mask[rows, columns]}
    reader = _AttentionReader(model, cut_windows)
    with ExitStack() as undo:
        # Only eager attention returns its weights.
        undo.callback(model.set_attn_implementation, model.config._attn_implementation)
        model.set_attn_implementation("eager")
        read_layers(model, cut_windows, [reader], label="attention to first tokens")
    return [total / count if count else None for total, count in reader.sums]


class _AttentionReader(LayerReader):
    """Reads how much of the attention of later tokens goes to the first token.

    Attributes:
        sums: of each layer, the summed shares and the number of tokens.

    Args:
        model: with eager attention.
        windows: all that will be read, (N, T).
    """

    def __init__(self, model: PreTrainedModel, windows: Windows) -> None:
        self._layers, self._length = decoder_layers(model), split_windows(windows)[0].shape[1]
        self.sums = [[0.0, 0] for _ in self._layers]

    @contextmanager
    def watching(self, mask: Tensor | None, index: int | None) -> Iterator[None]:
        """Add up the attention weights that modules of the layers return inside."""
        with ExitStack() as undo:
            for each in range(len(self._layers)) if index is None else [index]:
                for module in [*self._layers[each].modules()][1:]:
                    hook = partial(self._add, each, mask)
                    undo.enter_context(module.register_forward_hook(hook))
            yield

    def _add(
        self, index: int, mask: Tensor | None, module: nn.Module, args: Any, output: Any
    ) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if not isinstance(weights, Tensor) or weights.shape[2:] != (self._length, self._length):
            return
        real = weights.new_ones(weights.shape[::2], dtype=torch.bool) if mask is None else mask
        first = real.int().argmax(1)
        later = real & (real.cumsum(1) > 1)  # (B, T)
        to_first = (
            weights[torch.arange(len(first), device=first.device), :, :, first].float().mean(1)
        )  # (B, T)
        self.sums[index][0] += to_first[later].sum().item()
        self.sums[index][1] += int(later.sum())
