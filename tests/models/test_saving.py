"""Saving models: they reload bit for bit, and a faulty one is not left on the disk."""

import json
import os
import subprocess
import sys

import psutil
import pytest
import torch
from lively_models import lively
from safetensors.torch import load_file, save_file
from tiny import tiny_model, token_windows
from transformers import AutoModelForCausalLM, AutoTokenizer

import prunelight
from prunelight.models.forward import greedy_tokens
from prunelight.models.saving import MARKER, _is_tie, check_replaceable, generation_fault, verify
from prunelight.planning.fingerprints import describe_model
from prunelight.planning.plan import Plan
from prunelight.planning.steps import RemoveLayers

FILES_COMPARED = "config, shapes and all weights on disk compared"
RELOADED = "reloaded with AutoModelForCausalLM: equal weights, logits and cached generation"


@pytest.fixture
def little_memory(monkeypatch):
    """A machine without room for a second copy."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000}))


def assert_equal_weights(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


def tampered(directory, change):
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tie", [False, True])
def test_a_saved_model_reloads_bit_for_bit(tmp_path, tiny_tokenizer, dtype, tie):
    model = tiny_model(dtype=dtype, tie_word_embeddings=tie)
    saved = prunelight.save(model, tiny_tokenizer, tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_equal_weights(model, reloaded)
    assert (reloaded.lm_head.weight is reloaded.model.embed_tokens.weight) is tie
    assert saved.verification == RELOADED
    assert saved.size_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("w9 w8")["input_ids"] == [9, 8]


STRANGER = """
import sys
sys.modules["prunelight"] = None  # an import of it, by whatever code, now fails
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("w7 w8 w9", return_tensors="pt")["input_ids"]
out = model.generate(ids, do_sample=False, min_new_tokens=5, max_new_tokens=5)
print(out.tolist()[0])
"""


def test_a_saved_model_needs_no_prunelight(tmp_path, tiny_tokenizer):
    model = tiny_model()
    prunelight.save(model, tiny_tokenizer, tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(tmp_path / "out")],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    expected = greedy_tokens(model, torch.tensor([[7, 8, 9]]), 5).tolist()[0]
    assert json.loads(done.stdout) == expected


def test_plan_marker_and_extra_files_are_written(tmp_path, tiny_tokenizer):
    model = tiny_model()
    plan = Plan("ShortGPT", {}, describe_model(model), (RemoveLayers((1,)),))
    prunelight.save(
        model, tiny_tokenizer, tmp_path / "a" / "out", plan=plan, extra_files={"note.txt": "ä\n"}
    )
    out = tmp_path / "a" / "out"
    assert Plan.load(out / "plan.json") == plan
    assert (out / "note.txt").read_text(encoding="utf-8") == "ä\n"
    marker = json.loads((out / MARKER).read_text())
    assert marker["fingerprint"] == plan.model["fingerprint"]
    assert marker["verification"] == RELOADED


# Directories


def test_a_directory_of_others_is_refused_and_untouched(tmp_path, tiny_tokenizer):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=rf"out exists and .*no {MARKER}"):
        prunelight.save(tiny_model(), tiny_tokenizer, out)
    assert [file.name for file in out.iterdir()] == ["thesis.tex"]
    with pytest.raises(FileExistsError, match="exists and was not written by prunelight"):
        check_replaceable(out / "thesis.tex")


def test_an_empty_directory_is_accepted_and_an_own_one_replaced(tmp_path, tiny_tokenizer):
    out = tmp_path / "out"
    out.mkdir()
    prunelight.save(tiny_model(seed=0), tiny_tokenizer, out, extra_files={"old.txt": ""})
    prunelight.save(tiny_model(seed=1), tiny_tokenizer, out)
    assert_equal_weights(tiny_model(seed=1), AutoModelForCausalLM.from_pretrained(out))
    assert not (out / "old.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# Models that would not come back


def unnumbered():
    model = tiny_model()
    del model.model.layers[2]
    model.config.num_hidden_layers = 5
    return model


def with_config(**changes):
    model = tiny_model()
    for name, value in changes.items():
        setattr(model.config, name, value)
    return model


def doubly_numbered():
    model = tiny_model()
    model.model.layers[1].self_attn.layer_idx = 0
    return model


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda: with_config(num_hidden_layers=5), r"9 tensors are only on one side.*layers\.5\."),
        (lambda: with_config(num_hidden_layers=7), r"9 tensors are only on one side.*layers\.6\."),
        (lambda: with_config(num_attention_heads=8), r"q_proj\.weight is \(32, 32\).*\(64, 32\)"),
        (lambda: with_config(rms_norm_eps=0.5), "logits differ by .*, allowed is"),
        (lambda: with_config(hidden_act="nonsense"), "failed its verification: .*nonsense"),
        (unnumbered, r"generation with the cache fails .*layer_idx"),
        (doubly_numbered, "with the cache gives other tokens than without it; check .*layer_idx"),
    ],
)
def test_a_failed_verification_says_why_and_keeps_what_was_there(
    tmp_path, tiny_tokenizer, spoil, message
):
    out = tmp_path / "out"
    prunelight.save(tiny_model(), tiny_tokenizer, out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with pytest.raises(RuntimeError, match=message):
        prunelight.save(spoil(), tiny_tokenizer, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_a_failed_first_save_leaves_nothing(tmp_path, tiny_tokenizer):
    with pytest.raises(RuntimeError, match="Nothing was kept on disk"):
        prunelight.save(with_config(rms_norm_eps=0.5), tiny_tokenizer, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def change_value(weights):
    weights["model.layers.4.mlp.up_proj.weight"][5, 6] += 1e-6


def change_dtype(weights):
    weights["model.norm.weight"] = weights["model.norm.weight"].half()


def drop(weights):
    del weights["model.layers.4.mlp.up_proj.weight"]


def add(weights):
    weights["model.layers.9.weight"] = torch.zeros(2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_value, r"layers\.4\.mlp\.up_proj\.weight has other values on disk than in memory"),
        (drop, r"layers\.4\.mlp\.up_proj\.weight"),
    ],
)
def test_a_changed_checkpoint_is_noticed_by_reloading(tmp_path, change, message):
    tiny_model().save_pretrained(tmp_path)
    assert verify(tiny_model(), tmp_path) == RELOADED
    tampered(tmp_path, change)
    with pytest.raises(RuntimeError, match=message):
        verify(tiny_model(), tmp_path)


def test_a_checkpoint_that_cannot_be_read_is_noticed(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(RuntimeError, match=r"failed its verification: .*model\.safetensors"):
        verify(tiny_model(), tmp_path)


# Without room for a second copy


@pytest.mark.usefixtures("little_memory")
# Experts and GPT-NeoX's head are stored under other names than they have in memory.
@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe", "gpt_neox", "rwkv"])
def test_without_memory_for_a_second_copy_the_files_are_compared(tmp_path, tiny_tokenizer, family):
    model = tiny_model(family)
    saved = prunelight.save(model, tiny_tokenizer, tmp_path / "out")
    assert saved.verification.startswith(FILES_COMPARED)
    assert_equal_weights(model, AutoModelForCausalLM.from_pretrained(tmp_path / "out"))


@pytest.mark.usefixtures("little_memory")
def test_tied_embeddings_need_not_be_on_disk(tmp_path, tiny_tokenizer):
    model = tiny_model(tie_word_embeddings=True)
    saved = prunelight.save(model, tiny_tokenizer, tmp_path / "out")
    assert saved.verification.startswith(FILES_COMPARED)
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_value, r"layers\.4\.mlp\.up_proj\.weight has other values on disk than in memory"),
        (change_dtype, r"model\.norm\.weight is .*float32 in memory and .*float16 on disk"),
        (drop, r"1 tensors are not on disk, e\.g\. model\.layers\.4\.mlp\.up_proj\.weight"),
        (add, r"model\.layers\.9\.weight is on disk and not in memory"),
    ],
)
def test_a_changed_checkpoint_is_noticed_by_comparing_files(tmp_path, change, message):
    tiny_model().save_pretrained(tmp_path)
    assert verify(tiny_model(), tmp_path).startswith(FILES_COMPARED)
    tampered(tmp_path, change)
    with pytest.raises(RuntimeError, match=message):
        verify(tiny_model(), tmp_path)


@pytest.mark.usefixtures("little_memory")
def test_a_config_that_lies_is_noticed_by_comparing_files(tmp_path, tiny_tokenizer):
    with pytest.raises(RuntimeError, match=r"config\.json describes other weights"):
        prunelight.save(with_config(num_hidden_layers=5), tiny_tokenizer, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# The model in memory


def test_saving_leaves_the_model_as_it_was(tmp_path, tiny_tokenizer):
    model = tiny_model().train()
    model.config.use_cache = True
    model.model.norm.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prunelight.save(model, tiny_tokenizer, tmp_path / "out")
    assert all(module.training for module in model.modules())
    assert model.config.use_cache is True
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.use_cache is True
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["model.norm.weight"]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_an_rwkv_whose_weights_are_halved_in_memory_is_saved_whole(tmp_path, tiny_tokenizer):
    model, ids = tiny_model("rwkv"), token_windows()
    weight = model.rwkv.blocks[4].attention.output.weight
    whole = weight.detach().clone()
    with torch.no_grad():
        expected = model(ids).logits
    assert torch.equal(weight, whole / 4)  # rescale_every is 2
    prunelight.save(model, tiny_tokenizer, tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(reloaded.rwkv.blocks[4].attention.output.weight, whole)
    with torch.no_grad():
        assert torch.equal(reloaded(ids).logits, expected)
        assert torch.equal(model(ids).logits, expected)


def test_tokens_of_equal_logits_may_differ_and_others_may_not():
    model = tiny_model()
    expected = greedy_tokens(model, token_windows(2, 8), 4)
    with torch.no_grad():
        scores = model(expected).logits[0, 9]
    found = expected.clone()
    found[0, 10] = scores.argmin()
    gap = (scores[expected[0, 10]] - scores.min()).item()
    assert _is_tie(model, expected, found, 1.01 * gap)
    assert not _is_tie(model, expected, found, 0.99 * gap)
    assert _is_tie(model, expected, expected.clone(), 0.0)


# Families whose generation with the cache is wrong in transformers itself


def test_a_fault_of_the_dense_model_is_not_blamed_on_the_pruned_one(
    tmp_path, tiny_tokenizer, caplog
):
    model = lively(tiny_model("rwkv"))
    fault = generation_fault(model)
    assert fault  # as of transformers 5.23
    saved = prunelight.save(model, tiny_tokenizer, tmp_path / "out", dense_fault=fault)
    assert saved.verification == "reloaded with AutoModelForCausalLM: equal weights, and logits"
    assert "compare with the dense model" not in caplog.text
    prunelight.save(model, tiny_tokenizer, tmp_path / "out")
    assert f"{fault}; compare with the dense model" in caplog.text
    with pytest.raises(RuntimeError, match=f"{fault}, which the dense model does not do"):
        prunelight.save(model, tiny_tokenizer, tmp_path / "out", dense_fault="")


def test_generation_with_the_cache_equals_that_without_in_a_dense_model():
    assert generation_fault(tiny_model()) == ""
    assert "generation with the cache fails (IndexError" in generation_fault(unnumbered())
