"""The files of a saved directory: readable for others, with licence, without local paths."""

import os
import stat

import pytest
from huggingface_hub.repocard import metadata_load
from methods_table import METHODS
from runs import local_paths, make_data, write_model
from transformers import AutoTokenizer

import prunelight
from prunelight.models.card.model_card import forget_local_base

CARD = """---
license: other
license_name: parrot
license_link: LICENSE
language:
- en
tags:
- parrots
model-index:
- name: measured
---
# Parrot
It talks about itself at length.
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model directory with a licence and a card."""
    directory = tmp_path_factory.mktemp("author") / "parrot"
    write_model(directory)
    (directory / "LICENSE").write_text("You may.")
    (directory / "NOTICE.txt").write_text("Note.")
    (directory / "README.md").write_text(CARD)
    return directory


@pytest.mark.parametrize("name", METHODS)
def test_no_saved_file_holds_a_path_of_this_machine(tmp_path, base, name):
    model, tokenizer = prunelight.load(base)
    windows = make_data(str(base), tmp_path).calibration_windows()
    method = METHODS[name].make()
    plan = method.plan(model, windows)
    if not METHODS[name].gradual:
        model = prunelight.apply(model, plan, windows)
    prunelight.save(model, tokenizer, tmp_path / "out", plan=plan)
    again, tokenizer = prunelight.load(tmp_path / "out")
    prunelight.save(again, tokenizer, tmp_path / "again")
    home = os.path.expanduser("~")
    for directory in (tmp_path / "out", tmp_path / "again"):
        assert local_paths(directory, base.parent, tmp_path, home) == []
        assert (directory / "LICENSE").read_text() == "You may."


def test_licence_and_tags_of_the_base_stay(tmp_path, base):
    model, tokenizer = prunelight.load(base)
    prunelight.save(model, tokenizer, tmp_path / "out")
    assert (tmp_path / "out" / "NOTICE.txt").read_text() == "Note."
    card = tmp_path / "out" / "README.md"
    expected = {"license": "other", "license_name": "parrot", "license_link": "LICENSE"}
    assert metadata_load(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **expected,
        "language": ["en"],
        "tags": ["parrots", "prunelight"],
    }
    assert "at length" not in card.read_text()


def test_a_card_that_is_no_yaml_gives_no_facts(tmp_path, base, caplog):
    broken = tmp_path / "broken"
    write_model(broken)
    (broken / "README.md").write_text("---\na: [b\n---\n")
    model, tokenizer = prunelight.load(broken)
    prunelight.save(model, tokenizer, tmp_path / "out")
    assert "README.md is not read" in caplog.text
    card = metadata_load(tmp_path / "out" / "README.md")
    assert card["tags"] == ["prunelight"]
    assert "license" not in card


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_have_the_mode_of_other_new_files(tmp_path, base, umask):
    model, tokenizer = prunelight.load(base)
    before = os.umask(umask)
    try:
        prunelight.save(model, tokenizer, tmp_path / "out", extra_files={"note.txt": ""})
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "out").iterdir()}
    assert modes == {0o666 & ~umask}


def test_how_a_tokenizer_was_loaded_is_not_written(tmp_path, base):
    model, _ = prunelight.load(base)
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    prunelight.save(model, tokenizer, tmp_path / "out")
    text = (tmp_path / "out" / "tokenizer_config.json").read_text()
    assert "is_local" not in text
    assert "local_files_only" not in text


def test_the_card_of_an_adapter_names_no_local_base(tmp_path):
    card = tmp_path / "README.md"
    tags = "- lora\n- base_model:adapter:/home/me/parrot"
    card.write_text(f"---\nbase_model: /home/me/parrot\ntags:\n{tags}\n---\nText.\n")
    forget_local_base(card)
    assert metadata_load(card) == {"tags": ["lora"]}
    card.write_text("---\nbase_model: birds/parrot\n---\nText.\n")
    forget_local_base(card)
    assert metadata_load(card) == {"base_model": "birds/parrot"}
