"""One process or many: which strategies are allowed, and which ranks share the work of a run.

`strategy: fsdp2` is Lightning's ModelParallelStrategy with all processes in one group that shards
data and weights, and whole checkpoints in one file, as any other strategy writes them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    StrategyRegistry,
)
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import Tensor

from prunelight.losses import IGNORED_LABEL
from prunelight.recovery.sharded_weights import gather_trained
from prunelight.run.checkpoints import reading
from prunelight.runtime.processes import ProcessGroup

Result = TypeVar("Result")


class FSDP2Strategy(ModelParallelStrategy):
    """FSDP2 over all processes; checkpoints are whole files, which are checked before they load."""

    def __init__(self, **settings: Any) -> None:  # of ModelParallelStrategy, such as timeout
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **settings)

    def setup_environment(self) -> None:
        """Let the data-parallel group hold all processes, on all nodes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        """Load weights and optimizer into their shards, after the module has checked the file."""
        module: Any = self.lightning_module
        with reading(checkpoint_path):
            file = torch.load(checkpoint_path, mmap=True, map_location="cpu", weights_only=True)
        module.check_checkpoint(file)
        return super().load_checkpoint(checkpoint_path, weights_only=weights_only)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Gather what is trained: a frozen base can be larger than the memory of one process."""
        assert self.model is not None
        return gather_trained(self.model)


StrategyRegistry.register("fsdp2", FSDP2Strategy, override=True)


def check_strategy(trainer: Trainer, quantization: str = "none", recovery: str = "lora") -> None:
    """Check that the strategy leaves the right model in the right process.

    Raises:
        ValueError: for spawn and fork strategies, those that pruning, quantization or the recovery
            cannot work under, and more processes than CPU cores to run them.
    """
    cores = os.cpu_count() or 1
    if isinstance(trainer.accelerator, CPUAccelerator) and trainer.num_devices > cores:
        raise ValueError(
            f"devices={trainer.num_devices} starts more processes than this machine has CPU cores "
            f"({cores}); use devices={cores} at most"
        )
    untrained = recovery == "none" and trainer.state.fn not in ("validate", "test")
    if untrained and isinstance(trainer.strategy, DDPStrategy):
        raise ValueError(
            "recovery=none trains nothing, and DDP takes no model without trained weights; use "
            "one device or strategy=fsdp2"
        )
    check_quantized_strategy(trainer, quantization)
    strategy, name = trainer.strategy, type(trainer.strategy).__name__
    if isinstance(strategy.launcher, _MultiProcessingLauncher):
        raise ValueError(
            f"strategy {name} starts its processes by spawn or fork, after which the main "
            "process holds a model that was never pruned; use strategy=ddp"
        )
    if isinstance(strategy, DeepSpeedStrategy):
        _check_deepspeed(strategy)
    elif type(strategy) is ModelParallelStrategy:
        raise ValueError(
            "ModelParallelStrategy itself may cut tensors up, and writes checkpoints that are not "
            "whole at once; use strategy=fsdp2, which is that strategy without both"
        )
    elif not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy, FSDP2Strategy)):
        raise ValueError(f"strategy {name} is not supported; use one device, ddp or fsdp2")


def _check_deepspeed(strategy: DeepSpeedStrategy) -> None:
    """Refuse the stages that cut weights up, in which nothing here would find them."""
    stage = strategy.config.get("zero_optimization", {}).get("stage", 0) if strategy.config else 0
    if stage == 3:
        raise ValueError(
            "DeepSpeed stage 3 cuts weights up where masks and merging cannot see them; use "
            "strategy=fsdp2, or deepspeed_stage_2"
        )


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


def on_rank_zero(trainer: Trainer, call: Callable[[], Result]) -> Result:
    """Run `call` on rank 0 while the other ranks wait, and return its result on all of them.

    Raises:
        RuntimeError: on the other ranks, if rank 0 failed; there its own error.
    """
    return group_of_run(trainer).on_zero(call)


def group_of_run(trainer: Trainer) -> ProcessGroup:
    """Return the ranks of a run, one alone where the trainer started no others."""
    return ProcessGroup.of_default_group() if trainer.world_size > 1 else ProcessGroup()


def share_of_tokens(trainer: Trainer, labels: Tensor) -> Tensor | float:
    """Return what a rank's mean loss counts: its tokens, as a multiple of those of a mean rank.

    Ranks average gradients; with this factor the average is that over all tokens of all ranks.

    Args:
        trainer: of the run.
        labels: (B, T) of this rank's batch, -100 where a token does not count.
    """
    if trainer.world_size == 1:
        return 1.0
    counted = (labels[:, 1:] != IGNORED_LABEL).sum().float()
    mean = trainer.strategy.reduce(counted.clone(), reduce_op="mean")
    return counted / mean.clamp(min=1 / trainer.world_size)
