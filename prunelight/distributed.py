"""One process or many: which strategies are allowed, and which ranks share the work of a run."""

from __future__ import annotations

from collections.abc import Callable

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from prunelight.shares import Ranks


def check_strategy(trainer: Trainer) -> None:
    """Check that the strategy leaves the right model in the right process.

    Raises:
        ValueError: for spawn and fork strategies, and for sharded ones.
    """
    strategy, name = trainer.strategy, type(trainer.strategy).__name__
    if isinstance(strategy.launcher, _MultiProcessingLauncher):
        raise ValueError(
            f"strategy {name} starts its processes by spawn or fork, after which the main "
            "process holds a model that was never pruned; use strategy=ddp"
        )
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise ValueError(f"strategy {name} is not supported; use one device or strategy=ddp")


def on_rank_zero(trainer: Trainer, call: Callable[[], str | None]) -> str | None:
    """Run `call` on rank 0 while the other ranks wait, and return its result on all of them.

    Raises:
        RuntimeError: on the other ranks, if rank 0 failed; there its own error.
    """
    return ranks_of_run(trainer).on_zero(call)


def ranks_of_run(trainer: Trainer) -> Ranks:
    """Return the ranks of a run, one alone where the trainer started no others."""
    return Ranks.of_default_group() if trainer.world_size > 1 else Ranks()
