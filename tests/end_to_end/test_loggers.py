"""What a run logs to: CSV files always, TensorBoard if it is installed, and what a config names."""

import csv
import sys
from importlib.util import find_spec

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from runs import TEXT, write_model

from prunelight.cli import main
from prunelight.lightning_cli import loggers_of

WITH_BOARD = find_spec("tensorboard") is not None
needs_board = pytest.mark.skipif(not WITH_BOARD, reason="tensorboard is missing: pip install it")


@pytest.mark.parametrize("given", [None, True])
@pytest.mark.parametrize("installed", [True, False])
def test_csv_is_always_written_and_tensorboard_if_it_is_installed(
    given, installed, tmp_path, monkeypatch
):
    if installed and not WITH_BOARD:
        pytest.skip("tensorboard is missing: pip install it")
    if not installed:
        for name in ("tensorboard", "tensorboardX"):
            monkeypatch.setitem(sys.modules, name, None)
    kinds = [type(logger) for logger in loggers_of(given, tmp_path)]
    assert kinds == ([CSVLogger, TensorBoardLogger] if installed else [CSVLogger])


@needs_board
@pytest.mark.parametrize("as_list", [True, False])
def test_a_logger_of_the_config_logs_beside_csv(as_list, tmp_path):
    board = TensorBoardLogger(tmp_path)
    loggers = loggers_of([board] if as_list else board, tmp_path)
    assert loggers[0] is board
    assert [type(logger) for logger in loggers[1:]] == [CSVLogger]


def test_a_csv_logger_of_the_config_stays_alone(tmp_path):
    own = CSVLogger(tmp_path)
    assert loggers_of(own, tmp_path) == [own]


def test_logger_false_logs_nothing(tmp_path):
    assert loggers_of(False, tmp_path) is False


@needs_board
def test_the_curves_of_a_run_go_on_in_one_directory_after_a_resume(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    sources = dict.fromkeys(("train", "validation", "calibration"), "text.txt")
    config = {
        "model": {"name": "model", "recovery": "lora"},
        "data": {**sources, "seq_len": 32, "num_calibration": 2, "num_validation": 2},
        "trainer": {
            "default_root_dir": "run",
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "callbacks": [{"class_path": "ShortGPT", "init_args": {"num_layers": 1}}],
        },
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    for steps in ("2", "4"):
        main(["fit", "--config", "c.yaml", "--trainer.max_steps", steps])
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    steps = [event.step for event in events.Scalars("train/loss")]
    assert steps == [0, 1, 2, 3]
    rows = [
        row
        for file in sorted((tmp_path / "run" / "logs").glob("version_*/metrics.csv"))
        for row in csv.DictReader(file.open())
    ]
    assert [int(row["step"]) for row in rows if row["train/loss"]] == steps
