"""Greedy generation with and without the cache, with the logits of each new token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NEW_TOKENS = 5


def generate(model: Any, windows: Tensor, *, use_cache: bool) -> tuple[Tensor, Tensor]:
    """Greedy new tokens, and the logits of each, (new tokens, windows, vocabulary)."""
    output = model.generate(
        windows,
        attention_mask=torch.ones_like(windows),
        min_new_tokens=NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=use_cache,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.sequences[:, windows.shape[1] :], torch.stack(output.logits)
