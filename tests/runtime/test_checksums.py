"""Damage to checkpoints, bases and caches is noticed; what is older than checksums still loads."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from damage_kinds import damage, edit, flip, swap
from runs import write_model
from safetensors.torch import load, load_file, save_file
from tiny import tiny_model

from prunelight import load as load_model
from prunelight.models.saving import MARKER, check_unchanged, save
from prunelight.recovery.distillation.teacher_cache import TeacherCache
from prunelight.runtime.files.checksums import (
    changed_files,
    check_checkpoint_file,
    file_checksum,
    has_checksum,
    sealed,
    unsealed,
)
from prunelight.training.resuming.checkpoint_io import AtomicCheckpointIO

TIMES = 40  # damages of each kind of file


@pytest.fixture
def checkpoint(tmp_path):
    content = {"state_dict": {"x": torch.rand(300)}, "global_step": 3, "callbacks": {"a": [1, 2]}}
    content["pytorch-lightning_version"] = "2.6"
    AtomicCheckpointIO().save_checkpoint(content, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("saved")
    model, tokenizer = load_model(write_model(root / "model"), dtype="float32")
    save(model, tokenizer, root / "base", extra_files={"plan.json": "{}"})
    return root / "base"


def batches(places):
    ids = torch.stack([torch.arange(8) + place for place in places])
    return {"input_ids": ids, "labels": ids}


def make_cache(directory, num_examples=130):
    return TeacherCache(
        directory,
        directory,
        batches,
        num_examples,
        teacher={"fingerprint": "of a teacher"},
        k=3,
        temperature=1.0,
        vocabulary=256,
    )


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    cache = make_cache(tmp_path_factory.mktemp("cache") / "cache")
    cache.open()
    cache.write(tiny_model(vocab_size=256), cache.missing(), progress=False)
    return cache.directory


# --- checkpoints


def test_a_checkpoint_with_a_checksum_loads_copied_renamed_and_linked(checkpoint):
    copy, link = checkpoint.with_name("copy.ckpt"), checkpoint.with_name("link.ckpt")
    shutil.copy(checkpoint, copy)
    link.symlink_to(copy)
    for file in (checkpoint, copy, link):
        assert has_checksum(file)
        assert AtomicCheckpointIO().load_checkpoint(file)["global_step"] == 3
        assert torch.load(file, weights_only=True, mmap=True)["callbacks"] == {"a": [1, 2]}


def test_any_damage_to_a_checkpoint_is_noticed(checkpoint):
    whole, rng = checkpoint.read_bytes(), random.Random(0)
    for _ in range(TIMES):
        damage(checkpoint, rng)
        with pytest.raises(ValueError, match=r"^checkpoint .* is damaged, [^\n]*$"):
            AtomicCheckpointIO().load_checkpoint(checkpoint)
        checkpoint.write_bytes(whole)
    # A file that has lost its checksum and nothing else is one of an older version: it is whole.
    for lost in {*range(1, 60)} - {len("\nprunelight crc32 01234567\n")}:
        checkpoint.write_bytes(whole[:-lost])
        with pytest.raises(ValueError, match="is damaged"):
            AtomicCheckpointIO().load_checkpoint(checkpoint)


def test_each_byte_of_a_checkpoint_counts(tmp_path):
    AtomicCheckpointIO().save_checkpoint({"global_step": 3}, tmp_path / "a.ckpt")
    whole = (tmp_path / "a.ckpt").read_bytes()
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        (tmp_path / "a.ckpt").write_bytes(flipped)
        with pytest.raises(ValueError, match=r"bytes|no whole|part|end"):
            check_checkpoint_file(tmp_path / "a.ckpt")


def test_a_checkpoint_of_an_older_version_loads_and_its_damaged_tensors_do_not(tmp_path):
    content = {"pytorch-lightning_version": "2.6", "state_dict": {"x": torch.arange(999)}}
    torch.save(content, tmp_path / "old.ckpt")
    assert not has_checksum(tmp_path / "old.ckpt")
    assert (
        len(AtomicCheckpointIO().load_checkpoint(tmp_path / "old.ckpt")["state_dict"]["x"]) == 999
    )
    data = bytearray((tmp_path / "old.ckpt").read_bytes())
    data[len(data) // 2] ^= 4
    (tmp_path / "old.ckpt").write_bytes(data)
    with pytest.raises(ValueError, match="its part .*data/0 is not what was written"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "old.ckpt")


# --- directories


def test_any_damage_to_a_saved_directory_is_noticed(saved, tmp_path):
    check_unchanged(saved)
    rng = random.Random(1)
    for file in sorted(saved.iterdir()):
        for _ in range(TIMES // 8):
            root = tmp_path / "base"
            shutil.copytree(saved, root)
            damage(root / file.name, rng)
            with pytest.raises(ValueError, match=r"is not as it was saved: [^\n]*; delete the dir"):
                check_unchanged(root)
            shutil.rmtree(root)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda root: edit(root / "config.json", random.Random(0)), "config.json was changed"),
        (lambda root: (root / "generation_config.json").unlink(), "generation_config.json is miss"),
        (lambda root: (root / "adapter_config.json").write_text("{}"), "adapter_.* was added"),
        (lambda root: swap(root / "config.json", root / "plan.json"), "config.json was changed"),
        (lambda root: (root / MARKER).unlink(), "prunelight.json is missing"),
        (lambda root: (root / MARKER).write_bytes(b"\xff"), "prunelight.json was changed"),
    ],
)
def test_an_edited_directory_is_told_of_by_file(change, told, saved, tmp_path):
    root = tmp_path / "base"
    shutil.copytree(saved, root)
    change(root)
    with pytest.raises(ValueError, match=told):
        check_unchanged(root)


def test_files_that_nothing_reads_and_directories_without_checksums_pass(saved, tmp_path):
    root = tmp_path / "base"
    shutil.copytree(saved, root)
    (root / "notes.md").write_text("mine")
    (root / ".hidden.json").write_text("{}")
    (root / "measured.json").write_text("{}")
    check_unchanged(root, leave_out=("measured.json",))
    facts = unsealed((root / MARKER).read_text())
    del facts["files"]
    (root / MARKER).write_text(json.dumps(facts, indent=1) + "\n")  # as before there were any
    edit(root / "config.json", random.Random(0))
    check_unchanged(root)


def test_changed_files_are_those_of_the_directory_alone(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.json").write_text("b")
    sums = {"a.txt": file_checksum(tmp_path / "a.txt"), "gone": "00000000"}
    assert changed_files(tmp_path, sums) == {"gone": "missing", "deep/b.json": "added"}
    assert changed_files(tmp_path, {**sums, "a.txt": "x"}, ("deep/b.json",)) == {
        "a.txt": "changed",
        "gone": "missing",
    }
    (tmp_path / "empty").touch()
    assert file_checksum(tmp_path / "empty") == "00000000"


# --- JSON files


def test_a_sealed_file_gives_its_values_and_no_byte_of_it_may_change():
    values = {"a": 1, "b": ["é", 0.1, None], "c": {"checksum": 3}}
    text = sealed(values)
    assert unsealed(text) == values
    assert sealed({**values, "checksum": "of before"}) == text
    for place in range(len(text)):
        for character in "0x ":
            changed = text[:place] + character + text[place + 1 :]
            if changed != text:
                with pytest.raises(ValueError, match=r"."):
                    unsealed(changed, must=True)


def test_a_file_older_than_checksums_is_read():
    assert unsealed('{"a": 1}') == {"a": 1}
    with pytest.raises(ValueError, match="its text is not what was written"):
        unsealed('{"a": 1}', must=True)
    with pytest.raises(ValueError, match="holds a list"):
        unsealed("[1]")


# --- teacher caches


def test_any_damage_to_a_teacher_cache_is_noticed(cached, tmp_path):
    make_cache(cached).open()
    assert make_cache(cached).missing(whole=True) == []
    rng = random.Random(2)
    for file in sorted(cached.iterdir()):
        for _ in range(TIMES // 4):
            root = tmp_path / "cache"
            shutil.copytree(cached, root)
            damage(root / file.name, rng)
            with pytest.raises(ValueError, match=r"^[^\n]*(is damaged|holds ids|has f)[^\n]*$"):
                make_cache(root).open()
            shutil.rmtree(root)


def test_swapped_files_of_a_teacher_cache_are_noticed(cached, tmp_path):
    root = tmp_path / "cache"
    shutil.copytree(cached, root)
    swap(*(root / f"block-00000{n}.safetensors" for n in (0, 1)))
    with pytest.raises(ValueError, match=r"is damaged \(it is another file of this cache\); delet"):
        make_cache(root).open()


def test_a_teacher_cache_of_an_older_version_is_reused(cached, tmp_path):
    root, fingerprint = tmp_path / "cache", make_cache(cached).fingerprint
    shutil.copytree(cached, root)
    for file in root.glob("*.safetensors"):
        save_file(load_file(file), file, metadata={"fingerprint": fingerprint})
    described = unsealed((root / "teacher.json").read_text())
    (root / "teacher.json").write_text(json.dumps(described, indent=1) + "\n")
    make_cache(root).open()
    flip(root / "teacher.json", random.Random(0))


def test_the_same_cache_has_the_same_bytes(cached, tmp_path):
    again = make_cache(tmp_path / "cache")
    again.open()
    again.write(tiny_model(vocab_size=256), again.missing(), progress=False)
    for file in cached.iterdir():
        assert (again.directory / file.name).read_bytes() == file.read_bytes()
    (first, *_) = sorted(Path(cached).glob("*.safetensors"))
    assert set(load(first.read_bytes())) == {"ids", "log_probabilities"}
