"""One pass over the layers for several readers."""

import torch
from tiny import tiny_model, token_windows

from prunelight.calibration.layer_readers import _states_fit


def test_states_of_more_windows_than_the_device_has_memory_for_do_not_fit():
    model = tiny_model()
    assert _states_fit(model, token_windows(4, 16))
    endless = torch.zeros(1, 1, dtype=torch.long).expand(2**30, 2**20)  # of eight bytes
    assert not _states_fit(model, endless)
