"""Best and last checkpoints survive any number of kills, however they are configured."""

import random

import pytest
import runs
from checkpoint_settings import Stop, draw, draw_stop, fit, result
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


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 200))
def test_every_way_to_keep_checkpoints_survives_stops_at_every_hook(name, tmp_path, seed):
    check(name, tmp_path, seed)
