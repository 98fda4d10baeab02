"""Where a model may be saved, and beside which files; what is refused comes before any work."""

import os
import time
from pathlib import Path

import pytest
from text_tokenizers import make_tokenizer
from tiny import tiny_model

import prunelight
from prunelight.models.written_files import check_names, check_place

BAD_NAMES = [
    *("", ".", "..", "../x", "a/../x", "/tmp/x", "a/b", "a\\b", "C:x", "x\0y", "n" * 300, "./x"),
    *("config.json", "CONFIG.json", "model.safetensors", "tokenizer.json", "prunelight.json"),
    *("README.md", "LICENSE", "Licence.txt", "generation_config.json", "vocab.json", ".hidden"),
    *("pytorch_model.bin", "model.safetensors.index.json", "tokenizer_config.json", "merges.txt"),
    *("chat_template.jinja", "special_tokens_map.json", "sliced.py", "NOTICE"),
]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.parametrize("name", BAD_NAMES)
def test_an_extra_file_that_leads_elsewhere_or_replaces_ours_is_refused(model, tmp_path, name):
    with pytest.raises(ValueError, match="extra_files="):
        prunelight.save(model, make_tokenizer(), tmp_path / "out", extra_files={name: "text"})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("files", [{"a.txt": b"bytes"}, {"a.txt": None}, {3: "text"}])
def test_an_extra_file_is_a_name_and_a_text(files):
    with pytest.raises(TypeError, match="must map a file name to its text"):
        check_names(files)


def test_every_name_that_save_writes_is_refused_as_an_extra_file(model, tmp_path):
    prunelight.save(model, make_tokenizer(), tmp_path / "out")
    for file in (tmp_path / "out").iterdir():
        with pytest.raises(ValueError, match="that save itself writes"):
            check_names({file.name: ""})


def test_plans_and_notes_may_be_extra_files():
    check_names({"plan.json": "{}", "plan-2.json": "{}", "notes.txt": "", "räume.md": ""})
    with pytest.raises(ValueError, match="that save itself writes"):
        check_names({"plan.json": "{}"}, with_plan=True)


@pytest.mark.parametrize("place", [".", "", "..", "./", "/", "x/..", "../../"])
def test_a_directory_that_cannot_be_replaced_is_refused_before_any_work(
    model, tmp_path, monkeypatch, place
):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    begun = time.monotonic()
    with pytest.raises(ValueError, match="current directory.*new directory"):
        prunelight.save(model, make_tokenizer(), place)
    assert time.monotonic() - begun < 1
    assert [str(path) for path in tmp_path.rglob("*")] == [
        str(tmp_path / "a"),
        str(tmp_path / "a" / "b"),
    ]


def test_a_link_to_the_current_directory_and_a_mount_point_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to(".")
    with pytest.raises(ValueError, match="current directory"):
        check_place("link")
    with pytest.raises(ValueError, match="mount point"):
        check_place("/proc")


@pytest.mark.parametrize("exists", [False, True])
def test_a_model_is_saved_into_a_link_every_time(model, tmp_path, exists):
    (tmp_path / "disk").mkdir()
    if exists:
        (tmp_path / "disk" / "big").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "big")
    for _ in range(3):
        saved = prunelight.save(model, make_tokenizer(), tmp_path / "out")
        assert Path(saved.directory).name == "out"
        assert (tmp_path / "out").is_symlink()
        assert (tmp_path / "disk" / "big" / "config.json").is_file()


@pytest.mark.parametrize("name", [".out.tmp", ".out.old", "out.tmp"])
def test_neighbours_of_the_directory_stay(model, tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "theirs").write_text("")
    for _ in range(2):
        prunelight.save(model, make_tokenizer(), tmp_path / "out")
    assert (tmp_path / name / "theirs").exists()
    assert len(os.listdir(tmp_path)) == 2
