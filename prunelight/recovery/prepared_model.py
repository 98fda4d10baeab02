"""A pruned model made ready for its recovery, and the plain model that comes out of the recovery.

`PreparedModel` adds in place what training needs: adapters, masks, gradient checkpointing. It also
holds RWKV's weight scale fixed meanwhile. `merged` takes all of these off again.
"""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from prunelight.models.families.rwkv import restore_rwkv_scale
from prunelight.models.sizes import parameter_count
from prunelight.planning.fingerprints import model_fingerprint
from prunelight.planning.plan import Plan
from prunelight.recovery.compiled_layers import compile_layers, uncompile_layers
from prunelight.recovery.lora import LoRA, make_trainable, merge_lora
from prunelight.recovery.precision import sharded_policy
from prunelight.recovery.quantization import BitsAndBytes, describe_kind, quantize
from prunelight.recovery.sharded_weights import shard
from prunelight.recovery.zeros.planned_zeros import PlannedZeros

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RecoverySettings:
    """How a model is recovered; `RecoveryModule` documents each argument."""

    recovery: str = "lora"
    lora: LoRA = LoRA()  # noqa: RUF009 (frozen)
    keep_zeros: bool = True
    gradient_checkpointing: bool | None = None  # None: `start.prepare` looks at the memory
    gradual: bool = False  # zeros are added while the model trains; `prepare` takes it of the run
    quantization: str = "none"
    bitsandbytes: BitsAndBytes = BitsAndBytes()  # noqa: RUF009 (frozen)
    compile_backend: str | None = None
    seed: int = 0  # for the initial weights of the adapters; `prepare` takes it of the run

    @property
    def base_precision(self) -> str:
        """Return how the base is quantized, in words; "none" for a base in full precision."""
        return describe_kind(self.quantization, self.bitsandbytes)


class PreparedModel:
    """A model in training; `model` is the module to train, in train mode.

    Attributes:
        model: the model itself, or peft's wrapper of the model.
        fingerprint: of the weights before the recovery.
        dtype: of the weights before the recovery, and before a Trainer casts them.
        config: the model's config before the recovery, as JSON values.
        zeros: the zeros that plans put into the weights.
        in_training: True until `merged` is called.
        sharded: True once the weights are sharded over processes.

    Args:
        model: the pruned model; changed in place.
        plans: plans that led to the model, in order.
        settings: settings of the recovery.
        on_quantized: called with the model in 4 or 8 bits, before adapters are attached.
        device: device that a quantized model moves to; None leaves the weights where they are.

    Raises:
        TypeError: if the settings quantize a model that is quantized already.
        ValueError: if widths do not suit 4 bits, LoRA's targets fit no module, or the plans name
            matrices that the model does not have.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plans: Sequence[Plan],
        settings: RecoverySettings,
        on_quantized: Callable[[PreTrainedModel], None] | None = None,
        device: torch.device | None = None,
    ) -> None:
        restore_rwkv_scale(model)
        self.settings, self.in_training, self.sharded = settings, True, False
        self._released_masks: dict[str, Tensor] | None = None
        self.fingerprint, self.dtype = model_fingerprint(model), model.dtype
        self.config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
        # RWKV halves its weights in eval mode. Trained and checkpointed weights must not change so.
        if hasattr(model.config, "rescale_every"):
            model.config.rescale_every = 0
        if settings.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        self.zeros = PlannedZeros.find(model, plans)
        if self.quantized:
            self.zeros.pack()
            quantize(model, settings.quantization, settings.bitsandbytes, device)
            if on_quantized is not None:
                on_quantized(model)
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            # A seed of their own: a resumed run has drawn other random numbers up to here.
            torch.manual_seed(settings.seed)
            self.model = make_trainable(model, settings.recovery, settings.lora)
        log.info(
            "%s recovery: %.2fM of %.1fM parameters are trained",
            settings.recovery,
            parameter_count(self.model, trainable=True) / 1e6,
            parameter_count(self.model) / 1e6,
        )
        if self.zeros.planned and settings.keep_zeros and settings.recovery != "none":
            self.zeros.keep(self.model, gradual=settings.gradual)
        if settings.compile_backend is not None:
            compile_layers(model, settings.compile_backend)
        self.model.train()  # from_pretrained sets eval mode, and Lightning does not change it

    @property
    def quantized(self) -> bool:
        """Return whether the model is in 4 or 8 bits."""
        return self.settings.quantization != "none"

    @property
    def merges_in_place(self) -> bool:
        """Whether `merged` works here: neither shards nor packed weights can be merged."""
        return not (self.sharded or self.quantized)

    @property
    def fills_zeros(self) -> bool:
        """Return whether the recovery may fill zeros that a plan made."""
        zeros_stay = self.settings.keep_zeros or self.settings.recovery == "none"
        return self.zeros.planned and not zeros_stay

    def shard(self, mesh: DeviceMesh, same: Callable[[Any], Any], precision: str) -> None:
        """Shard the model over processes, in place; `rebuild_on` gives one that can be merged."""
        shard(self.model, mesh, same, sharded_policy(precision))
        self.sharded = True

    def release(self) -> None:
        """Drop the weights: what `rebuild_on` needs of them stays, packed weights and shards go."""
        if self.zeros.masks is not None:
            self._released_masks = self.zeros.masks.state_dict()
        self.zeros = PlannedZeros()
        del self.model
        gc.collect()  # peft's layers and the model's hooks refer to each other

    def rebuild_on(
        self, base: PreTrainedModel, plans: Sequence[Plan], trained: Mapping[str, Tensor]
    ) -> PreparedModel:
        """Return a new `PreparedModel` of the base that holds the trained parameters.

        Sharded and quantized models cannot merge their adapters; the new one can. Call `release`
        before, so that there is memory for the base.

        Args:
            base: the weights that training began with, in full precision; changed in place.
            plans: plans that led to the base, in order.
            trained: name in `model` -> trained parameter, unsharded.

        Raises:
            ValueError: if training began with another base.
        """
        settings = replace(
            self.settings, gradient_checkpointing=False, compile_backend=None, quantization="none"
        )
        rebuilt = type(self)(base, plans, settings)
        if rebuilt.fingerprint != self.fingerprint:
            raise ValueError(
                f"the base {base.config._name_or_path!r} has fingerprint {rebuilt.fingerprint}, "
                f"training began with {self.fingerprint}: it was changed meanwhile; train again"
            )
        rebuilt.model.load_state_dict(trained, strict=False)
        if rebuilt.zeros.masks is not None and self._released_masks is not None:
            rebuilt.zeros.masks.load_state_dict(self._released_masks)
        return rebuilt

    def merged(self) -> PreTrainedModel:
        """Return the trained model as a plain transformers model in eval mode, in place.

        Sharded and quantized models cannot be merged in place: see `rebuild_on`.

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
