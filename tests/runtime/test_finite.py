"""A number that is none is found in each tensor, and named, wherever a model comes or goes."""

import copy
import re
import shutil

import pytest
import torch
from methods_table import METHODS
from poison import FAULTS, places, poison, poison_file
from runs import write_model
from text_tokenizers import make_tokenizer
from tiny import FAMILIES, tiny_model, token_windows
from torch import nn

import prunelight
from prunelight.runtime.finite import (
    check_checkpoint_tensors,
    check_model,
    check_tensors,
    check_weights,
    fault_of,
)

TYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e5m2]
SMALL = {"num_hidden_layers": 2, "tie_word_embeddings": False}
PLACES = places(tiny_model(**SMALL))


def told(name, fault):
    return rf"^[^\n]*: {re.escape(name)} holds {fault}; [^\n]*$"


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("place", [0, 4999, 9999])
def test_one_number_that_is_none_is_found_in_every_type(dtype, fault, place):
    tensor = torch.ones(10_000)
    tensor[place] = FAULTS[fault]
    assert fault_of(tensor.to(dtype).view(100, 100).T) == fault
    assert fault_of(torch.ones(3, dtype=dtype)) == ""


def test_the_largest_numbers_of_each_type_are_no_fault():
    for dtype in TYPES:
        limits = torch.finfo(dtype)
        assert fault_of(torch.tensor([limits.max, limits.min], dtype=dtype).repeat(1000)) == ""


@pytest.mark.parametrize(
    "tensor",
    [torch.tensor([1]), torch.tensor([True]), torch.empty(0), torch.empty(2, device="meta")],
)
def test_tensors_without_floating_numbers_have_no_fault(tensor):
    check_tensors([("x", tensor)], "it", "help")


def test_a_mask_of_minus_infinity_is_right_in_a_buffer_only():
    module = nn.Module()
    module.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
    check_model(module, "it", "help")
    module.register_buffer("scale", torch.tensor([torch.inf]))
    with pytest.raises(ValueError, match=told("scale", "inf")):
        check_model(module, "it", "help")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "whole", **SMALL)


@pytest.mark.parametrize(("name", "fault"), PLACES)
def test_load_names_the_tensor(name, fault, written, tmp_path):
    directory = shutil.copytree(written, tmp_path / "model")
    poison_file(directory / "model.safetensors", name, fault)
    with pytest.raises(ValueError, match=told(name, fault)):
        prunelight.load(directory)


@pytest.mark.parametrize(("name", "fault"), PLACES)
def test_save_names_the_tensor_and_keeps_what_was_there(name, fault, tmp_path):
    model, tokenizer = tiny_model(**SMALL), make_tokenizer(bos_token="<s>")
    poison(model, name, fault)
    with pytest.raises(ValueError, match=told(name, fault)):
        prunelight.save(model, tokenizer, tmp_path / "saved")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("method", METHODS)
def test_each_method_names_the_tensor_before_it_plans_or_applies(method):
    model, windows = tiny_model(), token_windows(16)
    # A plan of this one takes text of more words; its steps are those of SliceGPT.
    planned = "SliceGPT" if method == "DynamicSlicing, sweep" else method
    plan = METHODS[planned].make().plan(model, windows)
    unchanged = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, fault in places(model):
        if "layers." in name and "layers.3." not in name:
            continue
        healthy = model.get_parameter(name).detach().clone()
        poison(model, name, fault)
        with pytest.raises(ValueError, match=told(name, fault)):
            METHODS[method].make().plan(model, windows)
        with pytest.raises(ValueError, match=told(name, fault)):
            prunelight.apply(model, plan, windows, strict=False)
        model.get_parameter(name).data.copy_(healthy)
    assert all(torch.equal(tensor, unchanged[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_no_tensor_of_any_family_is_passed_over_and_none_that_is_right_refused(family):
    model = tiny_model(family)
    check_weights(model)
    for name, fault in places(model):
        broken = copy.deepcopy(model)
        poison(broken, name, fault)
        with pytest.raises(ValueError, match=told(name, fault)):
            check_weights(broken)


def test_optimizer_states_are_looked_at_too():
    state = {"step": torch.tensor(3.0), "exp_avg_sq": torch.tensor([1.0, torch.inf])}
    checkpoint = {"state_dict": {}, "optimizer_states": [{"state": {7: state}, "param_groups": []}]}
    with pytest.raises(ValueError, match=told("optimizer state 0.state.7.exp_avg_sq", "inf")):
        check_checkpoint_tensors(checkpoint, "it", "help")
