"""Private names of Lightning that we use are there; tested with Lightning 2.6."""

import inspect

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import launchers

from prunelight.training.resuming import kept_checkpoints

TRAINER = pl.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)


@pytest.mark.parametrize(
    ("holder", "names"),
    [
        # callbacks/recovery/checkpoint.py
        (TRAINER, ["_signal_connector"]),
        (TRAINER._signal_connector, ["received_sigterm", "_sigterm_notifier_fn"]),
        (TRAINER.fit_loop, ["_data_fetcher", "_should_accumulate", "_can_stop_early"]),
        (_TrainingEpochLoop, ["_should_check_val_fx"]),
        (
            ModelCheckpoint,
            ["_find_last_checkpoints", "_save_last_checkpoint", "_monitor_candidates"],
        ),
        (ModelCheckpoint(), ["_last_global_step_saved", "_every_n_train_steps"]),
        # prunelight/training/resuming/kept_checkpoints.py
        (ModelCheckpoint(), list(kept_checkpoints._COUNTERS)),
        (ModelCheckpoint(), ["best_k_models", "kth_value", "kth_best_model_path", "file_exists"]),
        # prunelight/run/strategies.py
        (launchers, ["_MultiProcessingLauncher"]),
        (TRAINER.fit_loop._data_source, ["is_defined", "dataloader"]),
        (TRAINER.fit_loop.epoch_loop.val_loop._data_source, ["is_defined", "dataloader"]),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, list) else "",
)
def test_a_private_name_is_there(holder, names):
    assert [name for name in names if not hasattr(holder, name)] == []


def test_lightning_looks_setup_up_on_the_instance():
    """training/own_module.py puts a `setup` there for one call."""
    from lightning.pytorch.trainer import call

    assert "getattr(pl_module, hook_name)" in inspect.getsource(call._call_lightning_module_hook)
