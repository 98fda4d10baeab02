"""CTranslate2 computes from an export what transformers computes; the rest is refused."""

import json
import sys

import pytest
import torch
from own_models import own_model
from runs import write_model
from text_tokenizers import make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import prunelight
from prunelight.callbacks import SliceGPT, WidthPruning
from prunelight.export.ctranslate2 import CTranslate2Target, converted_families
from prunelight.export.exporting import export, open_source
from prunelight.export.targets import ExportOptions
from prunelight.pruning.remove_layers import remove_layers

pytest.importorskip("ctranslate2", reason="pip install 'prunelight[export]'")

# Family -> what differs from the tiny model; heads are as wide as hidden_size / heads.
CONVERTED = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False, "vocab_size": 640},
    "qwen3": {"head_dim": 16},  # the converter reads head_dim here
    "gemma": {"head_dim": 16},
    "gpt2": {},
}


def saved(directory, family="llama", **changes):
    """Save a tiny model of which a layer is gone, as prunelight saves it."""
    name = write_model(directory / "dense", family, **changes)
    model, tokenizer = prunelight.load(name, dtype="float32")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)  # at the usual initialisation layers hardly matter
    remove_layers(model, [2])
    prunelight.save(model, tokenizer, directory / "pruned")
    return directory / "pruned"


@pytest.mark.parametrize("family", CONVERTED)
def test_ctranslate2_computes_the_logits_of_its_source(family, tmp_path):
    done = export(saved(tmp_path, family, **CONVERTED[family]), "ctranslate2", dtype="f32")
    assert done.proof.engine == "CTranslate2"
    assert done.proof.largest_difference < 1e-3
    assert done.proof.same_top == 1.0
    assert done.path == tmp_path / "pruned-f32-ctranslate2"
    assert json.loads((done.path / "export.json").read_text())["proof"]["positions"] > 90


@pytest.mark.parametrize("dtype", ["f16", "bf16", "int8"])
def test_smaller_types_give_smaller_files_near_the_source(dtype, tmp_path):
    source = saved(tmp_path)
    whole = export(source, "ctranslate2", dtype="f32")
    small = export(source, "ctranslate2", dtype=dtype)
    model, *_ = (done.path.joinpath("model.bin").stat().st_size for done in (small, whole))
    assert model < 0.65 * whole.path.joinpath("model.bin").stat().st_size
    assert whole.proof.mean_kl < small.proof.mean_kl < 0.05


def test_the_tokenizer_of_an_export_is_that_of_its_source(tmp_path):
    source = saved(tmp_path)
    done = export(source, "ctranslate2")
    read, expected = (AutoTokenizer.from_pretrained(place) for place in (done.path, source))
    text = "The river runs past the old mill."
    assert read(text)["input_ids"] == expected(text)["input_ids"]
    assert read.eos_token == expected.eos_token


@pytest.mark.parametrize("dtype", ["f32", "int8"])
def test_converting_leaves_the_model_in_memory_as_it_was(dtype, tmp_path):
    source = open_source(saved(tmp_path))
    model, tokenizer = prunelight.load(source.directory, dtype="float32")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    out = tmp_path / "out"
    out.mkdir()
    CTranslate2Target().write(source, model, tokenizer, out, ExportOptions(dtype))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_model_with_more_tokens_than_its_tokenizer_is_proven(tmp_path):
    size = len(make_tokenizer(bos_token="<s>"))
    done = export(saved(tmp_path, vocab_size=size + 13), "ctranslate2", dtype="f32")
    assert done.proof.largest_difference < 1e-3


def test_a_tokenizer_with_more_tokens_than_the_model_is_proven(tmp_path):
    # The tokenizer class of this family adds a token.
    done = export(saved(tmp_path, "qwen2", use_sliding_window=False), "ctranslate2", dtype="f32")
    assert done.proof.largest_difference < 1e-3


def test_a_model_that_the_converter_fails_on_is_one_sentence(tmp_path):
    source = saved(tmp_path, "gpt2", activation_function="tanh")
    told = r"CTranslate2 [\d.]+ does not convert the model.*tanh.*take --to gguf"
    with pytest.raises(RuntimeError, match=told):
        export(source, "ctranslate2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "pruned"]


def refusal(directory, model, tokenizer):
    prunelight.save(model, tokenizer, directory / "model")
    with pytest.raises(ValueError, match="CTranslate2") as error:
        export(directory / "model", "ctranslate2")
    assert [path.name for path in directory.iterdir() if path.name != "dense"] == ["model"]
    return str(error.value)


def pruned(directory, callback):
    name = write_model(directory / "dense")
    model, tokenizer = prunelight.load(name, dtype="float32")
    windows = torch.randint(3, model.config.vocab_size, (16, 16))
    return prunelight.apply(model, callback.plan(model, windows), windows), tokenizer


@pytest.mark.parametrize(
    ("callback", "told"),
    [
        (SliceGPT(0.25, rotation="shared"), "hidden_size / num_attention_heads = 24 / 4"),
        (WidthPruning(head_ratio=0.5), "do not prune heads for this engine"),
    ],
    ids=["sliced with one rotation", "fewer heads"],
)
def test_heads_of_another_width_than_it_takes_are_refused(callback, told, tmp_path):
    assert told in refusal(tmp_path, *pruned(tmp_path, callback))


@pytest.mark.parametrize("kind", ["dropped", "gaps", "widths", "sliced"])
def test_classes_of_our_own_are_refused_with_what_it_could_take(kind, tmp_path, tiny_tokenizer):
    told = refusal(tmp_path, own_model(kind, "llama"), tiny_tokenizer)
    assert "it keeps layers that are all alike. Remove or merge whole layers" in told


@pytest.mark.parametrize(
    ("family", "told"),
    [
        ("smollm3", "has no converter for the family smollm3 .SmolLM3Config.; take --to gguf"),
        ("phi3", "its converter fails on this family's RoPE"),
        ("mistral", "sliding_window=8 otherwise than transformers"),
        ("qwen2", "sliding_window=8 otherwise than transformers"),
        ("gemma3_text", "sliding_window=8 otherwise than transformers"),
    ],
)
def test_families_that_it_reads_otherwise_are_refused(family, told, tmp_path):
    directory = write_model(tmp_path / "model", family)
    with pytest.raises(ValueError, match=told):
        export(directory, "ctranslate2")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_option_without_effect_warns(tmp_path):
    done = export(saved(tmp_path), "ctranslate2", engine_python=sys.executable)
    assert done.warnings == [
        "engine_python has no effect: CTranslate2 reads its export in this Python, where it "
        "converts"
    ]


def test_a_quantization_of_another_engine_is_refused(tmp_path):
    with pytest.raises(ValueError, match="quantize='q4_k_m': ctranslate2 has no quantization"):
        export(saved(tmp_path), "ctranslate2", quantize="q4_k_m")


def test_the_package_tells_its_families():
    assert {"LlamaConfig", "Qwen3Config"} <= converted_families()


def test_a_directory_that_it_cannot_read_is_one_sentence(tmp_path):
    target, source = CTranslate2Target(), open_source(saved(tmp_path))
    (tmp_path / "broken").mkdir()
    with pytest.raises(RuntimeError, match=r"CTranslate2 [\d.]+ does not read the export.*model"):
        target.read_back(source, tmp_path / "broken", [[3, 4]], ExportOptions("f32"))
    assert AutoModelForCausalLM.from_pretrained(source.directory) is not None
