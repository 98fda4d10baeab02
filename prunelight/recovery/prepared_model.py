"""A pruned model made ready for its recovery, and the plain model that comes out of it.

Between the two lie what training adds: adapters, masks, gradient checkpointing, and RWKV's scale,
which must not move meanwhile. All of it works in place and is taken off again by `merged`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from prunelight.models.families.rwkv import restore_rwkv_scale
from prunelight.planning.fingerprints import model_fingerprint
from prunelight.planning.plan import Plan
from prunelight.recovery.compiled_layers import compile_layers, uncompile_layers
from prunelight.recovery.lora import LoRA, make_trainable, merge_lora
from prunelight.recovery.quantization import BitsAndBytes, describe_kind, quantize
from prunelight.recovery.sharded_weights import shard
from prunelight.recovery.zeros.planned_zeros import PlannedZeros


@dataclass(frozen=True)
class RecoverySettings:
    """How a model is recovered; see `RecoveryModule` for what each means."""

    recovery: str = "lora"
    lora: LoRA = LoRA()  # noqa: RUF009 (frozen)
    keep_zeros: bool = True
    gradient_checkpointing: bool = False
    growing: bool = False  # zeros are added while the model trains
    quantization: str = "none"
    bitsandbytes: BitsAndBytes = BitsAndBytes()  # noqa: RUF009 (frozen)
    compile_backend: str | None = None
    seed: int = 0  # of the adapters' first weights

    @property
    def base_precision(self) -> str:
        """Return how the base is quantized, in words; "none" if it is not."""
        return describe_kind(self.quantization, self.bitsandbytes)


class PreparedModel:
    """A model in training; `model` is the module to train, in train mode.

    Attributes:
        model: the model itself, or peft's wrapper of it.
        fingerprint: of the weights before.
        config: the model's config before, as JSON values.
        zeros: that plans put into the weights.
        in_training: until `merged` is called.
        sharded: over ranks.

    Args:
        model: adapted in place.
        plans: that led to it, in order.
        settings: of the recovery.
        see_quantized: called with a model in 4 or 8 bits before it gets adapters.
        device: where to a model that is quantized goes; None: where it is.

    Raises:
        TypeError: if the model is quantized already, and shall be.
        ValueError: if widths do not suit 4 bits, LoRA's targets fit no module, or the plans name
            matrices that are not there.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plans: Sequence[Plan],
        settings: RecoverySettings,
        see_quantized: Callable[[PreTrainedModel], None] | None = None,
        device: torch.device | None = None,
    ) -> None:
        restore_rwkv_scale(model)
        self.settings, self.in_training, self.sharded = settings, True, False
        self.fingerprint = model_fingerprint(model)
        self.config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
        # RWKV halves its weights in eval mode: not while they are trained and checkpointed.
        if hasattr(model.config, "rescale_every"):
            model.config.rescale_every = 0
        if settings.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        self.zeros = PlannedZeros.find(model, plans)
        if self.quantized:
            self.zeros.pack()
            quantize(model, settings.quantization, settings.bitsandbytes, device)
            if see_quantized is not None:
                see_quantized(model)
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            # Of its own: a resumed run has drawn other random numbers up to here.
            torch.manual_seed(settings.seed)
            self.model = make_trainable(model, settings.recovery, settings.lora)
        if self.zeros.planned and settings.keep_zeros and settings.recovery != "none":
            self.zeros.keep(self.model, growing=settings.growing)
        if settings.compile_backend is not None:
            compile_layers(model, settings.compile_backend)
        self.model.train()  # from_pretrained leaves eval mode, and Lightning leaves that alone

    @property
    def quantized(self) -> bool:
        """Return whether the model is in 4 or 8 bits."""
        return self.settings.quantization != "none"

    @property
    def fills_zeros(self) -> bool:
        """Return whether the recovery may fill zeros that a plan made."""
        kept = self.settings.keep_zeros or self.settings.recovery == "none"
        return self.zeros.planned and not kept

    def shard(self, mesh: DeviceMesh, same: Callable[[Any], Any]) -> None:
        """Shard the model over ranks, in place, see `shard`; `rebuild_on` merges it."""
        shard(self.model, mesh, same)
        if self.zeros.masks is not None:
            self.zeros.masks.shard()
        self.sharded = True

    def rebuild_on(
        self, base: PreTrainedModel, plans: Sequence[Plan], trained: Mapping[str, Tensor]
    ) -> PreparedModel:
        """Return another copy of the base with what was trained, for models not to be merged.

        Those are sharded or quantized ones.

        Args:
            base: the weights that training began with, in full precision; adapted in place.
            plans: that led to it.
            trained: the trained parameters by their name in `model`, whole.

        Raises:
            ValueError: if the base is another one.
        """
        settings = replace(
            self.settings, gradient_checkpointing=False, compile_backend=None, quantization="none"
        )
        other = PreparedModel(base, plans, settings)
        if other.fingerprint != self.fingerprint:
            raise ValueError(
                f"the base {base.config._name_or_path!r} has fingerprint {other.fingerprint}, "
                f"training began with {self.fingerprint}: it was changed meanwhile; train again"
            )
        other.model.load_state_dict(trained, strict=False)
        if other.zeros.masks is not None and self.zeros.masks is not None:
            other.zeros.masks.load_state_dict(self.zeros.masks.state_dict())
        return other

    def merged(self) -> PreTrainedModel:
        """Return the trained model as a plain transformers model in eval mode, in place.

        Sharded and quantized ones cannot be merged where they are: see `rebuild_on`.

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
