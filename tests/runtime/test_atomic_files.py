"""Files and directories appear whole or not at all, and what is of others stays."""

import multiprocessing
import os
import time

import pytest

from prunelight.runtime.files.atomic_files import (
    ENDING,
    atomic_creation,
    atomic_directory,
    atomic_replacement,
    remove_temporaries,
)

FOREIGN = [".final.tmp", ".final.old", ".x.tmp", ".last.ckpt.12.tmp", "final.tmp", ".tmp", "a.tmp"]


def write(directory, ready, kind):
    with kind(directory / "final") as temporary:
        if temporary.is_dir():
            (temporary / "config.json").write_text("{}")
        else:
            temporary.write_text("half")
        ready.set()
        time.sleep(60)


def start(directory, kind):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=write, args=(directory, ready, kind))
    process.start()
    assert ready.wait(30)
    return process


def temporaries(directory):
    return list(directory.glob(f".*{ENDING}"))


@pytest.mark.parametrize("kind", [atomic_replacement, atomic_creation, atomic_directory])
def test_what_is_being_written_stays_and_what_a_kill_left_goes(tmp_path, kind):
    process = start(tmp_path, kind)
    remove_temporaries([tmp_path])
    assert len(temporaries(tmp_path)) == 1, "removed while it was written"
    process.kill()
    process.join()
    assert len(temporaries(tmp_path)) == 1
    remove_temporaries([tmp_path])
    assert temporaries(tmp_path) == []


@pytest.mark.parametrize("links", [True, False])
def test_a_new_file_is_whole_and_leaves_no_other_name(tmp_path, links, monkeypatch):
    def no_links(*_):
        raise OSError("Operation not supported")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    with atomic_creation(tmp_path / "file") as temporary:
        temporary.write_text("mine")
    assert (tmp_path / "file").read_text() == "mine"
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_that_another_process_made_meanwhile_stays(tmp_path):
    with atomic_creation(tmp_path / "file") as temporary:
        temporary.write_text("mine")
        (tmp_path / "file").write_text("theirs")
    assert (tmp_path / "file").read_text() == "theirs"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("directory", [False, True])
def test_temporaries_of_others_stay(tmp_path, name, directory):
    foreign = tmp_path / name
    foreign.mkdir() if directory else foreign.write_text("theirs")
    remove_temporaries([tmp_path])
    for _ in range(2):
        with atomic_directory(tmp_path / "final") as temporary:
            (temporary / "config.json").write_text("{}")
    assert foreign.exists()
    assert sorted(os.listdir(tmp_path)) == sorted({name, "final"})


def test_two_processes_write_one_directory_and_both_end(tmp_path):
    process = start(tmp_path, atomic_directory)
    with atomic_directory(tmp_path / "final") as temporary:
        (temporary / "mine").write_text("")
    assert os.listdir(tmp_path / "final") == ["mine"]
    process.kill()
    process.join()


@pytest.mark.parametrize("exists", [False, True])
def test_a_link_stays_and_what_it_names_is_replaced_every_time(tmp_path, exists):
    (tmp_path / "disk").mkdir()
    target, link = tmp_path / "disk" / "result", tmp_path / "final"
    if exists:
        target.mkdir()
    link.symlink_to(target)
    for name in ("first", "second", "third"):
        with atomic_directory(link) as temporary:
            assert temporary.parent == target.parent, "the bytes go to the disk that was chosen"
            (temporary / name).write_text("")
        assert link.is_symlink()
        assert os.listdir(link) == [name]
    assert sorted(os.listdir(tmp_path)) == ["disk", "final"]


def fail(directory):
    with atomic_directory(directory) as temporary:
        (temporary / "new").write_text("")
        (temporary / "new" / "below").write_text("")


def test_an_error_leaves_the_old_directory(tmp_path):
    with atomic_directory(tmp_path / "final") as temporary:
        (temporary / "old").write_text("")
    with pytest.raises(NotADirectoryError):
        fail(tmp_path / "final")
    assert os.listdir(tmp_path / "final") == ["old"]
    assert os.listdir(tmp_path) == ["final"]
