"""Best and last checkpoints survive any number of kills, however they are configured."""

import random

import pytest
import runs
from checkpoint_settings import CHOICES, LateStop, Stop, draw, draw_stop, fit, result
from runs import write_model


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=3)


@pytest.fixture(scope="module", autouse=True)
def brief():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "TEXT", runs.TEXT[:400])
        yield


def check(name, root, seed):
    """Compare a run that is stopped at random moments with a whole one."""
    rng = random.Random(seed)
    settings = draw(rng)
    whole = fit(name, root / "whole", settings, Stop(None, 0))
    stops = []
    for _ in range(3):
        stops.append(draw_stop(rng))
        if (stopped := fit(name, root / "stopped", settings, stops[-1])) is not None:
            break
    else:
        stopped = fit(name, root / "stopped", settings, Stop(None, 0))
    assert result(stopped) == result(whole), (settings, [vars(stop) for stop in stops])


@pytest.mark.parametrize("seed", range(4))
def test_a_stopped_run_leaves_the_files_scores_and_weights_of_a_whole_one(name, tmp_path, seed):
    check(name, tmp_path, seed)


@pytest.mark.parametrize("filename", ["best", "{step}"])
def test_the_best_step_without_dirpath_survives_a_new_version_of_the_logs(name, tmp_path, filename):
    settings = {key: values[0] for key, values in CHOICES.items()}
    settings |= {"filename": filename, "interval": 2, "every": 1}
    whole = fit(name, tmp_path / "whole", settings, Stop(None, 0))
    (score,) = whole.checkpoint_callbacks[0].best_k_models.values()
    assert fit(name, tmp_path / "run", settings, Stop("on_train_batch_start", 11)) is None
    resumed = fit(name, tmp_path / "run", settings, Stop(None, 0))
    assert result(resumed) == result(whole)
    assert resumed.checkpoint_callbacks[0].best_model_score == score
    assert len(list((tmp_path / "run" / "logs").iterdir())) == 2


def test_a_run_that_ends_after_its_last_step_still_takes_the_best_weights(name, tmp_path):
    settings = {key: values[0] for key, values in CHOICES.items()}
    settings |= {"filename": "best", "interval": 1, "save_weights_only": True}
    whole = fit(name, tmp_path / "whole", settings, Stop(None, 0))
    assert fit(name, tmp_path / "run", settings, Stop("on_train_end", 1)) is None
    assert fit(name, tmp_path / "run", settings, LateStop("on_fit_end", 1)) is None
    assert result(fit(name, tmp_path / "run", settings, Stop(None, 0))) == result(whole)


def test_a_run_that_was_moved_finds_its_best_step(name, tmp_path):
    settings = {key: values[0] for key, values in CHOICES.items()} | {"filename": "{step}"}
    whole = fit(name, tmp_path / "whole", settings, Stop(None, 0))
    first = fit(name, tmp_path / "first", settings, Stop("on_train_epoch_end", 3))
    assert first is None
    (tmp_path / "first").rename(tmp_path / "second")
    assert result(fit(name, tmp_path / "second", settings, Stop(None, 0))) == result(whole)


def test_a_best_checkpoint_that_is_gone_is_told(name, tmp_path, caplog):
    settings = {key: values[0] for key, values in CHOICES.items()} | {"filename": "best"}
    fit(name, tmp_path, settings, Stop("on_train_epoch_end", 3))
    (tmp_path / "checkpoints" / "best.ckpt").unlink()
    fit(name, tmp_path, settings, Stop(None, 0))
    assert "best.ckpt is gone, which was kept for val/perplexity" in caplog.text


def test_a_start_anew_that_is_killed_leaves_no_resume_point_of_the_run_before(name, tmp_path):
    settings = {key: values[0] for key, values in CHOICES.items()}
    settings |= {"filename": "best", "interval": 1, "every": 3}
    whole = fit(name, tmp_path / "whole", settings, Stop(None, 0))
    root = tmp_path / "run"
    assert fit(name, root, settings, Stop("on_train_batch_start", 5)) is None
    assert fit(name, root, settings, Stop("on_train_batch_start", 3), ckpt_path=None) is None
    (root / "checkpoints" / "last-earlier.ckpt").unlink()
    assert result(fit(name, root, settings, Stop(None, 0))) == result(whole)


def test_a_damaged_best_checkpoint_is_told_before_the_training_goes_on(name, tmp_path):
    settings = {key: values[0] for key, values in CHOICES.items()} | {"filename": "best"}
    fit(name, tmp_path, settings, Stop("on_train_epoch_end", 3))
    file = tmp_path / "checkpoints" / "best.ckpt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"best.ckpt, which is kept for val/perplexity, is damag"):
        fit(name, tmp_path, settings, Stop(None, 0))


def test_a_name_of_the_resume_point_is_refused(name, tmp_path):
    settings = {key: values[0] for key, values in CHOICES.items()} | {"filename": "last"}
    with pytest.raises(ValueError, match=r"filename='last'\) would write over"):
        fit(name, tmp_path, settings, Stop(None, 0))


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(100, 200))
def test_every_way_to_keep_checkpoints_survives_stops_at_every_hook(name, tmp_path, seed):
    check(name, tmp_path, seed)
