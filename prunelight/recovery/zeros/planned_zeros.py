"""The zeros that plans put into a model, and how a recovery keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from prunelight.models.families.layers import layers_path
from prunelight.models.families.matrices import Matrix, matrices
from prunelight.models.families.own_classes.dropped_sublayers import dropped
from prunelight.models.sizes import zero_share
from prunelight.planning.plan import Plan, planned_sparsity
from prunelight.planning.steps import layer_of
from prunelight.recovery.zeros.masked_lora import mask_adapters
from prunelight.recovery.zeros.weight_masks import WeightMasks, ZeroRecord, pack_mask


@dataclass
class PlannedZeros:
    """The zeros that plans put into a model, during its recovery; by default none.

    Attributes:
        matrices: matrices with planned zeros, without those that were quantized.
        sparsity: share of zeros in all matrices of the decoder layers before the recovery.
        masks: masks of full training, and of training that adds zeros; else None.
        state: "not_kept", "kept", or "gradual" where zeros are added during training.
    """

    matrices: list[Matrix] = field(default_factory=list)
    sparsity: float = 0.0
    masks: WeightMasks | None = None
    state: str = "not_kept"
    _record: ZeroRecord | None = None
    _packed: dict[str, Tensor] = field(default_factory=dict)  # masks (O, I) of quantized weights

    @classmethod
    def find(cls, model: PreTrainedModel, plans: Sequence[Plan]) -> PlannedZeros:
        """Return the zeros that plans put into a model, which has no adapters yet.

        Args:
            model: the model after all plans.
            plans: plans that led to the model, in order.

        Raises:
            ValueError: if the plans name a matrix that the model does not have.
        """
        names = planned_sparsity(plans, layers_path(model)) if plans else {}
        if not names:
            return cls()
        available, path = matrices(model), layers_path(model)
        cut_layers = dropped(model, "attention") | dropped(model, "mlp")
        missing = {n for n in set(names) - set(available) if layer_of(n, path) not in cut_layers}
        if missing:
            raise ValueError(
                f"the plans put zeros into {len(missing)} matrices that the model does not have, "
                f"e.g. {min(missing)}; the plans beside a model must be those that led to it"
            )
        sparsity = zero_share(matrix.parameter for matrix in available.values())
        return cls([available[name] for name in names if name in available], sparsity)

    @property
    def planned(self) -> bool:
        """Return whether there are planned zeros."""
        return bool(self.matrices or self._packed)

    def pack(self) -> None:
        """Keep the masks of weights that are about to be quantized, and drop these weights."""
        self._packed = {m.name: pack_mask(m.views()[0] != 0) for m in self.matrices if not m.fused}
        self.matrices = [matrix for matrix in self.matrices if matrix.fused]

    def keep(self, model: PreTrainedModel | PeftModel, *, gradual: bool) -> None:
        """Keep the zeros from now on, in place.

        Args:
            model: the model in training, or peft's wrapper of the model.
            gradual: zeros will be added during training, by `masks.update`.
        """
        if isinstance(model, PeftModel):
            names = [matrix.name for matrix in self.matrices]
            mask_adapters(model, [*names, *self._packed], self._packed)
        if gradual or not isinstance(model, PeftModel):
            self.masks = WeightMasks(self.matrices)
        else:
            self._record = ZeroRecord(self.matrices)
        self.state = "gradual" if gradual else "kept"

    def check(self) -> None:
        """Check that all kept zeros are exactly zero.

        Raises:
            RuntimeError: naming the matrix, and how many of its zeros are filled.
        """
        keeper = self.masks or self._record
        if keeper is not None:
            keeper.check()

    def describe_loss(self, model: PreTrainedModel) -> str:
        """Return a warning: the sparsity before and after a recovery that did not keep zeros."""
        sparsity = zero_share(matrix.parameter for matrix in matrices(model).values())
        return (
            "keep_zeros=False filled zeros: the sparsity of the decoder layers' matrices went from "
            f"{self.sparsity:.4f} to {sparsity:.4f}"
        )
