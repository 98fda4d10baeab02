"""The angular distance over a window of layers."""

import math

import pytest
import torch
from lively_models import lively_model
from tiny import NUM_LAYERS, token_windows

from prunelight.scoring.angular_distance import angular_distance, angular_distances

WINDOWS = token_windows(4, 16)


@pytest.fixture(scope="module")
def model():
    """Read-only: scoring changes nothing (end_to_end/test_families.py)."""
    return lively_model()


def random_states(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_angles_are_a_share_of_pi():
    x = torch.tensor([[1.0, 0.0]] * 4)
    y = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [1.0, 1.0]])
    assert angular_distance(x, y).tolist() == pytest.approx([0, 0.5, 1, 0.25], abs=1e-7)


def test_equal_states_have_no_distance_and_opposite_ones_the_largest():
    states = random_states(200, 64)
    assert angular_distance(states, states).max() == 0
    assert angular_distance(states, -states).min() == 1


@pytest.mark.parametrize("angle", [1e-3, 1e-2, 0.1, 1.0, math.pi - 1e-3])
def test_small_angles_are_exact(angle):
    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[math.cos(angle), math.sin(angle)]])
    # The angle of float32 vectors is known to about 1e-7.
    assert math.pi * angular_distance(x, y).item() == pytest.approx(angle, abs=5e-7)


@pytest.mark.parametrize("size", [0, 1, 3, NUM_LAYERS])
def test_every_window_of_layers_has_an_angle(model, size):
    distances = angular_distances(model, WINDOWS, size)
    assert len(distances) == NUM_LAYERS - size + 1
    assert all(0 < d < 1 for d in distances) if size else distances == [0] * (NUM_LAYERS + 1)


def test_angles_obey_the_triangle_inequality(model):
    single = angular_distances(model, WINDOWS, 1)
    (whole,) = angular_distances(model, WINDOWS, NUM_LAYERS)
    assert max(single) < whole <= sum(single)
