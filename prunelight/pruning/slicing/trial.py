"""Tries a slicing: its perplexity for the cost of one slicing; the model does not change."""

from __future__ import annotations

import math

import torch
from transformers import PreTrainedModel

from prunelight.calibration.layer_walk import LayerWalk
from prunelight.calibration.shared_windows import first_own_window, own_windows
from prunelight.calibration.windows import Windows, first_windows, next_token_labels, split_windows
from prunelight.losses import next_token_sums
from prunelight.planning.steps import SliceHidden
from prunelight.pruning.slicing.slice_hidden import Slicer, check_tokens


@torch.no_grad()
def sliced_perplexity(
    model: PreTrainedModel,
    windows: Windows,
    step: SliceHidden,
    held_out: int,
    *,
    device: torch.device | None = None,
    offload: bool = False,
) -> float:
    """Return the perplexity of the model after a slice step, on windows held out from the fit.

    Args:
        model: unchanged; one of its layers at a time exists twice.
        windows: calibration windows (N, T), or with an attention_mask.
        step: with rotation "per_layer".
        held_out: number of windows at the end that judge; the others give the components.
        device: where the layers compute, one at a time.
        offload: keep the calibration states on the CPU.

    Raises:
        ValueError: if the other windows hold too few tokens, the held-out windows none to predict,
            or states or logits are NaN or Inf.
    """
    fitted = len(split_windows(windows)[0]) - held_out
    check_tokens(model, first_windows(windows, fitted), step.residual_dims[0])
    labels = next_token_labels(own_windows(windows))
    total, tokens, start = torch.zeros((), dtype=torch.float64), 0, 0
    with LayerWalk(model, windows, device=device, offload=offload, label="try") as walk:
        labels = labels.to(walk.device)
        fitted -= first_own_window(windows)  # of this process's rows: none, some or all
        counted = walk.positions()
        for positions in counted:
            rows = torch.arange(start, start + len(positions), device=positions.device)
            positions &= (rows < fitted)[:, None]
            start += len(positions)
        for _ in Slicer(walk, step, counted).layers():
            pass
        start = 0
        for state in walk.states:
            first = max(0, fitted - start)
            if first < len(state):
                logits = walk.finish(state[first:], head=True)
                wanted = labels[start + first : start + len(state)]
                nll, _, predicted = next_token_sums(logits, wanted)
                total, tokens = total + nll.cpu(), tokens + int(predicted)
            start += len(state)
    loss, predicted_tokens = walk.group.totals(total.item(), tokens)
    if not (predicted_tokens and math.isfinite(loss)):
        raise ValueError(
            f"the {held_out} windows held out cannot judge a slicing: {predicted_tokens:.0f} "
            f"tokens to predict, loss {loss}; give other calibration text, or one base_ratio"
        )
    return math.exp(min(loss / predicted_tokens, 700.0))
