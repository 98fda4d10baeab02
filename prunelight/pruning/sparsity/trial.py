"""Tries zeros: a sparse model's perplexity on held-out windows; the model does not change."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from transformers import PreTrainedModel

from prunelight.calibration.layer_walk import LayerWalk
from prunelight.calibration.shared_windows import group_of, own_windows, share_windows
from prunelight.calibration.windows import Windows, next_token_labels, split_windows
from prunelight.losses import next_token_sums
from prunelight.models.families.matrices import Matrix, layer_matrices
from prunelight.planning.steps import Sparsify
from prunelight.pruning.sparsity.sparsify import (
    SparsifyOutcome,
    check_step,
    sparsify_layer,
    zero_by_magnitude,
)

_HELD_OUT = 4  # one window in four judges


def held_out_windows(windows: Windows) -> tuple[Windows, Windows]:
    """Return the windows that give statistics, and those at the end that judge: one in four.

    The processes that share the windows share both parts. Each process feeds the whole of a part
    that has too few windows to share, so that the split does not depend on their number.

    Raises:
        ValueError: if there is only one window.
    """
    total, group = len(split_windows(windows)[0]), group_of(windows)
    if total < 2:
        raise ValueError(
            f"{total} calibration window cannot be split into those that give statistics and those "
            "that judge; give two or more"
        )
    first = total - max(1, total // _HELD_OUT)

    def part(rows: slice, count: int) -> Windows:
        if not isinstance(windows, Mapping):
            return windows[rows]
        values = {name: value[rows] for name, value in windows.items()}
        return share_windows(values, group) if count >= group.size else values

    return part(slice(first), first), part(slice(first, None), total - first)


@torch.no_grad()
def sparse_perplexity(
    model: PreTrainedModel,
    windows: Windows,
    held_out: Windows,
    step: Sparsify,
    *,
    device: torch.device | None = None,
    offload: bool = False,
) -> float:
    """Return the perplexity of the model after a sparsify step, on windows its solver does not see.

    Args:
        model: unchanged; the matrices of one layer at a time exist twice.
        windows: calibration windows of the solver; magnitude reads none.
        held_out: windows that judge.
        step: which matrices, how many zeros, by which solver.
        device: where the layers compute, one at a time.
        offload: keep the calibration states on the CPU.

    Raises:
        ValueError: if the step does not fit the model, the held-out windows have no token to
            predict, or the loss is NaN or Inf.
    """
    check_step(model, step)
    labels = next_token_labels(own_windows(held_out))
    outcome = SparsifyOutcome()
    with ExitStack() as stack:

        def walk_of(walked: Windows) -> LayerWalk:
            walk = LayerWalk(model, walked, device=device, offload=offload, label="try")
            return stack.enter_context(walk)

        judged = walk_of(held_out)
        labels = labels.to(judged.device)
        solved = None if step.solver == "magnitude" else walk_of(windows)
        for index, layer in (solved or judged).layers():
            with _restored([m for m in layer_matrices(model, index) if m.name in step.sparsity]):
                if solved is not None:
                    sparsify_layer(model, step, solved, index, outcome, count_outliers=False)
                else:
                    for matrix in layer_matrices(model, index):
                        zero_by_magnitude(matrix, step)
                for batch, state in enumerate(judged.states):
                    output = judged.call(layer, index, batch, state)
                    judged.states[batch] = output.to(judged.store)
        total, tokens, start = 0.0, 0, 0
        for state in judged.states:
            logits = judged.finish(state, head=True)
            nll, _, predicted = next_token_sums(logits, labels[start : start + len(state)])
            total, tokens = total + nll.item(), tokens + int(predicted)
            start += len(state)
        loss, predicted_tokens = judged.group.totals(total, tokens)
    if not (predicted_tokens and math.isfinite(loss)):
        raise ValueError(
            f"the windows held out cannot judge zeros: {predicted_tokens:.0f} tokens to predict, "
            f"loss {loss}; give other calibration text, or one alpha"
        )
    return math.exp(min(loss / predicted_tokens, 700.0))


@contextmanager
def _restored(matrices: Sequence[Matrix]) -> Iterator[None]:
    """Give matrices their weights back on exit, on errors too."""
    weights = [matrix.parameter.detach().clone() for matrix in matrices]
    try:
        yield
    finally:
        for matrix, weight in zip(matrices, weights, strict=True):
            matrix.parameter.detach().copy_(weight)
