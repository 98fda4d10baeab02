"""Layers that a step has finished in files become shards of the result, without a copy."""

import json
import shutil

import pytest
import tiny
import torch
from plans import make_plan
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from prunelight.models import saving
from prunelight.models.families.layers import decoder_layers
from prunelight.models.families.matrices import matrices
from prunelight.models.saving import save
from prunelight.planning.fingerprints import describe_model
from prunelight.planning.steps import RemoveLayers, Sparsify
from prunelight.pruning.apply import apply

ALWAYS = ("llama", "gpt2", "mixtral", "qwen3_moe", "gemma2", "rwkv")
WITHOUT_EXPERTS = {"mixtral": 0, "qwen3_moe": 3}  # files of transformers hold experts one by one
FAMILIES = [
    family if family in ALWAYS else pytest.param(family, marks=pytest.mark.sweep)
    for family in {**tiny.FAMILIES, **tiny.UNKNOWN_FAMILIES}
]
WINDOWS = tiny.token_windows(4, 16)


@pytest.fixture(autouse=True)
def large(monkeypatch):
    """Let tiny models pass for large ones, which are saved as several files."""
    monkeypatch.setattr(saving, "_ONE_FILE", 0)


def pruned(model, scratch, *, removed=()):
    """Return a model with half of each matrix zero; the layers it finished lie in `scratch`."""
    left = {
        name: 0.5
        for index in range(len(decoder_layers(model)))
        if index not in removed
        for name in matrices(model)
        if f".{index}." in name
    }
    steps = (*([RemoveLayers(tuple(removed))] if removed else ()), Sparsify(left, "wanda"))
    plan = make_plan(model=describe_model(model), steps=steps)
    return apply(model, plan, WINDOWS, scratch=scratch)


def linked(directory, scratch):
    """Return the layers' files that are files of the directory too."""
    layers = sorted(scratch.glob("step-*/layer-*.safetensors"))
    return [
        layer
        for layer in layers
        if any(layer.samefile(file) for file in directory.glob("*.safetensors"))
    ]


def check_loads(model, directory):
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    theirs = loaded.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name
    with torch.no_grad():
        torch.testing.assert_close(loaded(WINDOWS).logits, model(WINDOWS).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_finished_layers_are_shards_of_the_result_in_every_family(tmp_path, tiny_tokenizer, family):
    model = pruned(tiny.tiny_model(family), tmp_path / "layers")
    save(model, tiny_tokenizer, tmp_path / "out", finished=tmp_path / "layers")
    count = len(linked(tmp_path / "out", tmp_path / "layers"))
    if family in ALWAYS:
        assert count == WITHOUT_EXPERTS.get(family, len(decoder_layers(model)))
    shutil.rmtree(tmp_path / "layers")
    check_loads(model, tmp_path / "out")


def test_the_index_names_each_weight_once_in_the_file_that_holds_it(tmp_path, tiny_tokenizer):
    model = pruned(tiny.tiny_model(), tmp_path / "layers", removed=[1])
    save(model, tiny_tokenizer, tmp_path / "out", finished=tmp_path / "layers")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    total = len(decoder_layers(model)) + 1
    assert files == [f"model-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
    held = {}
    for file in files:
        with safe_open(tmp_path / "out" / file, framework="pt") as tensors:
            assert not {*tensors.keys()} & {*held}
            held |= dict.fromkeys(tensors.keys(), file)
    assert held == index["weight_map"]
    stored = {name: x for name, x in model.state_dict().items() if name in held}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
    check_loads(model, tmp_path / "out")


@pytest.mark.parametrize("in_place", [True, False])
def test_a_layer_that_changed_since_is_copied(tmp_path, tiny_tokenizer, in_place):
    model = pruned(tiny.tiny_model(), tmp_path / "layers")
    weight = decoder_layers(model)[1].mlp.down_proj.weight
    if in_place:
        weight.data.mul_(2)
    else:
        weight.data = 2 * weight.data
    save(model, tiny_tokenizer, tmp_path / "out", finished=tmp_path / "layers")
    names = {file.stem for file in linked(tmp_path / "out", tmp_path / "layers")}
    expected = {f"layer-{i:05d}" for i in range(len(decoder_layers(model)))}
    assert names == expected - {"layer-00001"}
    check_loads(model, tmp_path / "out")


def test_layers_whose_files_are_gone_are_copied(tmp_path, tiny_tokenizer, caplog):
    model = pruned(tiny.tiny_model(), tmp_path / "layers")
    shutil.rmtree(tmp_path / "layers")
    save(model, tiny_tokenizer, tmp_path / "out", finished=tmp_path / "layers")
    assert "layers is no directory: all weights are copied" in caplog.text
    check_loads(model, tmp_path / "out")


def test_a_file_system_without_links_gets_copies(tmp_path, tiny_tokenizer, monkeypatch):
    model = pruned(tiny.tiny_model(), tmp_path / "layers")

    def refuse(self, target):
        raise OSError("no links here")

    monkeypatch.setattr("pathlib.Path.hardlink_to", refuse)
    save(model, tiny_tokenizer, tmp_path / "out", finished=tmp_path / "layers")
    assert [file.name for file in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    check_loads(model, tmp_path / "out")


def test_files_of_other_weights_are_left_where_they_are(tmp_path, tiny_tokenizer):
    model = pruned(tiny.tiny_model(), tmp_path / "layers")
    odd = tmp_path / "layers" / "odd"
    odd.mkdir()
    first = sorted(tmp_path.glob("layers/*/layer-*.safetensors"))[0]
    shutil.copy(first, odd / "same.safetensors")
    name, weight = next(iter(load_file(first).items()))
    save_file({name: weight.bfloat16()}, odd / "other-dtype.safetensors")
    save_file({name: weight, "unknown": weight.clone()}, odd / "unknown-name.safetensors")
    save_file({}, odd / "empty.safetensors")
    save(model, tiny_tokenizer, tmp_path / "out", finished=tmp_path / "layers")
    same = [file.samefile(odd / "same.safetensors") for file in (tmp_path / "out").glob("*.s*")]
    assert sum(same) == 1  # in the place of the first layer's own file
    others = len(decoder_layers(model)) - 1
    assert len(linked(tmp_path / "out", tmp_path / "layers")) == others
    check_loads(model, tmp_path / "out")


def test_small_models_are_one_file(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.undo()
    model = pruned(tiny.tiny_model(), tmp_path / "layers")
    save(model, tiny_tokenizer, tmp_path / "out", finished=tmp_path / "layers")
    assert [file.name for file in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
