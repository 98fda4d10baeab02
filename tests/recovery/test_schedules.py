"""Learning rates: how they rise, stay and fall."""

from itertools import pairwise

import pytest
import torch
from runs import make_module, write_model

from prunelight.recovery.schedules import make_schedule


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


def rates(name, steps, warmup=0, **arguments):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = make_schedule(name, optimizer, warmup, steps, arguments)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_warmup_stable_decay_rises_stays_and_decays_over_the_last_tenth():
    found = rates("warmup_stable_decay", 100, warmup=5)
    assert found[:5] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert found[5:91] == [1.0] * 86
    assert all(high > low for high, low in pairwise(found[90:]))
    assert rates("warmup_stable_decay", 100, num_decay_steps=50).count(1.0) == 51


def test_arguments_of_the_schedule_are_passed_on_and_odd_ones_named(name):
    floor = rates("cosine_with_min_lr", 50, min_lr_rate=0.1)
    assert min(floor) >= 0.1
    with pytest.raises(ValueError, match=r"lr_scheduler_kwargs=\{'decay': 3\} do not fit linear"):
        make_module(name, lr_scheduler_kwargs={"decay": 3})
