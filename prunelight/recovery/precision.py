"""What a Trainer's precision does to the weights of a recovery.

bf16-true and 16-true cast the base; bf16-mixed and 16-mixed cast only the computation. Adapters are
float32 with every precision. Before the training, `precision_faults` names what a combination of
dtype, precision and recovery loses. Updates of a learning rate of 1e-4 vanish in bfloat16 weights,
and small gradients become zero in float16.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

_SLOW = 3.0  # times as long as float32; a busy machine measures up to 2 where there is no reason
_COMPUTED = {
    **dict.fromkeys(("bf16-true", "bf16-mixed"), torch.bfloat16),
    **dict.fromkeys(("16-true", "16-mixed"), torch.float16),
}
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


def slow_precision(
    dtype: torch.dtype, precision: str, recovery: str, slowness: Callable[[torch.dtype], float]
) -> str | None:
    """Return a warning if the device of a run computes slowly in what it takes; most do not.

    The dtype of a run never changes with the machine: the option is named, and not set.

    Args:
        dtype: dtype of the model's weights.
        precision: precision of the Trainer.
        recovery: "lora", "full" or "none", which trains nothing.
        slowness: returns how many times as long as in float32 the device takes in a dtype.
    """
    trained = _COMPUTED.get(precision, dtype) if recovery != "none" else dtype
    for used, option in ((dtype, "model.dtype=float32"), (trained, "trainer.precision=32-true")):
        times = slowness(used)
        if times > _SLOW:
            name = str(used).removeprefix("torch.")
            return (
                f"{name} takes about {times:.0f} times as long as float32 on this machine, "
                f"which has no instructions for it; set {option} if time matters"
            )
    return None


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
