"""Writing files whole or not at all, and errors of one line when writing or reading fails."""

from __future__ import annotations

import fcntl
import glob
import logging
import os
import pickle
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)


ENDING = ".prunelight.tmp"  # of a name that is written to, and renamed when it is whole


@contextmanager
def atomic_replacement(path: Path) -> Iterator[Path]:
    """Yield a temporary path; rename it to `path` on success, remove it on an error.

    The temporary file is locked meanwhile: `remove_temporaries` of another process leaves it alone.
    """
    with _renamed_by(os.replace, path) as temporary:
        yield temporary


@contextmanager
def atomic_creation(path: Path) -> Iterator[Path]:
    """Do the same, but a file that another process has put at `path` by then stays."""
    with _renamed_by(_link_if_new, path) as temporary:
        yield temporary


def _link_if_new(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        return
    except OSError:  # a file system without links
        os.replace(temporary, path)


@contextmanager
def _renamed_by(rename: Callable[[Path, Path], None], path: Path) -> Iterator[Path]:
    temporary = _temporary(path)
    handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        _try_lock(handle)
        yield temporary
        flush(temporary)
        rename(temporary, path)
        flush(path.parent)
    finally:
        os.close(handle)
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(directory: Path) -> Iterator[Path]:
    """Yield a new temporary directory; it takes the place of `directory` on success.

    An old directory stays until the new one is in place. Where `directory` is a symbolic link, the
    directory that it names is replaced and the link stays.
    """
    directory = directory.resolve()
    directory.parent.mkdir(parents=True, exist_ok=True)
    if directory.exists():  # else what a killed process left may be the only whole one
        _remove_unused(directory.parent, directory.name)
    temporary = _temporary(directory)
    temporary.mkdir()
    handle = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _try_lock(handle)
        yield temporary
        for file in (*temporary.rglob("*"), temporary):
            flush(file)
        _exchange(temporary, directory)
    finally:
        os.close(handle)
        shutil.rmtree(temporary, ignore_errors=True)
    _remove_unused(directory.parent, directory.name)


def _exchange(temporary: Path, directory: Path) -> None:
    """Rename `temporary` to `directory`, and remove what was there."""
    if not directory.exists():
        os.replace(temporary, directory)
        return
    log.info("replacing %s", directory)
    old = _temporary(directory)
    os.replace(directory, old)
    try:
        os.replace(temporary, directory)
    except OSError:
        os.replace(old, directory)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _temporary(path: Path) -> Path:
    """Return a name beside a path that no other process takes, and that says who made it."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{ENDING}")


def _try_lock(handle: int) -> bool:
    """Lock a file that is written to until its handle is closed; False if another has it.

    On a file system without locks no leftover can be told from what is being written.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def flush(path: Path) -> None:
    """Wait until a file, or a directory's list of names, is on disk; needed before a rename."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_temporaries(directories: Iterable[Path]) -> None:
    """Remove the temporary files that a killed process left behind, and nothing of others.

    They have a name that only prunelight gives, and no process holds their lock.
    """
    for directory in directories:
        _remove_unused(directory, "*")


def _remove_unused(directory: Path, name: str) -> None:
    for path in directory.glob(f".{name if name == '*' else glob.escape(name)}.*{ENDING}"):
        if path.is_symlink():
            continue
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # gone by now, or of another user
            continue
        try:
            if not _try_lock(handle):
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        finally:
            os.close(handle)


def newest_checkpoint(*directories: Path) -> Path | None:
    """Return the checkpoint in directories that was written last, or None without checkpoints."""
    files = [file for directory in directories for file in directory.glob("*.ckpt")]
    return max(files, key=lambda file: file.stat().st_mtime_ns, default=None)


@contextmanager
def explaining_write_errors(path: Path, checkpoint: Path | None = None) -> Iterator[None]:
    """Turn an error of the file system into one line that says how to continue the run.

    Args:
        path: the file or directory that is written, whole or not at all.
        checkpoint: the run's last checkpoint, from which the run can continue.

    Raises:
        OSError: instead of every error that the file system caused, wrapped by a library or not.
    """
    try:
        yield
    except Exception as error:
        reason = _system_reason(error)
        if reason is None:
            raise
        remedy = "what was there before is intact. Free space, or choose another directory"
        if checkpoint is not None:
            remedy = (
                f"checkpoint {checkpoint} is intact. Free space or choose another directory "
                "(trainer.default_root_dir), then start the same command again: it goes on from "
                "there"
            )
        raise OSError(f"cannot write {path}: {reason}; {remedy}") from error


def _system_reason(error: BaseException | None) -> str | None:
    """Return the operating system's reason for an error, None if the error has another origin."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return os.strerror(error.errno)
        error_number = re.search(r"\(os error (\d+)\)", str(error))  # as safetensors writes it
        if error_number:
            return os.strerror(int(error_number[1]))
        error = error.__cause__ or error.__context__
    return None


def write_text(file: Path, text: str) -> None:
    """Write a file whole or not at all, in a directory that is made if it is missing.

    Raises:
        OSError: if it cannot be written.
    """
    with explaining_write_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_replacement(file) as temporary:
            temporary.write_text(text, encoding="utf-8")


def check_writable(directory: Path) -> None:
    """Check, by writing a file, that a directory is writable.

    For a directory that does not exist yet, its nearest existing parent is checked, and that its
    name leaves room for that of a temporary directory.

    Raises:
        OSError: if the file cannot be written; the error names the directory and the reason.
    """
    existing, new = directory.absolute(), "writable"
    with explaining_write_errors(directory):
        while not existing.exists():
            existing, new = existing.parent, existing.name
        probe = _temporary(existing / new)
        try:
            probe.write_bytes(b"\0")
            flush(probe)
        finally:
            probe.unlink(missing_ok=True)


@contextmanager
def explaining_read_errors(path: str | Path) -> Iterator[None]:
    """Turn an error of reading a checkpoint into one line that names the remedy.

    Raises:
        ValueError: if the file is damaged, or holds objects other than tensors and plain data.
    """
    try:
        yield
    except (RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = reading_fault(error)
        raise ValueError(
            f"checkpoint {path} is damaged, or holds other objects than tensors and plain data "
            f"({reason}); delete it to start the recovery anew from the pruned base, or give "
            "another one as ckpt_path"
        ) from error


def reading_fault(error: BaseException) -> str:
    """Return why a file was not read, in a few words; what torch refuses to unpickle, by its name.

    Torch's own text advises to run what the file holds: it is not passed on.
    """
    text = str(error)
    if held := re.search(r"GLOBAL ([\w.]+)", text):
        return f"it holds {held[1]}, which is code"
    if "weights_only" in text or "Weights only" in text:
        return "it holds pickled objects"
    return text.partition("\n")[0].partition(". ")[0]
