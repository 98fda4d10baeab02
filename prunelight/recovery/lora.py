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
from transformers import PreTrainedModel

from prunelight.models.families.config_fields import check_reloadable
from prunelight.models.families.matrices import lora_targets
from prunelight.models.families.rwkv import (
    restore_rwkv_scale,
    resume_rescaling,
    stop_rescaling,
)
from prunelight.models.sizes import parameter_count

log = logging.getLogger(__name__)


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
        if self.r < 1:
            raise ValueError(f"lora.r={self.r} must be at least 1")
        if self.alpha <= 0:
            raise ValueError(f"lora.alpha={self.alpha} must be above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout={self.dropout} must lie in [0, 1)")


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
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    paths = {name for name, _ in model.named_modules()}
    missing = [target for target in settings.targets or [] if target not in names | paths]
    if missing:
        raise ValueError(
            f"lora.targets={missing} fit no module of {model.config.model_type}; its projections "
            f"are {lora_targets(model)[0]}"
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
