"""A GGUF holds every weight and key of its source; what llama.cpp cannot hold is refused first."""

import json

import gguf
import numpy as np
import pytest
import torch
from own_models import with_operators
from runs import write_model
from text_tokenizers import make_tokenizer, sample
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import prunelight
from prunelight.callbacks import SliceGPT, WidthPruning
from prunelight.export.exporting import export
from prunelight.export.gguf.families import FAMILIES
from prunelight.export.gguf.tensors import in_pairs
from prunelight.export.gguf.tokenizers import DIGITS, GPT2, LLAMA3, QWEN2, tokenizer_keys
from prunelight.export.proving import Proof, check_bound
from prunelight.export.targets import Bound
from prunelight.planning.steps import PruneWidth
from prunelight.pruning.drop_sublayers import drop_sublayers
from prunelight.pruning.prune_width import prune_width
from prunelight.pruning.remove_layers import remove_layers

# What differs from tests/support/tiny.py, so that llama.cpp can hold the model.
CHANGES = {
    "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3_text": {"query_pre_attn_scalar": 8},
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False},
    "qwen3_moe": {"decoder_sparse_step": 1, "norm_topk_prob": True},
    "mixtral": {"sliding_window": None},
    "gpt2": {"n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 128},
    "phi3": {"sliding_window": None},
    "olmo3": {"sliding_window": 8},
    "cohere2": {"sliding_window": 8, "head_dim": 8},
}


@pytest.fixture(scope="module", autouse=True)
def known_families():
    """Tiny settings of the families that tests/support/tiny.py does not have."""
    import tiny

    added = {name: {} for name in ("olmo3", "cohere2") if name not in tiny.FAMILIES}
    tiny.FAMILIES.update(added)
    yield
    for name in added:
        del tiny.FAMILIES[name]


def tiny_directory(folder, family="llama", layers=(), **changes):
    """Save a tiny model, with some layers removed."""
    write_model(folder, family, **{**CHANGES.get(family, {}), **changes})
    if layers:
        model, tokenizer = prunelight.load(folder)
        remove_layers(model, layers)
        prunelight.save(model, tokenizer, folder / "pruned")
        return folder / "pruned"
    return folder


def saved(model, folder):
    prunelight.save(model, make_tokenizer(bos_token="<s>"), folder)
    return folder


def tiny_llama(folder, **changes):
    return prunelight.load(write_model(folder, "llama", **changes))[0]


def values(tensors):
    """Return all numbers of tensors in order."""
    return np.sort(np.concatenate([np.asarray(t, dtype=np.float32).ravel() for t in tensors]))


@pytest.mark.parametrize("layers", [(), (1,)], ids=["dense", "one layer removed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gguf_holds_every_weight_once_and_the_config(family, layers, tmp_path):
    # One layer of SmolLM3 and Gemma can go at the end of the pattern.
    layers = (5,) if layers and family == "smollm3" else layers
    directory = tiny_directory(tmp_path / "m", family, layers)
    done = export(directory, "gguf", dtype="f32", unproven=True)
    reader = gguf.GGUFReader(done.path)
    model = AutoModelForCausalLM.from_pretrained(directory)
    adds_one = FAMILIES[family].adds_one
    ours = [
        p.detach().numpy() + (adds_one and name.endswith("norm.weight"))
        for name, p in model.named_parameters()
    ]
    if FAMILIES[family].head == "always" and model.config.tie_word_embeddings:
        ours.append(model.get_output_embeddings().weight.detach().numpy())
    written = [tensor.data for tensor in reader.tensors]
    assert np.array_equal(values(written), values(ours))
    name = reader.fields["general.architecture"].contents()
    assert reader.fields[f"{name}.block_count"].contents() == 6 - len(layers)
    assert reader.fields[f"{name}.embedding_length"].contents() == 32
    if "sliding_attention" in (getattr(model.config, "layer_types", None) or ()):
        pattern = reader.fields[f"{name}.attention.sliding_window_pattern"].contents()
        assert pattern == [kind == "sliding_attention" for kind in model.config.layer_types]
    record = json.loads(done.path.with_name(f"{done.path.name}.export.json").read_text())
    assert record["to"] == "gguf"
    assert record["size_bytes"] == done.path.stat().st_size == done.size_bytes


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_weights_in_fewer_bits_are_near(dtype, tmp_path):
    directory = tiny_directory(tmp_path / "m")
    done = export(directory, "gguf", dtype=dtype)
    assert done.proof.mean_kl < 1e-3
    assert done.proof.note.startswith("llama.cpp itself did not read the export")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(done.path).tensors}
    assert kinds["blk.0.ffn_up.weight"] == dtype.upper()
    assert kinds["blk.0.attn_norm.weight"] == "F32"


def test_rows_that_do_not_divide_into_blocks_stay_in_float16(tmp_path):
    directory = tiny_directory(tmp_path / "m", intermediate_size=50)
    done = export(directory, "gguf", dtype="q8_0")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(done.path).tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16"


def test_pairs_of_rope_stand_beside_each_other():
    rows = torch.arange(16.0)[:, None]  # two heads of eight
    assert in_pairs(rows, 8)[:8, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_layers_that_differ_have_numbers_of_their_own(tmp_path):
    model = tiny_llama(tmp_path / "a")
    drop_sublayers(model, (2,), (3,))
    done = export(saved(model, tmp_path / "dropped"), "gguf", unproven=True)
    fields = gguf.GGUFReader(done.path).fields
    assert fields["deci.attention.head_count"].contents() == [4, 4, 0, 4, 4, 4]
    assert fields["deci.attention.head_count_kv"].contents() == [2, 2, 0, 2, 2, 2]
    assert fields["deci.feed_forward_length"].contents() == [64, 64, 64, 32, 64, 64]
    tensors = {t.name: t.data for t in gguf.GGUFReader(done.path).tensors}
    assert "blk.2.attn_q.weight" not in tensors
    assert not tensors["blk.3.ffn_down.weight"].any()

    model = tiny_llama(tmp_path / "b")
    heads = {str(i): [0] if i == 1 else [0, 1] for i in range(6)}
    neurons = {str(i): list(range(32 if i == 1 else 64)) for i in range(6)}
    prune_width(model, PruneWidth(heads=heads, neurons=neurons))
    done = export(saved(model, tmp_path / "widths"), "gguf", unproven=True)
    fields = gguf.GGUFReader(done.path).fields
    assert fields["deci.attention.head_count"].contents() == [4, 2, 4, 4, 4, 4]
    assert fields["deci.feed_forward_length"].contents() == [64, 32, 64, 64, 64, 64]


def sliced(folder):
    model = tiny_llama(folder / "dense")
    windows = torch.randint(5, model.config.vocab_size, (8, 16))
    plan = SliceGPT(0.25, round_to=1, embedding="full").plan(model, windows)
    return saved(prunelight.apply(model, plan, windows), folder / "sliced")


def dropped_qwen2(folder):
    model, _ = prunelight.load(tiny_directory(folder / "dense", "qwen2"))
    return saved(drop_sublayers(model, (2,), ()), folder / "dropped")


def biased(folder):
    model = tiny_llama(folder / "dense")
    windows = torch.randint(5, model.config.vocab_size, (8, 16))
    plan = WidthPruning(0.25, multiple=8, correction="bias").plan(model, windows)
    return saved(prunelight.apply(model, plan, windows), folder / "biased")


def gap(folder):
    return saved(with_operators(tiny_llama(folder / "dense"), [2]), folder / "gap")


def rope(kind, **more):
    parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    return {"rope_parameters": {**parameters, "original_max_position_embeddings": 64, **more}}


REFUSED = {
    "a matrix behind a layer": (
        gap,
        r"llama.cpp has no matrix behind a layer, as behind \[2\] here",
    ),
    "no family of ours": (
        lambda f: tiny_directory(f, "bloom"),
        "a GGUF of bloom is not written here.*written are llama.*convert_hf_to_gguf.py",
    ),
    "a broken pattern": (
        lambda f: tiny_directory(f, "smollm3", (0,)),
        "llama.cpp reads it wrong: it derives no_rope_layers from.*remove layers so that they do",
    ),
    "sliced": (sliced, r"cannot hold a model sliced layer by layer.*rotation='shared'"),
    "biases": (biased, "a GGUF with biases of mlp.down_proj is not written here.*correction=True"),
    "layers that differ": (dropped_qwen2, "only for llama, mistral, in its architecture deci"),
    "an activation": (
        lambda f: tiny_directory(f, hidden_act="gelu"),
        "llama.cpp computes silu in this family, not 'gelu'",
    ),
    "a bias": (
        lambda f: tiny_directory(f, "qwen3", attention_bias=True),
        "llama.cpp takes attention_bias=False in this family, and the model has True",
    ),
    "a head": (
        lambda f: tiny_directory(f, "gemma", tie_word_embeddings=False),
        r"takes the embedding for the head.*tie_word_embeddings=False",
    ),
    "heads": (
        lambda f: tiny_directory(f, "qwen2", head_dim=16),
        "32 / 4 for the width of a head in this family, and it is 16",
    ),
    "a rotation": (
        lambda f: tiny_directory(f, **rope("dynamic")),
        "rope_type='dynamic' are not written here, only default, linear, llama3, yarn",
    ),
    "betas of yarn": (
        lambda f: tiny_directory(f, **rope("yarn", beta_fast=16)),
        "llama.cpp takes beta_fast=32 for rope_type='yarn', and the model has 16",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_llamacpp_cannot_hold_is_refused_before_anything_is_written(what, tmp_path):
    make, words = REFUSED[what]
    directory = make(tmp_path / "m")
    before = {*directory.parent.rglob("*")}
    with pytest.raises(ValueError, match=words):
        export(directory, "gguf", unproven=True)
    assert {*directory.parent.rglob("*")} == before


def test_a_window_that_llamacpp_ignores_ends_the_context(tmp_path):
    directory = tiny_directory(tmp_path / "m", "mistral", sliding_window=8)
    done = export(directory, "gguf", dtype="f32")
    assert "the export's context ends at 8 tokens" in done.warnings[0]
    assert done.proof.positions == 16  # two texts
    context = gguf.GGUFReader(done.path).fields["llama.context_length"].contents()
    assert context == 8


SPLITS = {
    "gpt-2": (GPT2, False),
    "smollm": (DIGITS, False),
    "llama-bpe": (LLAMA3, True),
    "dbrx": (LLAMA3, False),
    "qwen2": (QWEN2, False),
}


def trained(split, ignore_merges):
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split in (GPT2, DIGITS))
    first = {GPT2: [], DIGITS: [pre_tokenizers.Digits(individual_digits=True)]}.get(
        split, [pre_tokenizers.Split(Regex(split), "isolated")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, level])
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>"], show_progress=False)
    tokenizer.train_from_iterator([sample("calibration")[:4000]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


@pytest.mark.parametrize("name", SPLITS)
def test_a_split_has_llamacpps_name(name):
    tokenizer = trained(*SPLITS[name])
    keys = tokenizer_keys(tokenizer, len(tokenizer) + 2)
    assert keys["tokenizer_pre"] == name
    assert keys["token_list"][-1] == f"[PAD{len(tokenizer) + 1}]"
    assert keys["token_types"][0] == gguf.TokenType.CONTROL
    assert keys["token_types"][-1] == gguf.TokenType.UNUSED
    assert not keys["add_bos_token"]


def test_a_tokenizer_with_bytes_as_fallback_has_scores_in_the_order_of_its_merges():
    tokens = ["<unk>", "<s>", "<0x41>", "▁", "a", "b", "ab", "▁ab"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [("a", "b"), ("▁", "ab")]
    model = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>"
    )
    keys = tokenizer_keys(tokenizer, 8)
    assert keys["tokenizer_model"] == "llama"
    assert keys["add_space_prefix"]
    assert keys["token_scores"][6:] == [0, -1]
    kinds = [gguf.TokenType(kind).name for kind in keys["token_types"][:4]]
    assert kinds == ["UNKNOWN", "CONTROL", "BYTE", "NORMAL"]


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        (Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), "of kind WordLevel is not written"),
        (Tokenizer(models.BPE({"a": 0}, [])), "knows neither bytes .* nor byte_fallback"),
    ],
)
def test_a_tokenizer_that_llamacpp_does_not_have_is_refused(backend, words):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    with pytest.raises(ValueError, match=words):
        tokenizer_keys(tokenizer, 1)


def test_a_split_without_a_name_is_refused():
    with pytest.raises(ValueError, match=r"name for the split '\[a-z\]\+' is not known"):
        tokenizer_keys(trained("[a-z]+", False), 300)


def test_an_export_that_differs_is_refused():
    proof = Proof("llama.cpp", "1", 10, 0.5, 0.1, 0.9)
    check_bound(proof, Bound("mean_kl", 0.1), "the export")
    with pytest.raises(RuntimeError, match=r"the export was not kept.*0.5, allowed 0.03; same"):
        check_bound(proof, Bound("largest_difference", 0.03), "the export")
