"""Making a pruned model trainable again: LoRA by peft, or all weights.

LoRA (arXiv:2106.09685) adapts all attention and MLP projections, with the settings that the depth
pruning papers recover with (r 8, alpha 16, dropout 0.05). Adapters are float32 over a base of any
dtype, as peft does it: a learning rate of 1e-4 is lost in bfloat16 weights.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, SchedulerType, get_scheduler

from prunelight.architecture import (
    Matrix,
    layers_path,
    lora_targets,
    matrices,
    restore_rwkv_scale,
)
from prunelight.choices import check_choice
from prunelight.masking import WeightMasks, ZeroRecord, mask_adapters, pack
from prunelight.metrics import parameter_count, zero_share
from prunelight.plan import Plan, sparsified
from prunelight.steps import layer_of
from prunelight.sublayers import dropped

log = logging.getLogger(__name__)

RECOVERIES = ("none", "lora", "full")


@dataclass(frozen=True)
class LoRA:
    """Settings of LoRA recovery.

    Attributes:
        r: rank of the adapters.
        alpha: the update is scaled by alpha / r.
        dropout: probability of dropout before an adapter, in [0, 1).
        targets: names of modules to adapt; None takes all projections of the family.

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


def check_settings(
    recovery: str,
    *,
    learning_rate: float,
    warmup_steps: int,
    lr_scheduler: str,
    lr_scheduler_kwargs: dict[str, Any] | None = None,
) -> None:
    """Check the arguments of a recovery.

    Raises:
        ValueError: if one is out of its range.
    """
    check_choice("recovery", recovery, RECOVERIES)
    if learning_rate <= 0 or warmup_steps < 0:
        raise ValueError(
            f"learning_rate={learning_rate} must be above 0 and warmup_steps={warmup_steps} "
            "at least 0"
        )
    check_choice("lr_scheduler", lr_scheduler, [kind.value for kind in SchedulerType])
    trial = SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    try:
        make_schedule(lr_scheduler, trial, 0, 100, lr_scheduler_kwargs)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"lr_scheduler_kwargs={lr_scheduler_kwargs} do not fit {lr_scheduler}: {error}"
        ) from error


def make_schedule(
    name: str,
    optimizer: Optimizer,
    warmup_steps: int,
    steps: float,
    arguments: dict[str, Any] | None = None,
) -> LRScheduler:
    """Return a learning-rate schedule of transformers.get_scheduler over `steps` steps.

    The decay of warmup_stable_decay takes a tenth of the steps unless `arguments` say otherwise:
    with that MiniCPM (arXiv:2404.06395, 4.2) reaches what a longer decay does.

    Raises:
        ValueError: if the number of steps is not known.
    """
    if steps == float("inf"):
        raise ValueError(
            "max_steps=-1 without max_epochs leaves the end of the learning-rate schedule "
            "open; set trainer.max_steps or trainer.max_epochs"
        )
    if warmup_steps >= steps:
        log.warning("warmup_steps=%d reaches past the %d steps", warmup_steps, steps)
    own = {"num_decay_steps": max(int(steps) // 10, 1)} if name == "warmup_stable_decay" else {}
    return get_scheduler(name, optimizer, warmup_steps, int(steps), {**own, **(arguments or {})})


def make_trainable(
    model: PreTrainedModel, recovery: str, settings: LoRA
) -> PreTrainedModel | PeftModel:
    """Prepare a model for its recovery, in place; returns peft's wrapper for "lora".

    Raises:
        ValueError: if no module has one of LoRA's target names.
    """
    adapted: PreTrainedModel | PeftModel = model
    if recovery == "lora":
        adapted = attach_lora(model, settings)
    else:
        (train_all if recovery == "full" else freeze)(model)
    log.info(
        "%s recovery: %.2fM of %.1fM parameters are trained",
        recovery,
        parameter_count(adapted, trainable=True) / 1e6,
        parameter_count(adapted) / 1e6,
    )
    return adapted


def attach_lora(model: PreTrainedModel, settings: LoRA) -> PeftModel:
    """Freeze the model and attach LoRA adapters, in place; returns peft's wrapper.

    Raises:
        ValueError: if no module has one of the target names.
    """
    names, parameters = lora_targets(model)
    if settings.targets is not None:
        names, parameters = settings.targets, []
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.r,
        lora_alpha=settings.alpha,
        # peft has no dropout for fused expert weights.
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
    return wrapped


def check_targets(model: PreTrainedModel, settings: LoRA) -> None:
    """Check, without attaching anything, that every target names a module.

    Raises:
        ValueError: for a target that is the name of no module.
    """
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    paths = {name for name, _ in model.named_modules()}
    missing = [t for t in settings.targets or [] if t not in names | paths]
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
    return model.merge_and_unload(safe_merge=True)


def train_all(model: PreTrainedModel) -> None:
    """Make all weights trainable, in place."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def freeze(model: PreTrainedModel) -> None:
    """Make no weight trainable, in place."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)


@dataclass
class PlannedZeros:
    """The zeros that plans put into a model, during its recovery; by default none.

    Attributes:
        matrices: that have planned zeros, without those that were quantized.
        sparsity: share of zeros in all matrices of the decoder layers before the recovery.
        masks: in full training, and where zeros are added during training; else None.
        state: "not kept", "kept", or "growing" where zeros are added during training.
    """

    matrices: list[Matrix] = field(default_factory=list)
    sparsity: float = 0.0
    masks: WeightMasks | None = None
    state: str = "not kept"
    _record: ZeroRecord | None = None
    _packed: dict[str, Tensor] = field(default_factory=dict)  # masks (O, I) of quantized weights

    @classmethod
    def find(cls, model: PreTrainedModel, plans: Sequence[Plan]) -> PlannedZeros:
        """Return the zeros that plans put into a model, which has no adapters yet.

        Args:
            model: as it is after all plans.
            plans: that led to it, in order.

        Raises:
            ValueError: if the plans name a matrix that the model does not have.
        """
        names = sparsified(plans, layers_path(model)) if plans else {}
        if not names:
            return cls()
        found, path = matrices(model), layers_path(model)
        without = dropped(model, "attention") | dropped(model, "mlp")
        names = {n: s for n, s in names.items() if n in found or layer_of(n, path) not in without}
        missing = set(names) - set(found)
        if missing:
            raise ValueError(
                f"the plans put zeros into {len(missing)} matrices that the model does not have, "
                f"e.g. {min(missing)}; the plans beside a model must be those that led to it"
            )
        return cls([found[name] for name in names], zero_share(m.parameter for m in found.values()))

    @property
    def planned(self) -> bool:
        """Return whether there are any."""
        return bool(self.matrices or self._packed)

    def pack(self) -> None:
        """Take the masks from weights that are about to be quantized, and let go of these."""
        self._packed = {m.name: pack(m.views()[0] != 0) for m in self.matrices if not m.fused}
        self.matrices = [matrix for matrix in self.matrices if matrix.fused]

    def keep(self, model: PreTrainedModel | PeftModel, *, growing: bool) -> None:
        """Keep the zeros from now on, in place; `growing`: those that `masks` will be told of."""
        if isinstance(model, PeftModel):
            names = [matrix.name for matrix in self.matrices]
            mask_adapters(model, [*names, *self._packed], self._packed)
        if growing or not isinstance(model, PeftModel):
            self.masks = WeightMasks(self.matrices)
        else:
            self._record = ZeroRecord(self.matrices)
        self.state = "growing" if growing else "kept"

    def check(self) -> None:
        """Check that all zeros that are kept are exactly zero.

        Raises:
            RuntimeError: naming the matrix, and how many of its zeros are filled.
        """
        keeper = self.masks or self._record
        if keeper is not None:
            keeper.check()

    def describe_loss(self, model: PreTrainedModel) -> str:
        """Return how much of the sparsity a recovery that did not keep zeros has left."""
        left = zero_share(matrix.parameter for matrix in matrices(model).values())
        return (
            "keep_zeros=False filled zeros: the sparsity of the decoder layers' matrices went from "
            f"{self.sparsity:.4f} to {left:.4f}"
        )
