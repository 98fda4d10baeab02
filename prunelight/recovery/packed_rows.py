"""Whether a model keeps the documents of a packed row apart, and how it is called with one.

From positions that start over transformers makes a block-diagonal mask, with windows of sliding
attention too, and variable-length flash attention. Which models really do so is probed, not listed.
Deliberately not done: masks of our own for families whose code leaves positions out of the mask.
"""

# T tokens

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunelight.models.families.config_fields import vocabulary_size
from prunelight.models.forward import evaluating

_PROBE = (5, 3)  # tokens of the two documents in the probe

_LEAK = 0.1  # far above what rounding gives in bfloat16, and far below a leak


def model_inputs(batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what a model is called with for a training batch, packed or not.

    With positions there is no mask: a mask would take their place in telling documents apart.
    Without padding there is none either, which lets attention take its causal fast path.
    """
    inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "use_cache": False}
    if "position_ids" in batch:
        return {**inputs, "position_ids": batch["position_ids"]}
    mask = batch.get("attention_mask")
    return {**inputs, "attention_mask": None if mask is None or bool(mask.all()) else mask}


def check_packed(model: PreTrainedModel, data: Any) -> None:
    """Check a model against a data module if its rows hold several documents; see `check_packing`.

    Raises:
        ValueError: if the model does not keep them apart.
    """
    if getattr(data, "packing", "stream") == "documents":
        check_packing(model, data.batch_size)


def check_packing(model: PreTrainedModel, batch_size: int) -> None:
    """Check, by a few tokens, that the model keeps packed documents apart.

    Args:
        model: as it will be trained.
        batch_size: rows of a batch: flash attention keeps documents apart only in a single row.

    Raises:
        ValueError: if a document's logits are not those that it gets alone.
    """
    attention = str(getattr(model.config, "_attn_implementation", None))
    flash = "flash" in attention
    if flash and batch_size > 1:
        raise ValueError(
            f"packing='documents' with {attention} needs batch_size=1, not {batch_size}: only in a "
            "single row it keeps documents apart; accumulate gradients, or set packing=stream"
        )
    if flash and model.device.type == "cpu":  # cannot run before it has moved
        return
    leak = cross_document_attention(model)
    if not leak <= _LEAK:  # NaN too
        raise ValueError(
            f"packing='documents' needs a model in which documents of a row do not see each other, "
            f"and {model.config.model_type} with {attention} attention lets them "
            f"({leak:.0%} of what it does without positions); set packing=stream"
        )


def cross_document_attention(model: PreTrainedModel) -> float:
    """Return how much packed documents see of each other: 0 nothing, 1 as if they were one.

    It is the mean difference of their logits from those that they get alone, relative to that of
    rows without positions. Models without `position_ids` have 1.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return 1.0
    ids = torch.arange(3, 3 + sum(_PROBE), device=model.device)[None] % vocabulary_size(model)
    positions = torch.cat([torch.arange(n, device=model.device) for n in _PROBE])[None]
    with evaluating(model):
        alone = torch.cat([model(part).logits for part in ids.split(_PROBE, dim=1)], dim=1)
        packed, mixed = model(ids, position_ids=positions).logits, model(ids).logits
    errors = [(logits.float() - alone.float()).abs().mean() for logits in (packed, mixed)]
    return float(errors[0] / errors[1])
