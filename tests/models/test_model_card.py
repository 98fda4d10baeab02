"""The card of a saved directory: the hub reads it, it says what was done, and it stays sealed."""

import json
import re

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load, metadata_save
from methods_table import METHODS
from runs import make_data, make_module, make_trainer, write_model

import prunelight
from prunelight.callbacks import ShortGPT
from prunelight.models.card.model_card import add_export_to_card, add_to_card, write_card
from prunelight.models.saving import check_unchanged

LOADS = {"vLLM": "yes", "llama.cpp": "no: <why>"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("base") / "parrot")


def saved_by(name, base, directory):
    model, tokenizer = prunelight.load(base)
    windows = make_data(base, directory).calibration_windows()
    method = METHODS[name].make()
    plan = method.plan(model, windows)
    model = prunelight.apply(model, plan, windows)
    prunelight.save(model, tokenizer, directory / "out", plan=plan)
    return directory / "out"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ShortGPT by number", "decoder layers removed: "),
        ("SLM, highest layers", " merged into one"),
        ("attention dropped", "attention dropped in layers "),
        ("width", "neurons kept in every layer"),
        ("SliceGPT", "25.00 % of the hidden width sliced"),
        ("Wanda", "50.00 % of the weights of decoder linears"),
    ],
)
def test_the_card_says_what_each_method_did_and_how_to_load_it(name, words, base, tmp_path):
    directory = saved_by(name, base, tmp_path)
    card = ModelCard.load(directory / "README.md")
    assert words in card.text
    assert "(`plan.json`)" in card.text
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert {"prunelight", "pruned"} <= set(card.data.tags)
    own = json.loads((directory / "config.json").read_text())["model_type"].startswith("prunelight")
    assert ("import prunelight" in card.text) == own
    code = card.text.split("```python\n")[1].split("```")[0].replace('"."', repr(str(directory)))
    exec(code, {})  # as a reader would run it
    check_unchanged(directory)


def test_metadata_goes_round_and_a_hub_id_is_the_base(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    base_card = tmp_path / "base.md"
    base_card.write_text("---\nlicense: mit\nlanguage: [en]\ndatasets: [a/b]\ntags: t\n---\nText.")
    write_card(tmp_path, base_card, "org/model", LOADS)
    facts = metadata_load(tmp_path / "README.md")
    kept = {"license": "mit", "language": ["en"], "datasets": ["a/b"], "base_model": "org/model"}
    assert kept.items() <= facts.items()
    assert facts["tags"] == ["t", "prunelight"]
    before = (tmp_path / "README.md").read_text()
    metadata_save(tmp_path / "README.md", facts)
    assert (tmp_path / "README.md").read_text() == before
    assert "- llama.cpp: no: <why>" in before
    assert "Pruned from `org/model` with prunelight." in before


def test_weights_from_a_gguf_are_told_of_in_each_later_card(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    write_card(tmp_path, None, "org/model", {}, "model-q4_1.gguf")
    first = (tmp_path / "README.md").rename(tmp_path / "first.md")
    write_card(tmp_path, first, "", {})
    words = "The dense weights were read from the GGUF file `model-q4_1.gguf`, which may hold fewer"
    assert words in first.read_text()
    assert words in (tmp_path / "README.md").read_text()
    write_card(tmp_path, None, "", {})
    assert "GGUF" not in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("name", ["", "/home/me/model", "../model", "a/b/c", "x y"])
def test_what_is_no_hub_id_is_no_base(name, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    write_card(tmp_path, None, name, {})
    assert "base_model" not in metadata_load(tmp_path / "README.md")
    assert "/home" not in (tmp_path / "README.md").read_text()


def test_code_beside_the_weights_is_told_of(tmp_path):
    config = {"model_type": "prunelight_sliced_llama", "auto_map": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_card(tmp_path, None, "", {})
    assert "trust_remote_code=True" in (tmp_path / "README.md").read_text()


def test_a_file_that_is_no_plan_does_not_end_the_save(tmp_path, caplog):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "plan.json").write_text("{}")
    write_card(tmp_path, None, "", {})
    assert "plan.json is not told of in the card" in caplog.text


def test_figures_are_added_once_and_the_directory_stays_sealed(base, tmp_path):
    directory = saved_by("ShortGPT by number", base, tmp_path)
    add_to_card(directory, "first figures")
    add_to_card(directory, "second figures")
    text = (directory / "README.md").read_text()
    assert text.count("second figures") == 1
    assert "first figures" not in text
    check_unchanged(directory)
    assert ModelCard.load(directory / "README.md").data.library_name == "transformers"


def test_the_card_names_each_export_once_beside_the_figures(base, tmp_path):
    directory = saved_by("ShortGPT by number", base, tmp_path)
    add_export_to_card(directory, "gguf, f16", "`a.gguf`, not proven")
    add_export_to_card(directory, "gguf, q8_0", "`b.gguf`, llama.cpp read it")
    add_export_to_card(directory, "gguf, f16", "`a.gguf`, llama.cpp read it")
    add_to_card(directory, "| figures |")
    text = (directory / "README.md").read_text()
    assert text.count("## Exports") == 1
    assert text.count("- gguf, f16: `a.gguf`, llama.cpp read it") == 1
    assert text.count("- gguf, q8_0: `b.gguf`, llama.cpp read it") == 1
    assert "not proven" not in text
    assert "| figures |" in text
    check_unchanged(directory)


def test_a_card_without_a_place_for_figures_stays(base, tmp_path, caplog):
    directory = saved_by("ShortGPT by number", base, tmp_path)
    (directory / "README.md").write_text("mine")
    add_to_card(directory, "figures")
    assert (directory / "README.md").read_text() == "mine"
    assert "has no place for figures" in caplog.text


def test_the_card_of_a_run_has_its_recovered_figures_and_no_folder(base, tmp_path):
    module = make_module(base)
    trainer = make_trainer(tmp_path / "run", ShortGPT(num_layers=2), max_steps=2)
    trainer.fit(module, datamodule=make_data(base, tmp_path))
    text = (tmp_path / "run" / "final" / "README.md").read_text()
    assert "| dense | pruned | recovered |" in text
    recovered = module.record.stages[-1].perplexity
    assert f"{recovered:.4g}"[:4] in text
    assert "windows of 32 tokens of `text.txt`" in text
    assert re.search(r"Recovered on \d+ tokens of `text.txt`\.", text)
    assert str(tmp_path) not in text
    check_unchanged(tmp_path / "run" / "final")
