"""Each method on a GPU, with the whole model there and with one layer there at a time.

    python -m pytest tests/gpu

Without CUDA all of it is skipped; an emulated device stands in, in end_to_end/test_other_device.py.
"""

import pytest
import torch
from device_parity import NAMES, check, compared
from tiny import tiny_model

from prunelight.evaluation.saved.subject import find_device
from prunelight.models import placement
from prunelight.models.placement import has_room, move_if_it_fits, to_device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA"),
]
CUDA = torch.device("cuda", 0)
FAMILIES = ("llama", "qwen3", "mixtral", "opt", "gemma2", "gpt2")


def streamed(model):
    return move_if_it_fits(model, CUDA, offload=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_method_does_on_a_gpu_what_it_does_on_the_cpu(name):
    check(compared(name, "llama", lambda model: to_device(model, CUDA), CUDA), "cuda")


@pytest.mark.parametrize("name", NAMES)
def test_so_it_does_with_one_layer_there_at_a_time(name):
    put = lambda model: move_if_it_fits(model, CUDA, offload=True)
    check(compared(name, "llama", put, CUDA), "cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_every_family_go_to_the_gpu(family):
    for name in ("ShortGPT by number", "Wanda"):
        check(compared(name, family, streamed, CUDA), "cpu")


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "auto"])
def test_a_model_that_is_there_is_not_asked_for_room_beside_itself(name, monkeypatch):
    model = to_device(tiny_model(), CUDA)
    monkeypatch.setattr(placement, "free_memory", lambda device: 0)
    assert find_device(name).index is not None
    assert has_room(model, find_device(name))
    assert has_room(model, torch.device("cuda"))
