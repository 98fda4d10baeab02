"""A pruned model made ready for its recovery, and the plain model that comes out of it.

Between the two lie what training adds: adapters, masks, gradient checkpointing, and RWKV's scale,
which must not move meanwhile. All of it works in place and is taken off again by `merged`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from prunelight.architecture import restore_rwkv_scale
from prunelight.plan import Plan, model_fingerprint
from prunelight.recovery import LoRA, PlannedZeros, make_trainable, merge_lora
from prunelight.regions import compile_layers, uncompile_layers


@dataclass(frozen=True)
class Settings:
    """How a model is recovered; see `RecoveryModule` for what each means."""

    recovery: str = "lora"
    lora: LoRA = LoRA()  # noqa: RUF009 (frozen)
    keep_zeros: bool = True
    gradient_checkpointing: bool = False
    growing: bool = False  # zeros are added while the model trains
    compile_backend: str | None = None


class Adapted:
    """A model in training; `model` is the module to train, in train mode.

    Attributes:
        model: the model itself, or peft's wrapper of it.
        fingerprint: of the weights before.
        config: the model's config before, as JSON values.
        zeros: that plans put into the weights.
        in_training: until `merged` is called.

    Args:
        model: adapted in place.
        plans: that led to it, in order.
        settings: of the recovery.

    Raises:
        ValueError: if LoRA's targets fit no module, or the plans name matrices that are not there.
    """

    def __init__(self, model: PreTrainedModel, plans: Sequence[Plan], settings: Settings) -> None:
        restore_rwkv_scale(model)
        self.settings, self.in_training = settings, True
        self.fingerprint = model_fingerprint(model)
        self.config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
        # RWKV halves its weights in eval mode: not while they are trained and checkpointed.
        if hasattr(model.config, "rescale_every"):
            model.config.rescale_every = 0
        if settings.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        self.zeros = PlannedZeros.find(model, plans)
        self.model = make_trainable(model, settings.recovery, settings.lora)
        if self.zeros.matrices and settings.keep_zeros and settings.recovery != "none":
            self.zeros.keep(self.model, growing=settings.growing)
        if settings.compile_backend is not None:
            compile_layers(model, settings.compile_backend)
        self.model.train()  # from_pretrained leaves eval mode, and Lightning leaves that alone

    @property
    def fills_zeros(self) -> bool:
        """Return whether the recovery may fill zeros that a plan made."""
        kept = self.settings.keep_zeros or self.settings.recovery == "none"
        return bool(self.zeros.matrices) and not kept

    def merged_onto(
        self, base: PreTrainedModel, plans: Sequence[Plan], trained: Mapping[str, Tensor]
    ) -> PreTrainedModel:
        """Return another copy of the base, with what was trained merged into it, in place.

        For models that cannot be merged where they are: sharded or quantized ones.

        Args:
            base: the weights that training began with, in full precision and not adapted.
            plans: that led to it.
            trained: the trained parameters by their name in `model`, whole.

        Raises:
            RuntimeError, ValueError: as `merged`.
        """
        settings = replace(self.settings, gradient_checkpointing=False, compile_backend=None)
        other = Adapted(base, plans, settings)
        other.model.load_state_dict(trained, strict=False)
        if other.zeros.masks is not None and self.zeros.masks is not None:
            other.zeros.masks.load_state_dict(self.zeros.masks.state_dict())
        return other.merged()

    def merged(self) -> PreTrainedModel:
        """Return the trained model as a plain transformers model in eval mode, in place.

        Raises:
            RuntimeError: if a weight that must be zero is not.
            ValueError: if a merged weight would be NaN or Inf.
        """
        model = self.model
        if isinstance(model, PeftModel):
            model = merge_lora(model)
        assert isinstance(model, PreTrainedModel)
        uncompile_layers(model)
        restore_rwkv_scale(model)
        self.zeros.check()
        if self.zeros.masks is not None:
            self.zeros.masks.unwatch()
        if "rescale_every" in self.config:
            model.config.rescale_every = self.config["rescale_every"]
        if self.settings.gradient_checkpointing:
            model.activation_checkpointing_disable()
        self.in_training = False
        return model.eval()
