"""Whether a model keeps the documents of a packed row apart, and how it is called with such a row.

Where position ids start over, transformers builds a block-diagonal mask (also for sliding windows),
or calls variable-length flash attention. Whether a model does so is probed, not listed.
Deliberately not done: masks of our own for families that ignore position ids in the mask.
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

_LEAK = 0.1  # far above rounding in bfloat16, and far below documents that see each other


def model_inputs(batch: Mapping[str, Tensor], *, padded: bool | None = None) -> dict[str, Any]:
    """Return the arguments of a model's forward for a training batch, packed or not.

    With position ids there is no mask: a mask would override the document boundaries that they set.
    Without padding there is no mask either, so that attention takes its causal fast path.

    Args:
        batch: input_ids (B, T), and position_ids or an attention_mask.
        padded: the mask holds zeros; None looks, and waits for the device of the batch.
    """
    inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "use_cache": False}
    if "position_ids" in batch:
        return {**inputs, "position_ids": batch["position_ids"]}
    mask = batch.get("attention_mask")
    if padded is None:
        padded = mask is not None and not bool(mask.all())
    return {**inputs, "attention_mask": mask if padded else None}


def check_packed(model: PreTrainedModel, data: Any) -> None:
    """Run `check_packing` if the rows of a data module hold several documents.

    Raises:
        ValueError: if the model does not keep the documents apart.
    """
    if getattr(data, "packing", "stream") == "documents":
        check_packing(model, data.batch_size)


def check_packing(model: PreTrainedModel, batch_size: int) -> None:
    """Check on a few tokens that the model keeps packed documents apart.

    Args:
        model: the model as it will be trained.
        batch_size: rows of a batch; flash attention keeps documents apart only in a single row.

    Raises:
        ValueError: if the logits of a document change when another document shares its row.
    """
    attention = str(getattr(model.config, "_attn_implementation", None))
    flash = "flash" in attention
    if flash and batch_size > 1:
        raise ValueError(
            f"packing='documents' with {attention} needs batch_size=1, not {batch_size}: only in a "
            "single row it keeps documents apart; accumulate gradients, or set packing=stream"
        )
    if (
        flash and model.device.type == "cpu"
    ):  # flash attention needs the GPU that the model moves to later
        return
    leak = cross_document_attention(model)
    if not leak <= _LEAK:  # NaN too
        raise ValueError(
            f"packing='documents' needs a model in which documents of a row do not see each other, "
            f"and {model.config.model_type} with {attention} attention lets them "
            f"({leak:.0%} of what it does without positions); set packing=stream"
        )


def cross_document_attention(model: PreTrainedModel) -> float:
    """Return how much packed documents see of each other: 0 for nothing, 1 as if they were one.

    The value is the mean difference between logits of packed and of single documents, divided by
    the same difference without position ids. Models without `position_ids` have 1.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return 1.0
    ids = torch.arange(3, 3 + sum(_PROBE), device=model.device)[None] % vocabulary_size(model)
    positions = torch.cat([torch.arange(n, device=model.device) for n in _PROBE])[None]
    with evaluating(model):
        alone = torch.cat([model(part).logits for part in ids.split(_PROBE, dim=1)], dim=1)
        packed, joined = model(ids, position_ids=positions).logits, model(ids).logits
    errors = [(logits.float() - alone.float()).abs().mean() for logits in (packed, joined)]
    return float(errors[0] / errors[1])
