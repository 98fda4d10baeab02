"""Strategies of Lightning that a run accepts or refuses."""

import pytest
from lightning.pytorch.strategies import ModelParallelStrategy
from runs import make_trainer

from prunelight.callbacks import ShortGPT
from prunelight.run.strategies import check_strategy


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_spawn_and_fork_strategies_are_refused(tmp_path, strategy):
    trainer = make_trainer(tmp_path, ShortGPT(num_layers=2), strategy=strategy)
    with pytest.raises(ValueError, match="spawn or fork.*use strategy=ddp"):
        check_strategy(trainer)


def test_ddp_without_anything_to_train_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, strategy="ddp")
    with pytest.raises(ValueError, match="recovery=none trains nothing, and DDP takes no model"):
        check_strategy(trainer, recovery="none")


def test_lightnings_own_model_parallel_strategy_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, strategy=ModelParallelStrategy(tensor_parallel_size=2))
    with pytest.raises(ValueError, match="may cut tensors up.*use strategy=fsdp2"):
        check_strategy(trainer)
