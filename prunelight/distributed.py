"""One process or many: which strategies are allowed, and work that one rank does for all."""

from __future__ import annotations

from collections.abc import Callable

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher


def check_strategy(trainer: Trainer, quantization: str = "none") -> None:
    """Check that the strategy leaves the right model in the right process.

    Raises:
        ValueError: for spawn and fork strategies, and for sharded ones.
    """
    check_quantized_strategy(trainer, quantization)
    strategy, name = trainer.strategy, type(trainer.strategy).__name__
    if isinstance(strategy.launcher, _MultiProcessingLauncher):
        raise ValueError(
            f"strategy {name} starts its processes by spawn or fork, after which the main "
            "process holds a model that was never pruned; use strategy=ddp"
        )
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise ValueError(f"strategy {name} is not supported; use one device or strategy=ddp")


def check_quantized_strategy(trainer: Trainer, quantization: str) -> None:
    """Check that every process holds the whole model, as packed 4-bit and 8-bit weights need.

    Raises:
        ValueError: for sharded strategies (FSDP, DeepSpeed, tensor parallel).
    """
    whole = isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy))
    if quantization != "none" and not whole:
        raise ValueError(
            f"quantization={quantization} packs weights, which strategy "
            f"{type(trainer.strategy).__name__} would shard; use one device or strategy=ddp, or "
            "quantization=none"
        )


def on_rank_zero(trainer: Trainer, call: Callable[[], str | None]) -> str | None:
    """Run `call` on rank 0 while the other ranks wait, and return its result on all of them.

    Raises:
        RuntimeError: on the other ranks, if rank 0 failed; there its own error.
    """
    result: str | None = None
    failure: Exception | None = None
    if trainer.is_global_zero:
        try:
            result = call()
        except Exception as error:  # the other ranks wait for word
            failure = error
    told = (result, None if failure is None else str(failure))
    result, reason = trainer.strategy.broadcast(told)
    if failure is not None:
        raise failure
    if reason is not None:
        raise RuntimeError(f"rank 0 failed: {reason}")
    return result
