"""Make a pruned model trainable again: LoRA by peft, or all weights.

LoRA (arXiv:2106.09685) adapts all attention and MLP projections. Its defaults are those of the
depth pruning papers (r 8, alpha 16, dropout 0.05). As in peft, adapters are float32 over a base of
any dtype: bfloat16 weights would round the updates of a learning rate of 1e-4 away.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prunelight.models.families.config_fields import check_reloadable
from prunelight.models.families.matrices import lora_targets
from prunelight.models.families.rwkv import (
    restore_rwkv_scale,
    resume_rescaling,
    stop_rescaling,
)
from prunelight.models.sizes import parameter_count
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
    log.info(
        "%s recovery: %.2fM of %.1fM parameters are trained",
        recovery,
        parameter_count(trainable, trainable=True) / 1e6,
        parameter_count(trainable) / 1e6,
    )
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
    stop_rescaling(model)
    return wrapped


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
