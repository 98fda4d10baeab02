"""Two runs in one directory: the second is refused, and a lock dies with its process."""

import errno
import fcntl
import multiprocessing
import os
import signal
import time

import pytest

from prunelight.runtime.files import directory_lock
from prunelight.runtime.files.directory_lock import DirectoryLock


def hold(directory, ready, child):
    lock = DirectoryLock(directory)
    if child and os.fork() == 0:  # as the worker of a loader, which outlives its parent
        time.sleep(60)
        os._exit(0)
    ready.set()
    time.sleep(60)
    lock.release()


def start(directory, child=False):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=hold, args=(directory, ready, child))
    process.start()
    assert ready.wait(30)
    return process


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("child", [False, True])
def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path, number, child):
    process = start(tmp_path, child)
    with pytest.raises(RuntimeError, match=f"in use by process {process.pid} on .*default_root"):
        DirectoryLock(tmp_path)
    os.kill(process.pid, number)
    process.join()
    DirectoryLock(tmp_path).release()


def test_the_lock_is_of_the_directory_not_of_its_name(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    process = start(tmp_path / "run")
    with pytest.raises(RuntimeError, match="in use"):
        DirectoryLock(tmp_path / "link")
    process.kill()
    process.join()


def test_runs_of_one_process_share_a_lock(tmp_path):
    first = DirectoryLock(tmp_path)
    DirectoryLock(tmp_path).release()
    held = multiprocessing.get_context("fork").Process(target=DirectoryLock, args=(tmp_path,))
    held.start()
    held.join()
    assert held.exitcode == 1, "another process was let in"
    del first  # of a run that is gone
    start(tmp_path).kill()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch, caplog, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with caplog.at_level("WARNING", directory_lock.__name__):
        lock = DirectoryLock(tmp_path)
        DirectoryLock(tmp_path)
    lock.release()
    (record,) = caplog.records
    assert "has no locks" in record.getMessage()


def test_a_directory_that_cannot_be_written_is_left_to_its_own_check(tmp_path):
    (tmp_path / "file").write_text("")
    DirectoryLock(tmp_path / "file").release()
