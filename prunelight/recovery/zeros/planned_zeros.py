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
from prunelight.models.sizes import is_quantized, zero_share
from prunelight.planning.plan import Plan, planned_sparsity
from prunelight.planning.steps import layer_of
from prunelight.recovery.zeros.masked_lora import mask_adapters
from prunelight.recovery.zeros.weight_masks import WeightMasks, ZeroRecord, pack_mask

# Shares of exact zeros in a matrix. Rounding to 4 bits makes up to 0.15 of them, pruning more.
_NOTICED, _PRUNED = 0.01, 0.2

_SAMPLED_ROWS = 16


@dataclass
class PlannedZeros:
    """The zeros that plans put into a model, during its recovery; by default none.

    Attributes:
        matrices: matrices with planned zeros, without those that were quantized.
        sparsity: share of zeros in all matrices of the decoder layers before the recovery.
        masks: masks of full training, and of training that adds zeros; else None.
        state: "not_kept", "kept", or "gradual" where zeros are added during training.
        warning: what to tell of zeros that no plan describes; empty without such zeros.
    """

    matrices: list[Matrix] = field(default_factory=list)
    sparsity: float = 0.0
    masks: WeightMasks | None = None
    state: str = "not_kept"
    warning: str = ""
    _record: ZeroRecord | None = None
    _packed: dict[str, Tensor] = field(default_factory=dict)  # masks (O, I) of quantized weights

    @classmethod
    def find(cls, model: PreTrainedModel, plans: Sequence[Plan]) -> PlannedZeros:
        """Return the zeros that plans put into a model, which has no adapters yet.

        If no plan names zeros, matrices with so many that only pruning can have made them count as
        planned, with a warning.

        Args:
            model: the model after all plans.
            plans: plans that led to the model, in order.

        Raises:
            ValueError: if the plans name a matrix that the model does not have.
        """
        names = planned_sparsity(plans, layers_path(model)) if plans else {}
        if not names:
            return cls._undescribed(model)
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

    @classmethod
    def _undescribed(cls, model: PreTrainedModel) -> PlannedZeros:
        """Return the zeros of a model that no plan describes."""
        if is_quantized(model):
            return cls()
        try:
            available = matrices(model)
        except TypeError:  # a family whose decoder layers cannot be found
            return cls()
        shares = {name: _share_of_rows(matrix) for name, matrix in available.items()}
        sparse = [available[name] for name, share in shares.items() if share >= _PRUNED]
        some = sum(share >= _NOTICED for share in shares.values())
        if not some:
            return cls()
        sparsity = zero_share(matrix.parameter for matrix in available.values())
        told = (
            f"{some} of {len(available)} matrices hold zeros that no plan describes ("
            f"{sparsity:.4f} of their weights); "
        )
        if not sparse:
            return cls(warning=told + "they are too few for pruning, and a recovery fills them")
        told += f"those of {len(sparse)} matrices count as planned (keep_zeros=False fills them)"
        return cls(sparse, sparsity, warning=told)

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


def _share_of_rows(matrix: Matrix) -> float:
    """Return the share of zeros in evenly spaced rows of a matrix, of its first expert if fused."""
    rows = matrix.views()[0]
    return zero_share([rows[:: max(1, len(rows) // _SAMPLED_ROWS)]])
