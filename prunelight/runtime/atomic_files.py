"""Writing a file whole or not at all, and saying in one line why it could not be written."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that takes its place on success and is gone on an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on disk: a rename may not come before."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_temporaries(directories: Iterable[Path]) -> None:
    """Remove the temporary files that a killed process left behind."""
    for directory in directories:
        for file in directory.glob(".*.tmp"):
            if file.is_file():
                file.unlink(missing_ok=True)


def newest_checkpoint(directory: Path) -> Path | None:
    """Return the checkpoint of a directory that was written last; None if there is none."""
    return max(directory.glob("*.ckpt"), key=lambda file: file.stat().st_mtime_ns, default=None)


@contextmanager
def explaining(path: Path, checkpoint: Path | None = None) -> Iterator[None]:
    """Turn a failure to write into one line.

    Args:
        path: what is written, whole or not at all.
        checkpoint: the last one of the run, from which it can go on.

    Raises:
        OSError: instead of errors of the file system, those that libraries wrap in theirs too.
    """
    try:
        yield
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        kept = f"checkpoint {checkpoint} is" if checkpoint else "what was there before is"
        raise OSError(
            f"cannot write {path}: {reason}; {kept} intact. Free or choose another place "
            "(trainer.default_root_dir), then start the same command again: it goes on from there"
        ) from error


def _reason(error: BaseException | None) -> str | None:
    """Return what the operating system said, if an error comes from there."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return os.strerror(error.errno)
        told = re.search(r"\(os error (\d+)\)", str(error))  # safetensors
        if told:
            return os.strerror(int(told[1]))
        error = error.__cause__ or error.__context__
    return None


def check_writable(directory: Path) -> None:
    """Check, by writing, that files can be made in a directory, or in the one it would be made in.

    Raises:
        OSError: if not; names the directory and the reason.
    """
    place = directory.absolute()
    while not place.exists():
        place = place.parent
    probe = place / f".writable.{os.getpid()}.tmp"
    with explaining(directory):
        try:
            probe.write_bytes(b"\0")
            flush(probe)
        finally:
            probe.unlink(missing_ok=True)


@contextmanager
def explaining_damage(path: str | Path) -> Iterator[None]:
    """Say what can be done where a checkpoint cannot be read.

    Raises:
        ValueError: if the file is damaged or holds other objects.
    """
    try:
        yield
    except (RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise ValueError(
            f"checkpoint {path} is damaged, or holds other objects than tensors and plain data "
            f"({reason}); delete it to start the recovery anew from the pruned base, or give "
            "another one as ckpt_path"
        ) from error
