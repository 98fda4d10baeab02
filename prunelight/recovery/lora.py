"""Make a pruned model trainable again: LoRA by peft, or all weights.

LoRA (arXiv:2106.09685) adapts all attention and MLP projections. Its defaults are those of the
depth pruning papers (r 8, alpha 16, dropout 0.05). As in peft, adapters are float32 over a base of
any dtype: bfloat16 weights would round the updates of a learning rate of 1e-4 away. Their inputs
stay in the base's type until the backward (`LowRankUpdate`).

Private names of peft used here: the methods of `LoraVariant`, `LoraLayer.lora_variant` and
`cast_input_dtype_enabled`. Tested with peft 0.21.
"""

# I in_features, O out_features, r rank

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from peft.tuners.lora.layer import Linear, LoraLayer, LoraVariant
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prunelight.models.families.config_fields import check_reloadable
from prunelight.models.families.matrices import lora_targets
from prunelight.models.families.rwkv import (
    restore_rwkv_scale,
    resume_rescaling,
    stop_rescaling,
)
from prunelight.runtime.arguments import (
    NOT_EMPTY,
    above,
    at_least,
    check_fields,
    did_you_mean,
    within,
)

log = logging.getLogger(__name__)

# Modules to which peft adds a low-rank update.
ADAPTABLE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)


@dataclass(frozen=True)
class LoRA:
    """Settings of LoRA recovery.

    Attributes:
        r: rank of the adapters.
        alpha: the update is scaled by alpha / r.
        dropout: probability of dropout before an adapter, in [0, 1).
        targets: names of the modules to adapt; None takes all projections of the family.

    Raises:
        ValueError: if a value is out of range.
    """

    r: int = 8
    alpha: int = 16
    dropout: float = 0.05
    targets: list[str] | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        check_fields(
            self, "lora.", r=at_least(1), alpha=above(0), dropout=within(0, 1), targets=NOT_EMPTY
        )


def make_trainable(
    model: PreTrainedModel, recovery: str, settings: LoRA
) -> PreTrainedModel | PeftModel:
    """Prepare a model for its recovery "none", "lora" or "full", in place.

    Returns:
        The model itself, or peft's wrapper of the model for "lora".

    Raises:
        ValueError: if no module has one of LoRA's target names.
    """
    trainable: PreTrainedModel | PeftModel = model
    if recovery == "lora":
        trainable = attach_lora(model, settings)
    else:
        (train_all if recovery == "full" else freeze)(model)
    return trainable


def attach_lora(model: PreTrainedModel, settings: LoRA) -> PeftModel:
    """Freeze the model and attach LoRA adapters, in place; returns peft's wrapper.

    Raises:
        ValueError: if no module has one of the target names.
    """
    check_reloadable(model)
    names, parameters = lora_targets(model)
    if settings.targets is not None:
        names, parameters = settings.targets, []
    if parameters and settings.dropout:
        log.warning(
            "lora.dropout=%s is 0 for %s: peft has no dropout for experts that are stacked in one "
            "weight (%s)",
            settings.dropout,
            model.config.model_type,
            parameters[0],
        )
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=0.0 if parameters else settings.dropout,
        target_modules=names,
        target_parameters=parameters or None,
    )
    try:
        with warnings.catch_warnings():  # peft asks transformers for a renamed attribute
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            wrapped = get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(
            f"lora.targets={names} fit no module of {model.config.model_type}: {error}"
        ) from error
    assert isinstance(wrapped, PeftModel)
    linears = _adapted_linears()
    for layer in wrapped.modules():
        if isinstance(layer, linears):
            keep_less(layer)
    stop_rescaling(model)
    return wrapped


def _adapted_linears() -> tuple[type[LoraLayer], ...]:
    """Return peft's classes of adapted linear layers, in full precision, 4 bits and 8 bits."""
    if not (is_bnb_available() and is_bnb_4bit_available()):
        return (Linear,)
    from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt

    return Linear, Linear4bit, Linear8bitLt


def keep_less(layer: LoraLayer) -> None:
    """Let the adapters of a linear layer keep less until the backward, in place; see `LeanLora`."""
    layer.cast_input_dtype_enabled = False
    for adapter in layer.lora_A:
        layer.lora_variant[adapter] = LeanLora()


def keep_as_peft(layer: LoraLayer) -> None:
    """Undo `keep_less`, in place: inputs are cast to the adapters' type as peft does."""
    layer.cast_input_dtype_enabled = True
    layer.lora_variant.clear()


def check_targets(model: PreTrainedModel, settings: LoRA) -> None:
    """Check that every LoRA target names a module; attaches nothing.

    Raises:
        ValueError: naming the targets that fit no module.
    """
    check_reloadable(model)
    if settings.targets is None:
        return
    projections = lora_targets(model)[0]
    for target in settings.targets:
        fitting = [m for n, m in model.named_modules() if f".{n}".endswith(f".{target}")]
        if target and fitting and all(isinstance(module, ADAPTABLE) for module in fitting):
            continue
        kind = f"is a {type(fitting[0]).__name__}" if target and fitting else "fits no module"
        raise ValueError(
            f"lora.targets={settings.targets}: {target!r} {kind} of {model.config.model_type}; "
            f"LoRA adapts projections, which are {projections}{did_you_mean(target, projections)}"
        )


@torch.no_grad()
def merge_lora(model: PeftModel) -> PreTrainedModel:
    """Merge the adapters into the base, in place, and return the base without adapters.

    Raises:
        ValueError: if a merged weight would be NaN or Inf.
    """
    base: Any = model.get_base_model()
    restore_rwkv_scale(base)
    merged: PreTrainedModel = model.merge_and_unload(safe_merge=True)
    resume_rescaling(merged)
    return merged


def train_all(model: PreTrainedModel) -> None:
    """Make all weights trainable, in place."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def freeze(model: PreTrainedModel) -> None:
    """Make no weight trainable, in place."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)


class LeanLora(LoraVariant):
    """LoRA as peft computes it, y = x W^T + s dropout(x) A^T B^T, that keeps less for the backward.

    A variant in peft's terms; peft's base class documents each method.
    """

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: object
    ) -> Tensor:
        """Return `result` plus the update of x (..., I), which is in the base's type."""
        dropout = getattr(module.lora_dropout[active_adapter], "p", 0.0) if module.training else 0.0
        update: Tensor = LowRankUpdate.apply(
            x,
            module.lora_A[active_adapter].weight,
            module.lora_B[active_adapter].weight,
            module.scaling[active_adapter],
            dropout,
            _scale_of(dropout),
        )
        return result + update

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return the merged weight."""
        return orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """Merge into the weight, in place."""
        orig_weight.data += module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return the weight as it was before merging, up to rounding."""
        return orig_weight - module.get_delta_weight(active_adapter).to(orig_weight.dtype)


class LowRankUpdate(torch.autograd.Function):
    """s dropout(x) A^T B^T for x (..., I), A (r, I), B (O, r), in the type of the adapters.

    Autograd would keep dropout(x) in float32 and its mask for each adapter: up to 8 bytes a number.
    This keeps x itself, which adapters of one input share, and one byte a number where there is
    dropout. The products and the random numbers are those of autograd.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        scaling: float,
        dropout: float,
        scale: float,
    ) -> Tensor:
        """Return the update, (..., O); dropout multiplies what it keeps by `scale`."""
        device = x.device.type
        # As autocast has it, where it is on: the products in its type.
        autocast = torch.is_autocast_enabled(device)
        ctx.dtype = torch.get_autocast_dtype(device) if autocast else A.dtype
        ctx.scaling, ctx.scale = scaling, scale
        with torch.autocast(device, enabled=False):
            dropped, mask = x.to(A.dtype), None
            if dropout:
                dropped, mask = torch.native_dropout(dropped, dropout, True)
            dropped = dropped.to(ctx.dtype)
            hidden = F.linear(dropped, A.to(ctx.dtype))
            # Where autocast narrows x, the narrow copy is the smaller one.
            ctx.narrows = dropped.element_size() < x.element_size()
            ctx.save_for_backward(dropped if ctx.narrows else x, A, B, hidden, mask)
            ctx.type_of_x = x.dtype
            return F.linear(hidden, B.to(ctx.dtype)) * scaling

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, A and B."""
        x, A, B, hidden, mask = ctx.saved_tensors  # read once, as checkpointing demands
        with torch.autocast(x.device.type, enabled=False):
            rows = (gradient * ctx.scaling).flatten(0, -2).to(ctx.dtype)
            grad_B = rows.T @ hidden.flatten(0, -2)
            grad_hidden = rows @ B.to(ctx.dtype)
            dropped = x if ctx.narrows else _dropped(x, mask, ctx.scale, A.dtype).to(ctx.dtype)
            grad_A = grad_hidden.T @ dropped.flatten(0, -2)
            grad_x = None
            if ctx.needs_input_grad[0]:
                grad_x = (grad_hidden @ A.to(ctx.dtype)).view(x.shape)
                grad_x = _dropped(grad_x, mask, ctx.scale, A.dtype).to(ctx.type_of_x)
            return grad_x, grad_A.to(A.dtype), grad_B.to(B.dtype), None, None, None


@torch.compiler.assume_constant_result
def _scale_of(dropout: float) -> float:
    """Return what dropout multiplies by, divided in float32 as torch does."""
    return float(1 / np.float32(1 - dropout))


def _dropped(x: Tensor, mask: Tensor | None, scale: float, dtype: torch.dtype) -> Tensor:
    """Return x in a type; where dropout has a mask, what it lets through times `scale`."""
    x = x.to(dtype)
    return x if mask is None else (x * mask).mul_(scale)
