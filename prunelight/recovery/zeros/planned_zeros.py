"""The zeros that plans put into a model, during its recovery."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from prunelight.models.families.dropped_sublayers import dropped
from prunelight.models.families.layers import Matrix, layers_path, matrices
from prunelight.models.sizes import zero_share
from prunelight.planning.plan import Plan, planned_sparsity
from prunelight.planning.steps import layer_of
from prunelight.recovery.zeros.masked_lora import mask_adapters
from prunelight.recovery.zeros.weight_masks import WeightMasks, ZeroRecord, pack_mask


@dataclass
class PlannedZeros:
    """The zeros that plans put into a model, during its recovery; by default none.

    Attributes:
        matrices: that have planned zeros, without those that were quantized.
        sparsity: share of zeros in all matrices of the decoder layers before the recovery.
        masks: in full training, and where zeros are added during training; else None.
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
            model: as it is after all plans.
            plans: that led to it, in order.

        Raises:
            ValueError: if the plans name a matrix that the model does not have.
        """
        names = planned_sparsity(plans, layers_path(model)) if plans else {}
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
        self._packed = {m.name: pack_mask(m.views()[0] != 0) for m in self.matrices if not m.fused}
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
        self.state = "gradual" if growing else "kept"

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
