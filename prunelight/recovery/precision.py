"""What a Trainer's precision does to the weights of a recovery.

bf16-true and 16-true cast the base; bf16-mixed and 16-mixed cast only the computation. Adapters are
float32 with every precision. Before the training, `precision_faults` names what a combination of
dtype, precision and recovery loses. Updates of a learning rate of 1e-4 vanish in bfloat16 weights,
and small gradients become zero in float16.
"""

from __future__ import annotations

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

_TRUE = {"bf16-true": torch.bfloat16, "16-true": torch.float16}  # these cast every weight


def weights_type(precision: str) -> torch.dtype | None:
    """Return the type to which a Trainer's precision casts all weights; None if it casts none."""
    return _TRUE.get(precision)


def sharded_policy(precision: str) -> MixedPrecisionPolicy:
    """Return in which types FSDP2 gathers weights and sums gradients.

    Mixed precision computes in bfloat16, so weights are gathered in it; sums stay in float32.
    """
    if precision == "bf16-mixed":
        return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return MixedPrecisionPolicy()


def precision_faults(dtype: torch.dtype, precision: str, recovery: str) -> list[str]:
    """Return a warning for each thing that a combination loses; most combinations lose nothing.

    Args:
        dtype: dtype of the model's weights.
        precision: precision of the Trainer.
        recovery: "lora", "full" or "none", which trains nothing.

    Raises:
        ValueError: for a combination that cannot be trained.
    """
    cast = _TRUE.get(precision, dtype)
    faults = []
    if cast != dtype:
        faults.append(
            f"precision={precision} casts {dtype} weights to {cast}, and final/ is saved so; set "
            f"model.dtype={str(cast).removeprefix('torch.')} to prune and measure the same weights"
        )
    if recovery == "full" and cast != torch.float32:
        if precision == "16-mixed" and cast == torch.float16:
            raise ValueError(
                "recovery=full of torch.float16 weights cannot be trained with precision=16-mixed: "
                "torch scales no float16 gradients; set model.dtype=float32"
            )
        faults.append(
            f"recovery=full trains {cast} weights, in which small updates are lost; "
            "set model.dtype=float32 and trainer.precision=bf16-mixed"
        )
    if recovery != "none" and cast == torch.float16 and precision != "16-mixed":
        faults.append(
            f"precision={precision} does not scale the loss of torch.float16 weights, whose small "
            "gradients become zero; set precision=16-mixed, or model.dtype=bfloat16"
        )
    return faults
