"""A saved config.json of ours states what layers have as transformers' per_layer_config does."""

import json

import pytest
from own_models import GROUPS, NEURONS, own_model
from tiny import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

import prunelight

SAID = {
    "dropped": {
        "1": {"skip": ["mlp"]},
        "4": {"skip": ["attention", "mlp"]},
        "5": {"skip": ["attention"]},
    },
    "widths": {
        str(i): {
            name: value
            for name, value, whole in (
                ("num_attention_heads", 2 * groups, 4),
                ("num_key_value_heads", groups, 2),
                ("intermediate_size", neurons, 64),
            )
            if value != whole
        }
        for i, (groups, neurons) in enumerate(zip(GROUPS, NEURONS, strict=True))
        if (groups, neurons) != (2, 64)
    },
}


def saved(kind, directory, tokenizer):
    prunelight.save(own_model(kind, "llama"), tokenizer, directory)
    return json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize("kind", SAID)
def test_a_config_states_what_layers_have(kind, tmp_path, tiny_tokenizer):
    assert saved(kind, tmp_path / "model", tiny_tokenizer)["per_layer_config"] == SAID[kind]


@pytest.mark.parametrize("kind", SAID)
def test_transformers_itself_understands_the_statement(kind, tmp_path, tiny_tokenizer):
    stated = saved(kind, tmp_path / "model", tiny_tokenizer)["per_layer_config"]
    stock = tiny_model("llama").config
    stock.per_layer_config = stated
    for layer, fields in SAID[kind].items():
        read = stock.per_layer_config[int(layer)]
        assert {name: getattr(read, name) for name in fields} == fields


@pytest.mark.parametrize("kind", SAID)
def test_a_directory_without_the_statement_is_the_same_model(kind, tmp_path, tiny_tokenizer):
    values = saved(kind, tmp_path / "model", tiny_tokenizer)
    with_statement = AutoConfig.from_pretrained(tmp_path / "model")
    del values["per_layer_config"]  # as older versions wrote it
    (tmp_path / "model" / "config.json").write_text(json.dumps(values))
    older = AutoConfig.from_pretrained(tmp_path / "model")
    assert older.to_dict() == with_statement.to_dict()
    assert "per_layer_config" not in older.to_dict()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.num_parameters() == own_model(kind, "llama").num_parameters()


@pytest.mark.parametrize("kind", SAID)
def test_a_statement_that_differs_from_the_lists_is_an_error(kind, tmp_path, tiny_tokenizer):
    values = saved(kind, tmp_path / "model", tiny_tokenizer)
    values["per_layer_config"].pop("4")
    (tmp_path / "model" / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="per_layer_config=.*differs from .*change both, or"):
        AutoConfig.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("kind", ["sliced", "gaps", "stock"])
def test_other_models_state_nothing(kind, tmp_path, tiny_tokenizer):
    model = tiny_model("llama") if kind == "stock" else own_model(kind, "llama")
    prunelight.save(model, tiny_tokenizer, tmp_path / "model")
    assert "per_layer_config" not in json.loads((tmp_path / "model" / "config.json").read_text())
