"""One run at a time in a directory: a lock that dies with its process.

The lock is that of the operating system on a small file. It ends with the process that holds it,
however that ends, so that no lock is ever left behind. Children of the process do not hold it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
import weakref
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

log = logging.getLogger(__name__)

FILE = ".prunelight.lock"

_HELD_BY_ANOTHER = (errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK)


class DirectoryLock:
    """Holds a directory for the runs of this process, until `release` or the end of the process.

    On a file system without locks this says so and goes on.

    Args:
        directory: is made if it is not there.
        option: that sets another directory, for the error.

    Raises:
        RuntimeError: if another process holds the directory; names it and the remedy.
    """

    # Process and directory -> handle, and how many hold it. To close any handle of the file would
    # end the lock; a process that was forked has the handle and not the lock.
    _handles: ClassVar[dict[tuple[int, Path], int | None]] = {}
    _holders: ClassVar[Counter[tuple[int, Path]]] = Counter()

    def __init__(self, directory: Path, option: str = "trainer.default_root_dir") -> None:
        self.directory = directory.expanduser().resolve()
        key = (os.getpid(), self.directory)
        if not self._holders[key]:
            self._handles[key] = _lock(self.directory, option)
        self._holders[key] += 1
        # Also when whatever holds the lock is gone, such as a run that failed.
        self.release = weakref.finalize(self, self._release, key)

    @classmethod
    def _release(cls, key: tuple[int, Path]) -> None:
        if key[0] != os.getpid():
            return
        cls._holders[key] -= 1
        if not cls._holders[key]:
            handle = cls._handles.pop(key)
            if handle is not None:
                os.close(handle)  # the file stays for the next run


def _lock(directory: Path, option: str) -> int | None:
    """Return the handle that holds the lock; None where there can be none."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:  # what cannot be written is told by the check of the output
        return None
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = _holder(handle)
        os.close(handle)
        if error.errno in _HELD_BY_ANOTHER:
            raise RuntimeError(_refusal(directory, holder, option)) from error
        log.warning(
            "%s has no locks (%s): see to it that no other run writes there", directory, error
        )
        return None
    with suppress(OSError):  # a full disk; the lock holds without its text
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        facts = {"process": os.getpid(), "host": socket.gethostname(), "started": started}
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(facts).encode(), 0)
    return handle


def _holder(handle: int) -> str:
    """Return in words who holds a lock."""
    try:
        facts = json.loads(os.pread(handle, 1000, 0))
        return f"process {facts['process']} on {facts['host']} (started {facts['started']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _refusal(directory: Path, holder: str, option: str) -> str:
    return (
        f"{directory} is in use by {holder}; wait until that run ends or stop it, or choose "
        f"another {option}"
    )
