"""Strategies of Lightning that a run accepts or refuses."""

import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch.strategies import ModelParallelStrategy
from runs import make_trainer, write_model

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


# In a process of its own, which has a process group afterwards.
EVALUATE_UNDER_FSDP2 = """
import sys
from pathlib import Path

from runs import make_data, make_module, make_trainer

from prunelight.callbacks import RecoveryCheckpoint

name, root = sys.argv[1], Path(sys.argv[2])
sharded = {"strategy": "fsdp2", "devices": 1}
trainer = make_trainer(root, RecoveryCheckpoint(1), max_epochs=1, max_steps=1, **sharded)
trainer.fit(make_module(name), make_data(name, root))
other = make_trainer(root, **sharded)
checkpoint = root / "checkpoints" / "last.ckpt"
other.validate(make_module(name), make_data(name, root), ckpt_path=checkpoint, weights_only=True)
"""


@pytest.mark.slow
def test_a_checkpoint_under_fsdp2_is_refused_by_a_module_that_did_not_train_it(tmp_path):
    name = write_model(tmp_path / "model")
    support = Path(__file__).resolve().parents[1] / "support"
    done = subprocess.run(
        [sys.executable, "-c", EVALUATE_UNDER_FSDP2, name, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=support,
        check=False,
    )
    told = done.stderr.strip().splitlines()[-1]
    assert "is evaluated under one device or ddp; evaluate final/ instead" in told, done.stderr
