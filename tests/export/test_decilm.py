"""DeciLM holds layers that differ; heads of zeros change nothing; the rest is refused.

vLLM itself reads exports in the tests that are marked `engines`.
"""

import copy
import json
import os
import sys
from itertools import product

import pytest
import torch
from own_models import NEURONS, narrowed, own_model
from runs import write_model
from safetensors.torch import load_file
from tiny import tiny_model
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoTokenizer

import prunelight
from prunelight.export.decilm.configuration_decilm import Block, DeciLMConfig
from prunelight.export.decilm.layers import (
    LayerShape,
    _filled,
    block_configs,
    filled_shapes,
)
from prunelight.export.exporting import export
from prunelight.export.targets import NotReadableError
from prunelight.pruning.drop_sublayers import drop_sublayers

WITHOUT_WINDOWS = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False},
}
VLLM = "PRUNELIGHT_VLLM_PYTHON"


@pytest.fixture(autouse=True)
def without_vllm(request, monkeypatch):
    if not request.node.get_closest_marker("engines"):
        monkeypatch.delenv(VLLM, raising=False)


def saved(directory, model, tokenizer):
    prunelight.save(model, tokenizer, directory / "model")
    return directory / "model"


@pytest.mark.parametrize("family", WITHOUT_WINDOWS)
def test_an_export_says_what_each_layer_has(family, tmp_path, tiny_tokenizer):
    model = drop_sublayers(tiny_model(family, **WITHOUT_WINDOWS[family]), [4, 5], [1, 4])
    done = export(saved(tmp_path, model, tiny_tokenizer), "decilm", unproven=True)
    config = json.loads((done.path / "config.json").read_text())
    blocks = config["block_configs"]
    assert [i for i, block in enumerate(blocks) if block["attention"]["no_op"]] == [4, 5]
    assert [i for i, block in enumerate(blocks) if block["ffn"]["no_op"]] == [1, 4]
    assert config["architectures"] == ["DeciLMForCausalLM"]
    assert config.get("qkv_bias", False) == (family == "qwen2")
    assert not {"drop_attention", "drop_mlp", "sliding_window"} & {*config}
    source = load_file(tmp_path / "model" / "model.safetensors")
    weights = load_file(done.path / "model.safetensors")
    assert source.keys() == weights.keys()
    assert all(torch.equal(source[name], weights[name]) for name in source)
    assert done.proof is None


def test_layers_of_different_widths_keep_their_neurons_and_key_value_heads(
    tmp_path, tiny_tokenizer
):
    done = export(saved(tmp_path, narrowed("llama"), tiny_tokenizer), "decilm", unproven=True)
    config = DeciLMConfig.from_pretrained(done.path)
    assert [block.ffn.intermediate_size for block in config.block_configs] == list(NEURONS)
    # Groups of 2 query heads: 2 groups, or 1, which becomes one group of 4.
    assert [block.attention.n_heads_in_group for block in config.block_configs] == [
        2,
        4,
        4,
        2,
        4,
        2,
    ]
    weights = load_file(done.path / "model.safetensors")
    sizes = [weights[f"model.layers.{i}.self_attn.k_proj.weight"].shape[0] for i in range(6)]
    assert sizes == [16, 8, 8, 16, 8, 16]
    assert any("layers 1, 2, 4 get 6 heads of zeros and 0 key-value" in x for x in done.warnings)


@pytest.mark.parametrize(
    ("dtype", "kind"), [("f16", torch.float16), ("bf16", torch.bfloat16), ("f32", torch.float32)]
)
def test_the_weights_have_the_dtype_that_was_asked_for(dtype, kind, tmp_path, tiny_tokenizer):
    source = saved(tmp_path, own_model("dropped", "llama"), tiny_tokenizer)
    done = export(source, "decilm", dtype=dtype, unproven=True)
    weights = load_file(done.path / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {kind}
    assert json.loads((done.path / "config.json").read_text())["dtype"] == str(kind)[6:]
    text = "w5 w6 w7"
    read, expected = (AutoTokenizer.from_pretrained(place) for place in (done.path, source))
    assert read(text)["input_ids"] == expected(text)["input_ids"]


SHAPES = [LayerShape(k * g, k, 8) for k, g in product(range(1, 8), range(1, 6))]


@pytest.mark.parametrize("seed", range(20))
def test_filled_layers_have_as_many_heads_each_and_room_for_what_they_had(seed):
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(len(SHAPES), (5,), generator=generator).tolist()
    shapes = [SHAPES[place] for place in places] + [LayerShape(0, 0, 4)]
    filled = filled_shapes(shapes)
    assert filled[-1] == shapes[-1]
    assert len({shape.heads for shape in filled[:-1]}) == 1
    for old, new in zip(shapes[:-1], filled[:-1], strict=True):
        assert new.heads % new.key_value_heads == 0
        assert new.key_value_heads >= old.key_value_heads
        assert new.group >= old.group
        assert new.neurons == old.neurons


def test_layers_alike_are_not_filled():
    assert filled_shapes(SHAPES[:1] * 3) == SHAPES[:1] * 3
    blocks = block_configs([LayerShape(4, 2, 0), LayerShape(0, 0, 8)])
    assert blocks[0]["attention"]["n_heads_in_group"] == 2
    assert blocks[0]["ffn"]["no_op"]
    assert blocks[1]["attention"]["no_op"]


@pytest.mark.parametrize(("old", "new"), [((6, 2), (15, 3)), ((4, 2), (12, 4)), ((3, 3), (6, 3))])
def test_heads_of_zeros_change_no_output(old, new):
    width, hidden, tokens = 4, 10, 7
    old, new = LayerShape(*old, 8), LayerShape(*new, 8)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    query, output = draw(old.heads * width, hidden), draw(hidden, old.heads * width)
    key, value = (draw(old.key_value_heads * width, hidden) for _ in range(2))
    inputs = draw(tokens, hidden)

    def attend(shape, query, key, value, output):
        heads = [
            (inputs @ weight.T).reshape(tokens, -1, width).transpose(0, 1)
            for weight in (query, key, value)
        ]
        groups = (x.repeat_interleave(shape.group, 0) for x in heads[1:])
        mixed = scaled_dot_product_attention(heads[0], *groups, is_causal=True)
        return mixed.transpose(0, 1).reshape(tokens, -1) @ output.T

    filled = (
        _filled(query, old, new, width, True),
        *(_filled(weight, old, new, width, False) for weight in (key, value)),
        _filled(output.T, old, new, width, True).T,
    )
    expected = attend(old, query, key, value, output)
    torch.testing.assert_close(attend(new, *filled), expected, rtol=1e-12, atol=1e-12)


def test_the_settings_of_layers_are_attributes_also_of_a_copy():
    config = DeciLMConfig(block_configs=block_configs([LayerShape(4, 2, 8)]))
    for read in (config, copy.deepcopy(config), DeciLMConfig.from_dict(config.to_dict())):
        (block,) = read.block_configs
        assert block.attention.n_heads_in_group == 2
        assert not hasattr(block.ffn, "ffn_mult")
        assert isinstance(block.attention, Block)


def refusal(source):
    with pytest.raises(ValueError, match="DeciLM|vLLM") as error:
        export(source, "decilm", unproven=True)
    assert [path.name for path in source.parent.iterdir()] == [source.name]
    return str(error.value)


def test_a_model_without_differing_layers_needs_no_export(tmp_path):
    write_model(tmp_path / "model")
    told = refusal(tmp_path / "model")
    assert f"vllm serve {tmp_path}/model; nothing need be exported" in told


def test_a_model_that_vllm_reads_otherwise_is_told_so(tmp_path):
    write_model(tmp_path / "model", "qwen2")
    assert "here: refuses it: it takes no windows in only some" in refusal(tmp_path / "model")


def test_a_sliced_model_is_served_with_its_own_code(tmp_path, tiny_tokenizer):
    told = refusal(saved(tmp_path, own_model("sliced", "llama"), tiny_tokenizer))
    assert "one hidden size for all layers" in told
    assert "export_remote_code=True" in told


@pytest.mark.parametrize("family", ["gemma", "granite", "qwen3", "smollm3", "phi3"])
def test_families_that_compute_otherwise_than_llama_are_refused(family, tmp_path, tiny_tokenizer):
    told = refusal(saved(tmp_path, own_model("dropped", family), tiny_tokenizer))
    assert f"and {family} does otherwise; it holds layers that differ of llama, mistral" in told


def test_windows_and_other_activations_are_refused(tmp_path, tiny_tokenizer):
    told = refusal(saved(tmp_path, own_model("dropped", "mistral"), tiny_tokenizer))
    assert "attends to all tokens, and this model has sliding_window=8" in told
    model = own_model("dropped", "llama")
    model.config.hidden_act = "gelu"
    (tmp_path / "other").mkdir()
    model.save_pretrained(tmp_path / "other" / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "other" / "model")
    told = refusal(tmp_path / "other" / "model")
    assert "computes silu in its MLPs, not hidden_act='gelu'" in told


def test_the_attention_of_the_first_layer_must_be_there(tmp_path, tiny_tokenizer):
    source = saved(tmp_path, own_model("dropped", "llama"), tiny_tokenizer)
    config = json.loads((source / "config.json").read_text())
    config["drop_attention"][0] = True
    del config["per_layer_config"]
    (source / "config.json").write_text(json.dumps(config))
    assert "fails without the attention of layer 0" in refusal(source)


def test_a_matrix_behind_a_layer_is_refused(tmp_path, tiny_tokenizer):
    source = saved(tmp_path, own_model("gaps", "llama"), tiny_tokenizer)
    assert "DeciLM has no matrix behind a layer, as behind [1, 4] here" in refusal(source)


def test_without_vllm_nothing_is_written(tmp_path, tiny_tokenizer):
    source = saved(tmp_path, own_model("dropped", "llama"), tiny_tokenizer)
    for python, told in {
        None: "vLLM is not here to read the export back.*pip install vllm",
        sys.executable: f"{sys.executable} has no vLLM; there: pip install vllm",
    }.items():
        with pytest.raises(NotReadableError, match=told):
            export(source, "decilm", engine_python=python)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.engines
@pytest.mark.slow
@pytest.mark.skipif(VLLM not in os.environ, reason=f"{VLLM} names no Python with vLLM")
@pytest.mark.parametrize("kind", ["dropped", "uneven"])
def test_vllm_computes_the_logits_of_its_source(kind, tmp_path, tiny_tokenizer):
    from cases import family_model
    from loaders import uneven

    model = uneven()
    if kind == "dropped":
        model = drop_sublayers(family_model("llama"), [2, 3, 5], [1, 3])
    done = export(saved(tmp_path, model, tiny_tokenizer), "decilm", dtype="f32")
    assert done.proof.engine == "vLLM"
    assert done.proof.largest_difference < 1e-3
