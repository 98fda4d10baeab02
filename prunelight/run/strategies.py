"""Where a run takes place: its Trainer, its processes, and the strategies that it may use.

`strategy: fsdp2` is Lightning's ModelParallelStrategy with all processes in one group that shards
data and weights. It writes whole checkpoints in one file, as the other strategies do. All that this
package needs of a Trainer outside the folder `training` goes through `Place`.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    StrategyRegistry,
)
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from prunelight.losses import IGNORED_LABEL
from prunelight.recovery.sharded_weights import gather_trained, load_trained, shard
from prunelight.runtime.files.checkpoint_files import read_checkpoint
from prunelight.runtime.processes import ProcessGroup


@dataclass(frozen=True)
class Place:
    """Where a run takes place: its Trainer, in the words of this package.

    Attributes:
        trainer: whose processes, devices and data the run uses.
    """

    trainer: Trainer

    @cached_property
    def root(self) -> Path:
        """Directory of the run."""
        return Path(self.trainer.default_root_dir)

    @property
    def device(self) -> torch.device:
        """Device of this process."""
        return self.trainer.strategy.root_device

    @cached_property
    def group(self) -> ProcessGroup:
        """Processes of the run; one alone where the Trainer started no others."""
        return group_of_run(self.trainer)

    @property
    def data(self) -> Any:
        """What gives the run its batches: a LightningDataModule, the module itself, or loaders."""
        datamodule = getattr(self.trainer, "datamodule", None)
        return self._loaders if datamodule is None else datamodule

    @property
    def _loaders(self) -> Loaders:
        """The dataloaders that `Trainer.fit` was given, or those of the module."""
        # Private names of Lightning 2.5 and 2.6; a test says if they are gone.
        fit_loop = self.trainer.fit_loop
        sources = {
            "train_dataloader": fit_loop._data_source,
            "val_dataloader": fit_loop.epoch_loop.val_loop._data_source,
        }
        defined = {
            name: source.dataloader
            for name, source in sources.items()
            if source.instance is not None and source.is_defined()
        }
        return Loaders(**defined)

    def gives(self, name: str) -> bool:
        """Whether the data has a method `name` that is not Lightning's own, which only raises."""
        data = self.data
        if isinstance(data, LightningDataModule) and hasattr(LightningDataModule, name):
            return is_overridden(name, data)
        return callable(getattr(data, name, None))

    @property
    def limit_val_batches(self) -> int | float:
        """How many validation batches the Trainer takes; a float is a share of them."""
        limit: int | float = self.trainer.limit_val_batches
        return limit

    @property
    def stage(self) -> str:
        """Which verb runs: "fit", "validate", "test" or "predict"; "prune" outside of them."""
        stage = self.trainer.state.fn
        return "prune" if stage is None else stage.value

    @property
    def resumes_from(self) -> Path | None:
        """The checkpoint that a fit of prunelight's Trainer goes on from; None if not known."""
        asked = getattr(self.trainer, "fit_ckpt_path", None)
        if asked is None or "://" in str(asked):
            return None
        path = self.root / "checkpoints" / "last.ckpt" if asked == "last" else Path(asked)
        return path if path.is_file() else None

    @property
    def precision(self) -> str:
        """Precision of the Trainer, such as "bf16-mixed"."""
        return str(self.trainer.precision)

    @property
    def shards_weights(self) -> bool:
        """Whether the strategy cuts weights into shards."""
        return isinstance(self.trainer.strategy, ModelParallelStrategy)

    def shard(self, model: PreTrainedModel) -> None:
        """Cut a frozen model's weights over the processes, in place; each part goes to its device.

        Embeddings, last norm and head are whole again after the first forward, so that the head can
        be called by itself. All processes must call this, under a strategy that cuts weights.
        """
        strategy = self.trainer.strategy
        assert isinstance(strategy, ModelParallelStrategy)
        shard(model, strategy.device_mesh["data_parallel"], strategy.broadcast)
        assert isinstance(model, FSDPModule)
        model.set_reshard_after_forward(False, recurse=False)

    def optimizer_steps(self) -> float:
        """Return how many optimizer steps the training has; all processes must call this."""
        return self.trainer.estimated_stepping_batches

    def in_precision(self) -> AbstractContextManager[None]:
        """Return a context in which models compute as the Trainer's precision says."""
        return self.trainer.precision_plugin.forward_context()

    def check_strategy(self, quantization: str, recovery: str) -> None:
        """Check that the strategy leaves the right model in the right process.

        Raises:
            ValueError: if it does not; see `check_strategy`.
        """
        check_strategy(self.trainer, quantization, recovery)


class Loaders(SimpleNamespace):
    """The dataloaders of a fit without a datamodule, as the methods of one."""


class FSDP2Strategy(ModelParallelStrategy):
    """FSDP2 over all processes; checkpoints are whole files, which are checked before they load."""

    def __init__(self, **settings: Any) -> None:  # of ModelParallelStrategy, such as timeout
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **settings)

    def setup_environment(self) -> None:
        """Let the data-parallel group hold all processes, on all nodes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        """Load weights and optimizer into their shards, after the module has checked the file.

        Raises:
            ValueError: if the file holds weights only, or is that of another run; or if the module
                is not in training.
        """
        file = self._checked_file(checkpoint_path)
        if "optimizer_states" not in file:
            raise ValueError(
                f"checkpoint {checkpoint_path} holds weights without the optimizer's state, from "
                "which no training goes on; give one that holds it too, such as last.ckpt"
            )
        return super().load_checkpoint(checkpoint_path, weights_only=True)

    def load_weights(self, path: str | Path) -> dict[str, Any]:
        """Load only the trained weights of a checkpoint into their shards; return the rest."""
        file = self._checked_file(path)
        assert self.model is not None
        load_trained(self.model, file.pop("state_dict"))
        return file

    def _checked_file(self, path: Any) -> dict[str, Any]:
        path = self.broadcast(path)  # that of rank 0, as the strategy writes it
        file = read_checkpoint(path, mmap=True)
        module: Any = self.lightning_module
        if not module.run.in_training:
            raise ValueError(
                f"ckpt_path={str(path)!r} is evaluated under one device or ddp; evaluate final/ "
                "instead, or set trainer.strategy=auto"
            )
        module.check_checkpoint(file)
        return file

    def teardown(self) -> None:
        """End what Lightning ends, and the thread that writes checkpoints, which it leaves out."""
        super().teardown()
        self.checkpoint_io.teardown()

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


def group_of_run(trainer: Trainer) -> ProcessGroup:
    """Return the processes of a run, one alone where the Trainer started no others."""
    return ProcessGroup.of_default_group() if trainer.world_size > 1 else ProcessGroup()


def loss_weight(trainer: Trainer, labels: Tensor) -> Tensor | float:
    """Loss weight of this process: its token count divided by the mean count over processes.

    Processes average their gradients. With this weight the average is that over all tokens.

    Args:
        trainer: of the run.
        labels: (B, T) of this process's batch, -100 where a token does not count.
    """
    if trainer.world_size == 1:
        return 1.0
    counted = (labels[:, 1:] != IGNORED_LABEL).sum().float()
    mean = trainer.strategy.reduce(counted.clone(), reduce_op="mean")
    return counted / mean.clamp(min=1 / trainer.world_size)


class ChangedSettings(Callback):
    """Settings of a Trainer that a fit changes, and gives back when it ends, also by an error."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []

    def change(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of a Trainer, or of its loops, until the fit ends."""
        self._before.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Give all back, the last change first."""
        while self._before:
            setattr(*self._before.pop())

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Undo at the end of a fit."""
        self.undo()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Undo after an error, too."""
        self.undo()
