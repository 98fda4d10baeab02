"""Checkpoints in 4 or 8 bits, given as the model: what works with them, and what is refused."""

import pytest
import torch
from runs import make_data, make_module, make_trainer, write_model
from tiny import token_windows
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import prunelight
from prunelight.callbacks import DLP, ShortGPT, SliceGPT, SlidingLayerMerging, WidthPruning
from prunelight.models.packed.grids import has_grids
from prunelight.pruning.rounding.quantize import quantize_gptq

pytest.importorskip("bitsandbytes", reason="pip install 'prunelight[quantization]'")
SETTINGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module", params=[*SETTINGS, "gptq"])
def name(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    full = write_model(directory / "full", hidden_size=64, intermediate_size=128)
    if request.param == "gptq":
        pytest.importorskip("compressed_tensors", reason="pip install 'prunelight[gptq]'")
        model, tokenizer = prunelight.load(full)
        quantize_gptq(model, token_windows(4, 16))
        prunelight.save(model, tokenizer, directory / "packed")
        return str(directory / "packed")
    config = BitsAndBytesConfig(**SETTINGS[request.param])
    packed = AutoModelForCausalLM.from_pretrained(full, quantization_config=config)
    packed.save_pretrained(directory / "packed")
    AutoTokenizer.from_pretrained(full).save_pretrained(directory / "packed")
    return str(directory / "packed")


def test_a_packed_checkpoint_loses_layers_and_is_saved(name, tmp_path):
    model, tokenizer = prunelight.load(name)
    windows = token_windows(4, 16)
    model = prunelight.apply(model, ShortGPT(num_layers=2).plan(model, windows), windows)
    saved = prunelight.save(model, tokenizer, tmp_path / "out")
    assert saved.verification.startswith("reloaded with AutoModelForCausalLM")
    reloaded, _ = prunelight.load(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(reloaded(windows).logits, model(windows).logits)


@pytest.mark.parametrize(
    "method",
    [
        SlidingLayerMerging(num_layers=1),
        ShortGPT(num_layers=1, granularity="attention"),
        WidthPruning(neuron_ratio=0.25, multiple=8),
        SliceGPT(0.25),
        DLP(0.5),
    ],
    ids=lambda method: type(method).__name__,
)
def test_methods_that_change_weights_refuse_a_packed_checkpoint_at_once(name, method):
    model, _ = prunelight.load(name)
    with pytest.raises(TypeError, match="is a quantized .* prune first, save, and"):
        method.plan(model, token_windows(4, 16))


def test_full_training_of_a_packed_checkpoint_is_refused_before_anything_is_computed(
    name, tmp_path
):
    module = make_module(name, recovery="full")
    with pytest.raises(TypeError, match="packed weights, which recovery=full cannot change"):
        make_trainer(tmp_path, ShortGPT(num_layers=1)).fit(module, make_data(name, tmp_path))
    assert not list(tmp_path.glob("pruned-*"))


@pytest.mark.parametrize("name", SETTINGS, indirect=True)
def test_adapters_over_a_packed_checkpoint_are_trained_and_merged(name, tmp_path):
    module = make_module(name, recovery="lora")
    make_trainer(tmp_path, ShortGPT(num_layers=1)).fit(
        module, make_data(name, tmp_path), weights_only=True
    )
    stages = [stage.perplexity for stage in module.record.stages]
    assert stages[-1] < stages[-2]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "final").config.num_hidden_layers == 5


@pytest.fixture(scope="module")
def gptq(tmp_path_factory):
    pytest.importorskip("compressed_tensors", reason="pip install 'prunelight[gptq]'")
    directory = tmp_path_factory.mktemp("gptq")
    model, tokenizer = prunelight.load(write_model(directory / "full"))
    quantize_gptq(model, token_windows(4, 16))
    prunelight.save(model, tokenizer, directory / "packed")
    return str(directory / "packed")


def test_adapters_over_gptq_are_refused_before_anything_is_computed(gptq, tmp_path):
    module = make_module(gptq, recovery="lora")
    with pytest.raises(TypeError, match="quantized by GPTQ, and adapters merged onto its weights"):
        make_trainer(tmp_path, ShortGPT(num_layers=1)).fit(module, make_data(gptq, tmp_path))
    assert not list(tmp_path.glob("pruned-*"))


def test_a_fit_removes_layers_of_a_model_in_gptq(gptq, tmp_path):
    module = make_module(gptq, recovery="none")
    make_trainer(tmp_path, ShortGPT(num_layers=2)).fit(module, make_data(gptq, tmp_path))
    final, _ = prunelight.load(tmp_path / "final")
    assert final.config.num_hidden_layers == 4
    assert has_grids(final)
