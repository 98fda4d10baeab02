"""Checkpoints are read as tensors and plain data, from disk or from a URL: none of them runs code.

Lightning unpickles whatever a URL gives, and torch advises to unpickle what it refuses. Here every
file is read by torch's restricted reader, and an error says what the file holds instead.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote

import fsspec
import torch

from prunelight.runtime.files.atomic_files import explaining_read_errors
from prunelight.runtime.files.checksums import check_checkpoint_file

# Lightning finds the file that each stands for.
CHECKPOINT_WORDS = ("best", "last", "hpc", "registry")

# Its JSON files hold templates that can run code.
_UNSAFE_PROTOCOLS = ("reference",)

_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")


def is_url(path: Any) -> bool:
    """Return whether a path names a file on another machine, or one inside another file."""
    return "::" in str(path) or _URL.match(str(path)) is not None


def local_file(path: str | Path) -> Path:
    """Return a path, or a URL `file://...`, as a path of this machine."""
    if not _is_local(path):
        return Path(path).expanduser()
    file = str(path).partition("://")[2]
    return Path(file) if Path(file).exists() else Path(unquote(file))


def check_checkpoint_path(path: str | Path) -> None:
    """Check that a path leads to a checkpoint; one on this machine is read, its tensors are not.

    Raises:
        ValueError: if it is a directory, a URL that is not read, or no checkpoint.
        FileNotFoundError: if there is no such file on this machine.
        OSError: if nobody answers for the URL.
        ImportError: if the URL needs a package that is not installed.
    """
    if is_url(path) and not _is_local(path):
        _check_url(str(path))
        _opened(str(path)).close()  # what nobody answers for is told before minutes of work
        return
    _check_file(path)
    if local_file(path).is_file():  # a pipe gives its bytes once
        _read_file(path, "cpu", mmap=True)


def _is_local(path: str | Path) -> bool:
    return "::" not in str(path) and str(path).lower().startswith(("file://", "local://"))


def _check_file(path: str | Path) -> None:
    file = local_file(path)
    if file.is_dir():
        raise ValueError(
            f"ckpt_path={str(path)!r} is a directory; give a checkpoint file, as a run keeps them "
            "in its checkpoints/"
        )
    if not file.exists():
        raise FileNotFoundError(
            f"ckpt_path={str(path)!r} does not exist; give a checkpoint of an earlier run "
            "(they are in checkpoints/ of its directory)"
        )


def _check_url(url: str) -> None:
    protocol = url.partition("://")[0].lower()
    if "::" in url or protocol in _UNSAFE_PROTOCOLS:
        raise ValueError(
            f"ckpt_path={url!r} must name one file; download the checkpoint and give its path"
        )
    try:
        fsspec.get_filesystem_class(protocol)
    except ValueError as error:
        raise ValueError(
            f"ckpt_path={url!r} has the unknown protocol {protocol}://; download the checkpoint "
            "and give its path"
        ) from error
    except ImportError as error:
        raise ImportError(
            f"ckpt_path={url!r} needs a package for {protocol}://; install it with: "
            f"pip install 'fsspec[{protocol}]', or download the checkpoint and give its path"
        ) from error


def read_checkpoint(
    path: str | Path | IO[bytes], map_location: Any = "cpu", *, mmap: bool = False
) -> dict[str, Any]:
    """Read a checkpoint as tensors and plain data; nothing in the file is executed.

    Args:
        path: file on this machine, URL that fsspec reads, or an open file.
        map_location: see torch.load.
        mmap: leave the tensors on disk until they are used; of a file on this machine.

    Raises:
        ValueError: if the file is damaged, holds other objects, or is no checkpoint.
        OSError: if it cannot be read.
        ImportError: if the URL needs a package that is not installed.
    """
    if not isinstance(path, (str, Path)):
        with explaining_read_errors(getattr(path, "name", "that was given as a file")):
            return _as_checkpoint(torch.load(path, map_location, weights_only=True))
    if not isinstance(path, Path) and is_url(path) and not _is_local(path):
        _check_url(path)
        with explaining_read_errors(path), _opened(path) as stream:
            return _as_checkpoint(torch.load(stream, map_location, weights_only=True))
    _check_file(path)
    return _read_file(path, map_location, mmap=mmap)


def _read_file(path: str | Path, map_location: Any, *, mmap: bool) -> dict[str, Any]:
    with explaining_read_errors(path):
        if local_file(path).is_file():  # a pipe gives its bytes once
            check_checkpoint_file(local_file(path))
        # The tensors of torch's older format cannot stay on disk.
        lazily = mmap and zipfile.is_zipfile(local_file(path))
        return _as_checkpoint(
            torch.load(local_file(path), map_location, weights_only=True, mmap=lazily)
        )


def _opened(url: str) -> Any:
    """Return the open file of a URL.

    Raises:
        OSError: if it cannot be read; names the reason.
    """
    try:
        return fsspec.open(url, "rb").open()
    except Exception as error:  # of the protocol's own package: no common base class
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise OSError(f"checkpoint {url} cannot be read ({reason}); check the URL") from error


def _as_checkpoint(content: Any) -> dict[str, Any]:
    if not isinstance(content, Mapping):
        raise ValueError(f"it is a {type(content).__name__}, and no mapping")
    missing = [key for key in ("state_dict", "pytorch-lightning_version") if key not in content]
    if missing:
        raise ValueError(f"it has no {missing[0]}, as the checkpoint of a training has")
    return dict(content)
