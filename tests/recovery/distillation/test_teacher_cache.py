"""What the dense model said once: the cache of a teacher."""

import json
import shutil
from collections import namedtuple

import pytest
import torch
from poison import FAULTS, poison_file
from runs import make_data
from safetensors import safe_open

from prunelight.losses import counted_targets, top_k
from prunelight.recovery.distillation.teacher_cache import TeacherCache
from prunelight.runtime.atomic_files import ENDING


def cache_of(data, root, directory=None, **changes):
    settings = {"teacher": {"fingerprint": "a"}, "k": 4, "temperature": 1.5, "vocabulary": 600}
    return TeacherCache(
        directory,
        root,
        lambda places: data.batch("train", places),
        len(data.examples("train")),
        **{**settings, **changes},
    )


def write(cache, teacher):
    cache.open()
    cache.write(teacher, cache.missing(), progress=False)
    return {file.name: file.read_bytes() for file in cache.directory.glob("block-*")}


@pytest.fixture(scope="module")
def cached(data, teacher, tmp_path_factory):
    """A whole cache, and the bytes of its files."""
    cache = cache_of(data, tmp_path_factory.mktemp("cache"))
    return cache, write(cache, teacher)


@pytest.fixture
def copied(cached, data, tmp_path):
    """A copy of it that may be damaged."""
    shutil.copytree(cached[0].directory, tmp_path / "copy")
    return cache_of(data, tmp_path, tmp_path / "copy")


@pytest.mark.parametrize("places", [[70, 3, 41], [0], [83, 82, 81, 80]])
def test_the_cache_says_of_any_batch_what_the_teacher_says(cached, data, teacher, places):
    batch = data.batch("train", places)
    tokens, _ = counted_targets(batch["labels"])
    with torch.no_grad():
        logits = teacher(batch["input_ids"], batch["attention_mask"]).logits.flatten(0, 1)[tokens]
    ids, log_probabilities = top_k(logits, 4, 1.5)
    found = cached[0].targets(batch)
    torch.testing.assert_close(found[0].long(), ids)
    # float16 has 11 bits; log-probabilities are below 8 in size.
    torch.testing.assert_close(found[1].float(), log_probabilities, rtol=0, atol=2**-8 + 1e-4)


def test_only_tokens_that_count_are_stored(cached, data):
    total = sum(len(counted_targets(labels[None])[0]) for _, labels in data.examples("train"))
    files = sorted(cached[0].directory.glob("block-*"))
    sizes = []
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            (seal,) = tensors.metadata().values()
            assert seal.startswith(f"{cached[0].fingerprint} file ")
            sizes.append(len(tensors.get_tensor("ids")))
            assert tensors.get_tensor("ids").dtype == torch.uint16
    assert sum(sizes) == total < sum(len(ids) for ids, _ in data.examples("train"))


def test_a_cache_that_was_stopped_goes_on_and_is_the_same_byte_for_byte(
    cached, data, teacher, tmp_path
):
    cache, seen = cache_of(data, tmp_path), []

    def stop(*_):
        seen.append(1)
        if len(list(cache.directory.glob("block-*"))) == 1:
            raise KeyboardInterrupt

    handle = teacher.register_forward_hook(stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            write(cache, teacher)
    finally:
        handle.remove()
    (first,) = cache.directory.glob("block-*")
    written = first.stat().st_mtime_ns
    leftover = cache.directory / f".block-000001.safetensors.77-ab{ENDING}"
    leftover.write_bytes(b"half")
    assert cache.missing() == [1]
    assert write(cache, teacher) == cached[1]
    assert first.stat().st_mtime_ns == written
    assert not leftover.exists()


def test_several_processes_write_the_same_cache_together(cached, data, teacher, tmp_path):
    cache = cache_of(data, tmp_path)
    cache.open()
    for rank in (1, 0):
        mine = [block for block in cache.missing() if block % 2 == rank]
        assert mine == [rank]
        cache_of(data, tmp_path).write(teacher, mine, progress=False)
    assert {f.name: f.read_bytes() for f in cache.directory.glob("block-*")} == cached[1]


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({"teacher": {"fingerprint": "b"}}, "teacher"),
        ({"k": 5}, "k"),
        ({"temperature": 1.0}, "temperature"),
    ],
)
def test_a_cache_of_something_else_is_refused_and_both_are_named(
    cached, data, tmp_path, changes, differs
):
    cache = cache_of(data, tmp_path, cached[0].directory, **changes)
    with pytest.raises(ValueError, match=f"{cached[0].fingerprint}, this run needs ") as error:
        cache.open()
    assert f"{cache.fingerprint}: it differs in {differs} (" in str(error.value)


def test_a_cache_of_another_text_is_refused(cached, name, tmp_path):
    other = make_data(name, tmp_path)
    with pytest.raises(ValueError, match="it differs in data .*tokens of the training set"):
        cache_of(other, tmp_path, cached[0].directory).open()


def test_a_row_that_is_no_training_example_is_refused(cached, data):
    batch = data.batch("train", [0])
    batch["input_ids"] = batch["input_ids"].flip(1)
    with pytest.raises(ValueError, match="not among the .* training examples .*loss=kd"):
        cached[0].targets(batch)


def test_a_newer_format_is_refused(copied):
    file = copied.directory / "teacher.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 2}))
    with pytest.raises(ValueError, match="teacher.json has format=2, this version reads 1"):
        copied.open()


def test_a_damaged_description_is_named(copied):
    file = copied.directory / "teacher.json"
    file.write_text(file.read_text()[:40])
    with pytest.raises(ValueError, match="teacher.json is damaged .*delete"):
        copied.open()


def test_a_damaged_file_is_named(copied):
    file = copied.directory / "block-000001.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="block-000001.safetensors is damaged .*delete it"):
        copied.open()
    shutil.copy(copied.directory / "block-000000.safetensors", file)
    with pytest.raises(
        ValueError, match="block-000001.safetensors is damaged .it is another file of this"
    ):
        copied.open()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_probability_that_is_no_number_is_found_when_the_cache_is_opened(fault, copied):
    file = copied.directory / "block-000001.safetensors"
    poison_file(file, "log_probabilities", fault, {"fingerprint": copied.fingerprint})
    message = rf"block-000001.safetensors: log_probabilities holds {fault}; delete it"
    with pytest.raises(ValueError, match=message):
        copied.open()


def test_files_of_another_cache_are_not_taken_for_ours(copied):
    (copied.directory / "teacher.json").unlink()
    copied.fingerprint = "another"
    with pytest.raises(ValueError, match="block-000000.safetensors holds .* for another; delete"):
        copied.open()


def test_a_disk_that_is_too_small_is_told_before_the_teacher_is_asked(data, tmp_path, monkeypatch):
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1))
    with pytest.raises(ValueError, match=r"needs .* MB .*0.0 MB are free; lower distillation.k=4"):
        cache_of(data, tmp_path).open()
