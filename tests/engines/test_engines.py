"""What the table says of engines is what was measured; its checks; what a depth method asks."""

import json
import re
from functools import cache

import pytest
from cases import FAMILIES, family_config, removals
from loaders import FIGURES, PYTHONS, verdict
from runs import make_data, make_module, make_trainer, write_model
from tiny import tiny_model
from transformers import AutoConfig

from prunelight.callbacks import ShortGPT
from prunelight.evaluation.report.record import RunRecord
from prunelight.models.engines import (
    ENGINES,
    READINGS,
    check_engine,
    family_pattern,
    fields_by_place,
    layer_kinds,
    loads_in,
    misreadings,
)
from prunelight.models.families.shorter_config import CutRules, cut_config
from prunelight.planning.layer_choice import lowest_scores
from prunelight.planning.layer_pattern import pattern_fits
from prunelight.pruning.remove_layers import remove_layers
from prunelight.runtime.files.checksums import unsealed


@cache
def figures():
    table = json.loads(FIGURES.read_text(encoding="utf-8"))
    return {(f["model"], f["state"], f["engine"]): f for f in table["figures"]}


def shorter(name, layers):
    config = family_config(name)
    kept = [i for i in range(config.num_hidden_layers) if i not in layers]
    rules = {"moe_layers": "layers"} if hasattr(config, "moe_layers") else {}
    cut_config(config, kept, config.num_hidden_layers, CutRules(rules=rules))
    return config


SAID = {"yes": "right", "no: reads it": "wrong", "no: refuses it": "refused"}
CASES = [
    pytest.param(name, removal, engine, id=f"{name}-{removal.state}-{engine}")
    for name in FAMILIES
    for removal in removals(name)
    if not removal.options  # a key in the GGUF is not seen in a config
    for engine in ENGINES
    if (name, removal.state, engine) in figures()
]


@pytest.mark.parametrize(("name", "removal", "engine"), CASES)
def test_what_is_said_of_an_engine_was_measured(name, removal, engine):
    measured = verdict(figures()[name, removal.state, engine])
    answer = loads_in(shorter(name, removal.layers))[engine]
    assert SAID[re.match("yes|no: [a-z]+ it", answer)[0]] == measured, answer


# What a method leaves of the tiny Llama, and its model_type.
RESULTS = {
    "layers merged": "llama",
    "half of the weights zero": "llama",
    "narrower heads and MLPs": "llama",
    "sliced with one rotation": "llama",
    "sliced": "prunelight_sliced_llama",
    "attention dropped": "prunelight_llama",
    "layers of different widths": "prunelight_widths_llama",
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("state", RESULTS)
def test_what_is_said_of_the_result_of_a_method_was_measured(state, engine):
    config = family_config("llama")
    config.model_type = RESULTS[state]
    if state == "narrower heads and MLPs":
        config.num_attention_heads, config.num_key_value_heads = 2, 1
    if state == "sliced with one rotation":
        config.hidden_size = 192
    if config.model_type != "llama":
        answer = loads_in(config)[engine]
        assert answer.startswith("no: refuses it")  # its code was not exported
        config.auto_map = {"AutoConfig": "code.Config"}
    answer = loads_in(config)[engine]
    assert SAID[re.match("yes|no: [a-z]+ it", answer)[0]] == verdict(
        figures()["llama", state, engine]
    )


def test_every_family_of_the_table_was_measured():
    tried = (key for key in figures() if key[0] in FAMILIES and key[2] in READINGS)
    measured = {(FAMILIES[model][0], engine) for model, _, engine in tried}
    assert measured == {(family, engine) for engine in READINGS for family in READINGS[engine]}


def test_the_table_and_the_readers_know_the_same_engines():
    assert set(PYTHONS) == set(ENGINES)


# Families that alternate kinds of layers, and the rule as their authors tell it.
RULES = {
    "gemma2": ("layer_types", lambda i: i % 2 == 1),
    "gemma3": ("layer_types", lambda i: i % 6 == 5),
    "cohere2": ("layer_types", lambda i: i % 4 == 3),
    "gpt_oss": ("layer_types", lambda i: i % 2 == 1),
    "smollm3": ("no_rope_layers", lambda i: i % 4 == 3),
    "llama4": ("no_rope_layers", lambda i: i % 4 == 3),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("total", [1, 5, 12, 23])
def test_the_rule_of_a_family_is_derived_for_any_depth(name, total):
    field, is_special = RULES[name]
    config = family_config(name)
    pattern = family_pattern(config, (field,))(total)
    special = {"layer_types": "full_attention", "no_rope_layers": 0}[field]
    assert [kind == (special,) for kind in pattern] == [is_special(i) for i in range(total)]
    # A model that was pruned, against the rule, has the same rule.
    pruned = shorter(name, (1,))
    assert family_pattern(pruned, (field,))(total) == pattern


def test_a_family_without_kinds_has_layers_of_one_kind():
    config = family_config("llama")
    assert set(layer_kinds(config)) == set(family_pattern(config)(3)) == {()}
    assert fields_by_place(config) == ()


@pytest.mark.parametrize("name", ["smollm3", "gemma3", "gpt_oss", "cohere2", "gemma2"])
def test_layers_chosen_by_the_pattern_leave_a_model_that_llamacpp_reads(name):
    config = family_config(name)
    fields = fields_by_place(config, "llama.cpp")
    total, pattern = config.num_hidden_layers, family_pattern(config, fields)
    scores = [float(total - i) for i in range(total)]
    fits = pattern_fits(layer_kinds(config, fields), pattern, 2)
    layers = lowest_scores(scores, 2, fits=fits)
    assert loads_in(shorter(name, layers))["llama.cpp"] == "yes"
    assert loads_in(shorter(name, (1,)))["llama.cpp"].startswith("no: reads it wrong")


def test_an_engine_that_reads_a_model_wrong_is_refused_with_the_remedy():
    model = tiny_model("smollm3")
    check_engine(model, "llama.cpp")
    remove_layers(model, (0,))
    with pytest.raises(
        ValueError,
        match="engine='llama.cpp': llama.cpp reads it wrong: it derives no_rope_layers from a "
        "layer's place.*remove layers so that they do$",
    ):
        check_engine(model, "llama.cpp")
    check_engine(model, "vLLM")
    with pytest.raises(ValueError, match=r"engine='ollama' must be one of transformers 4.57, vLLM"):
        check_engine(model, "ollama")


def test_the_key_that_cures_a_gguf_is_named():
    answer = loads_in(shorter("gemma3", (1,)))["llama.cpp"]
    assert "write gemma3.attention.sliding_window_pattern with one value a layer" in answer


def test_a_variant_that_is_known_by_its_depth_is_wrong_without_layers():
    for name in ("gemma3, 62 layers", "exaone4, 64 layers"):
        assert loads_in(family_config(name))["llama.cpp"] == "yes"
        answer = loads_in(shorter(name, tuple(range(4))))["llama.cpp"]
        assert "Remove no whole layers of it" in answer


def test_a_class_of_our_own_and_a_family_that_was_not_tried_are_told_apart():
    own = AutoConfig.for_model("llama")
    own.model_type = "prunelight_sliced_llama"
    assert all(answer.startswith("no: ") for answer in loads_in(own).values())
    assert not misreadings(own)
    answers = loads_in(AutoConfig.for_model("bloom"))
    assert (
        answers.pop("transformers 4.57") == "yes"
    )  # each family that both versions know was tried
    assert set(answers.values()) == {"unknown: not tried"}


def test_a_run_warns_of_a_program_that_reads_its_result_wrong(tmp_path, caplog):
    name = write_model(tmp_path / "model", "smollm3")
    root = tmp_path / "run"
    # Layer 0 goes: the layer without RoPE, the fourth, becomes the third.
    trainer = make_trainer(root, ShortGPT(num_layers=1, protected=range(1, 6)), max_epochs=1)
    trainer.fit(make_module(name), make_data(name, tmp_path))
    warning = "llama.cpp reads it wrong: it derives no_rope_layers from a layer's place"
    assert warning in caplog.text
    (measured,) = root.glob("pruned-*/measured.json")
    record = RunRecord.from_dict(unsealed(measured.read_text()))
    assert set(record.loads_in) == set(ENGINES)
    assert record.loads_in["llama.cpp"].startswith("no: reads it wrong")
    assert [text for text in record.warnings if warning in text]
    report = (root / "report.md").read_text(encoding="utf-8")
    assert "## Whether other programs read the result" in report
    assert f"> - {warning}" in report
    assert "- llama.cpp: no: reads it wrong" in report


def test_a_run_does_not_warn_of_what_the_dense_model_had_already(tmp_path, caplog):
    name = write_model(tmp_path / "model", "mistral")
    root = tmp_path / "run"
    trainer = make_trainer(root, ShortGPT(num_layers=1), max_epochs=1)
    trainer.fit(make_module(name), make_data(name, tmp_path))
    assert "reads it wrong" not in caplog.text
    (measured,) = root.glob("pruned-*/measured.json")
    record = RunRecord.from_dict(unsealed(measured.read_text()))
    assert "ignores sliding_window=8" in record.loads_in["llama.cpp"]
    assert not [text for text in record.warnings if "llama.cpp" in text]
