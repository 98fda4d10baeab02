"""Saved directories in transformers 4: the same logits and tokens, or a fault that is told."""

import json
import logging
import os
import subprocess

import pytest
import torch
import transformers4_side
from huggingface_hub.errors import StrictDataclassClassValidationError
from methods_table import METHODS
from own_models import KINDS, own_model
from tiny import FAMILIES, UNKNOWN_FAMILIES, tiny_model, token_windows
from tiny_families import NOT_BUILT, family_names, make_lively, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import prunelight
from prunelight.models.families.rwkv import restore_rwkv_scale
from prunelight.models.families.transformers4 import MODEL_TYPES
from prunelight.models.transformers4 import add_old_names, old_names, transformers4_fault
from prunelight.pruning.remove_layers import remove_layers

IDS = token_windows(2, 24, seed=3)
TYPED = {"type": "linear", "rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "rope_theta": 500.0,
}
# RoPE of every kind: name -> family, rope_parameters, other fields.
ROPES = {
    "theta": ("llama", {"rope_type": "default", "rope_theta": 500.0}, {}),
    "linear": ("llama", {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}, {}),
    "linear, the oldest layout": ("llama", TYPED, {}),
    "linear of OLMo, which wants that": ("olmo2", TYPED, {}),
    "dynamic, beyond its length": (
        "qwen2",
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 500.0},
        {"max_position_embeddings": 16},
    ),
    "yarn": (
        "qwen3",
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "rope_theta": 500.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 16.0,
        },
        {},
    ),
    "llama3": (
        "llama",
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "rope_theta": 500.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        {},
    ),
    "longrope": (
        "phi3",
        {**LONGROPE, "type": "longrope"},
        {"original_max_position_embeddings": 32, "max_position_embeddings": 128},
    ),
    "unscaled, in a family that scales": (
        "gpt_oss",
        {"rope_type": "default", "rope_theta": 99.0},
        {},
    ),
    "a part of the head": (
        "phi",
        {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.25},
        {},
    ),
    "a part of the head, GPT-NeoX": (
        "gpt_neox",
        {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
        {},
    ),
    "two thetas": (
        "gemma3_text",
        {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 700.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
        {},
    ),
}
STOCK = {name: method for name, method in METHODS.items() if not (method.slices or method.gradual)}


def loud_model(family, **changes):
    """A tiny model whose weights are so large that a wrong position shows in its logits."""
    model = tiny_model(family, **changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                scale = 1.5 if "q_proj" in name else 0.15  # attention scores that a cap would cut
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def rope_model(name):
    family, parameters, changes = ROPES[name]
    return loud_model(family, rope_parameters=parameters, **changes)


def written_twice(config, directory):
    """Return a config as transformers 5 reads it without and with the old names."""
    config.save_pretrained(directory)
    before = AutoConfig.from_pretrained(directory)
    add_old_names(config, directory)
    return before, AutoConfig.from_pretrained(directory)


# What transformers 5 reads


@pytest.mark.parametrize("name", ROPES)
def test_old_names_of_rope_do_not_change_what_transformers_5_reads(tmp_path, name):
    config = rope_model(name).config
    before, after = written_twice(config, tmp_path)
    assert after.to_dict() == before.to_dict()
    assert transformers4_fault(config) == ""


@pytest.mark.parametrize("family", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_old_names_change_no_config_of_a_causal_language_model(tmp_path, family):
    try:
        config = AutoConfig.for_model(family)
        type(config).from_dict(config.to_dict())
    except (ImportError, ValueError, StrictDataclassClassValidationError) as error:
        pytest.skip(f"its default config does not load: {error}")
    before, after = written_twice(config, tmp_path)
    assert after.to_dict() == before.to_dict()


def test_old_names_say_what_transformers_4_reads():
    config = rope_model("two thetas").config
    names = old_names(type(config), config.to_dict())
    assert (names["rope_theta"], names["rope_local_base_freq"]) == (700.0, 50.0)
    assert names["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    config = rope_model("a part of the head, GPT-NeoX").config
    names = old_names(type(config), config.to_dict())
    assert (names["rotary_emb_base"], names["rotary_pct"]) == (500.0, 0.5)


def test_what_transformers_4_cannot_read_is_told(tmp_path, tiny_tokenizer, caplog):
    two = {"full_attention": 700.0, "sliding_attention": 50.0}
    parameters = {k: {"rope_type": "default", "rope_theta": v} for k, v in two.items()}
    config = AutoConfig.for_model("olmo3", num_hidden_layers=6, rope_parameters=parameters)
    assert "no name for sliding_attention: {'rope_theta': 50.0" in transformers4_fault(config)
    assert "no causal language model gemma4" in transformers4_fault(AutoConfig.for_model("gemma4"))
    longrope = {**LONGROPE, "original_max_position_embeddings": 32}
    config = AutoConfig.for_model("llama", head_dim=8, rope_parameters=longrope)
    assert "only with a field original_max_position_embeddings" in transformers4_fault(config)
    untyped = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    model = tiny_model("olmo2", rope_parameters=untyped)
    with caplog.at_level(logging.INFO):
        prunelight.save(model, tiny_tokenizer, tmp_path / "out")
    told = "transformers 4 refuses the saved model: it reads no scaled RoPE of olmo2 without"
    assert told in caplog.text


def test_a_tokenizer_has_a_class_that_both_versions_know(tmp_path, tiny_tokenizer):
    tiny_tokenizer.add_special_tokens({"extra_special_tokens": ["w99"]})
    prunelight.save(tiny_model(), tiny_tokenizer, tmp_path / "out")
    assert '"torch_dtype": "float32"' in (tmp_path / "out" / "config.json").read_text()
    values = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert values["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert values["additional_special_tokens"] == ["w99"]
    assert "extra_special_tokens" not in values
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert type(tokenizer) is type(tiny_tokenizer)
    assert tokenizer.extra_special_tokens == ["w99"]
    assert tokenizer("w99 w7")["input_ids"] == [99, 7]


# What transformers 4 reads, in an environment of its own


@pytest.fixture(scope="module")
def transformers4(tmp_path_factory):
    """Return a function that runs transformers4_side.py with transformers 4."""
    python = os.environ.get("TRANSFORMERS4_PYTHON")
    if not python:
        pytest.skip("no environment with transformers 4: see .ci/transformers4")

    modules = tmp_path_factory.mktemp("modules")
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def run(*arguments):
        done = subprocess.run(
            [python, transformers4_side.__file__, *map(str, arguments)],
            env={**settings, "HF_MODULES_CACHE": str(modules), "PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout)

    return run


# Arguments of configs in transformers 4 that our config.json may lack, and why that is right.
ABSENT = {
    "position_embedding_type": "absolute by default, the only type in transformers 5",
    "forced_eos_token_id": "of generation",
    "num_logits_to_keep": "of the forward",
    "aux_loss_alpha": "of training",
    "seq_aux": "of training",
    "num_labels": "of classifiers",
    "verbose": "of logs",
    "use_falcon_mambapy": "of speed",
    "bos_index": "of generation",
    "eos_index": "of generation",
    "pad_index": "of generation",
    "pad_token_id": "of generation",
    "hidden_activation": "None by default, which is what hidden_act says in transformers 5",
    "untie_r": "True by default, the only value in transformers 5",
    "rms_norm": "True by default, the only value in transformers 5",
    "sliding_window": "not used by Jamba",
    "global_attn_every_n_layers": "layer_types is stated",
    "time_step_limit": "None by default",
    "partial_rotary_factor": "1.0 by default in Phi-3; a fault is told for another value",
    "num_hidden_layers": "in LongCat twice num_layers, which is stated",
}
# Families whose config holds the text model's in a config of its own.
COMPOSITE = ("fuyu", "mllama", "musicgen", "musicgen_melody")


@pytest.mark.transformers4
def test_every_argument_of_a_config_in_transformers_4_is_stated(tmp_path, transformers4):
    lacking, families = {}, transformers4("families")
    assert set(families) == MODEL_TYPES, "run tests/support/transformers4_families.py"
    for kind in sorted(set(families) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(COMPOSITE)):
        config = AutoConfig.for_model(kind)
        written_twice(config, tmp_path)
        values = json.loads((tmp_path / "config.json").read_text())
        for name in (*families[kind]["arguments"], "tie_word_embeddings"):
            stated = name in values or families[kind]["aliases"].get(name) in values
            if not (stated or name in ABSENT):
                lacking.setdefault(name, []).append(kind)
    assert lacking == {}


def pruned(name):
    model = loud_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    windows = token_windows(8, 16)
    plan = STOCK[name].make().plan(model, windows)
    return prunelight.apply(model, plan, windows)


def models():
    """Yield names and models: each stock method, each kind of RoPE, each family without a layer."""
    for name in STOCK:
        if (model := pruned(name)).config.model_type == "llama":  # a class of transformers
            yield f"method {name}", model
    for kind in KINDS:
        yield f"class of our own, {kind}", own_model(kind, "llama")
    for name in ROPES:
        yield f"rope {name}", rope_model(name)
    yield "capped scores", loud_model("gemma2", attn_logit_softcapping=0.5)
    for family in {**FAMILIES, **UNKNOWN_FAMILIES}:
        model = loud_model(family)
        remove_layers(model, [1])
        yield f"family {family}", model


@pytest.mark.transformers4
@pytest.mark.slow
def test_transformers_4_computes_the_same_logits(tmp_path, tiny_tokenizer, transformers4):
    tiny_tokenizer.add_special_tokens({"extra_special_tokens": ["<extra>"]})
    expected = {}
    for number, (name, model) in enumerate(models()):
        own = model.config.model_type.startswith("prunelight_")
        prunelight.save(model, tiny_tokenizer, tmp_path / str(number), export_remote_code=own)
        if "attn_implementation='eager'" in transformers4_fault(model.config):
            (tmp_path / str(number) / "eager").touch()
        with torch.no_grad():
            expected[str(number)] = name, model(IDS).logits.float()
    (tmp_path / "ids.json").write_text(json.dumps(IDS.tolist()))
    computed = transformers4("logits", tmp_path)
    faults = {}
    for number, (name, logits) in expected.items():
        if isinstance(computed[number], str):
            faults[name] = computed[number]
            continue
        difference = (torch.tensor(computed[number]["logits"]) - logits).abs().max().item()
        if difference > 1e-3:
            faults[name] = difference
        assert computed[number]["words"] == tiny_tokenizer("w7 <extra> w9")["input_ids"], name
    assert not faults, "\n".join(f"{k}: {v}" for k, v in faults.items())


def without_defaults(config):
    """Change RoPE's theta and a cap of scores, in place: no default may be right by chance."""
    if getattr(config, "attn_logit_softcapping", None):
        config.attn_logit_softcapping = 0.1
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    for number, value in enumerate(nested or [parameters]):
        if "rope_theta" in value:
            value["rope_theta"] = 300.0 * (number + 1)
    return config


def family_models():
    """Yield each family that both versions have: name, model, fault that we tell."""
    for kind in sorted(MODEL_TYPES & set(family_names()) - set(NOT_BUILT)):
        torch.manual_seed(0)
        config = without_defaults(tiny_config(kind))
        if config.sub_configs and kind != "blt":  # multimodal: only their text decoder is saved
            continue
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        make_lively(model)
        yield kind, model, transformers4_fault(model.config)


# Families of which transformers 4 says nothing here.
NOT_COMPARED = {
    "jamba": "its kernels need a GPU",
    "zamba": "its kernels need a GPU",
    "reformer": "its hashes are random",
}


@pytest.mark.transformers4
@pytest.mark.slow
def test_every_family_is_the_same_in_transformers_4_or_a_fault_is_told(tmp_path, transformers4):
    (tmp_path / "ids.json").write_text(json.dumps(IDS.tolist()))
    expected, faults = {}, {}
    for kind, model, fault in family_models():
        restore_rwkv_scale(model)
        model.save_pretrained(tmp_path / kind)
        add_old_names(model.config, tmp_path / kind)
        with torch.no_grad():
            expected[kind] = model(input_ids=IDS, use_cache=False).logits.float(), fault
    assert len(expected) > 100
    computed = transformers4("logits", tmp_path)
    for kind, (logits, fault) in expected.items():
        if isinstance(computed[kind], str):
            faults[kind] = computed[kind]
        else:
            difference = (torch.tensor(computed[kind]["logits"]) - logits).abs().max()
            if difference > 1e-3 * max(1.0, logits.abs().max()):
                faults[kind] = float(difference)
        if fault or kind in NOT_COMPARED:
            faults.pop(kind, None)
    assert not faults, "\n".join(f"{k}: {v}" for k, v in faults.items())
