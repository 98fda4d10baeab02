"""Checksums by which damage is noticed: in a checkpoint, in a directory, in a JSON file.

CRC-32 finds a flipped or lost byte, at several GB/s (zlib). It is no proof against intent: whoever
edits a file can write its checksum too. What was written before there were checksums has none.
"""

# A checkpoint ends with a line that holds the checksum of all before it. It goes with the file when
# it is copied, renamed or linked, and torch reads over it.

from __future__ import annotations

import json
import os
import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

CHECKSUM = "checksum"  # the last key of a sealed JSON file

_END = re.compile(rb"\nprunelight crc32 ([0-9a-f]{8})\n\Z")
_END_BYTES = len(b"\nprunelight crc32 01234567\n")
_ZIP_END_BYTES = 22  # of the last record of a zip file, with which a file of torch ends
_CHUNK = 1 << 20
# Endings of files that transformers reads if they lie beside a model.
_READ = (".json", ".safetensors", ".bin", ".jinja", ".py", ".model", ".txt")


class ChecksumWriter:
    """A binary file whose checksum is computed while it is written.

    Args:
        file: open for writing.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.checksum = file, 0

    def write(self, data: Any) -> int:
        """Write bytes."""
        self.checksum = zlib.crc32(data, self.checksum)
        return self.file.write(data)

    def flush(self) -> None:
        """Hand the bytes to the operating system."""
        self.file.flush()

    def end(self) -> None:
        """Write the checksum behind all that was written."""
        self.file.write(b"\nprunelight crc32 %08x\n" % self.checksum)


def file_checksum(path: Path) -> str:
    """Return the checksum of a file, eight hex digits."""
    return _checksum(path, path.stat().st_size)


def _checksum(path: Path, size: int) -> str:
    checksum = 0
    with path.open("rb") as file:
        while size and (part := file.read(min(_CHUNK, size))):
            checksum, size = zlib.crc32(part, checksum), size - len(part)
    return f"{checksum:08x}"


def has_checksum(path: Path) -> bool:
    """Return whether a file ends with a checksum.

    Raises:
        ValueError: if the checksum is that of other bytes.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - _END_BYTES))
        end = _END.search(file.read())
    if end is None:
        return False
    if _checksum(path, size - _END_BYTES) != end[1].decode():
        raise ValueError("its bytes are not those that were written")
    return True


def check_checkpoint_file(path: Path) -> None:
    """Check that a checkpoint holds the bytes that were written.

    Raises:
        ValueError: if it is damaged.
    """
    if not has_checksum(path):
        _check_zip(path)


def _check_zip(path: Path) -> None:
    """Check a checkpoint without a checksum of ours by those of the zip format."""
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, UnicodeError) as error:
        raise ValueError(f"it is no whole file of torch: {error}") from error
    if damaged is not None:
        raise ValueError(f"its part {damaged} is not what was written")
    with path.open("rb") as whole:
        whole.seek(-_ZIP_END_BYTES, os.SEEK_END)
        if whole.read(4) != b"PK\5\6":
            raise ValueError("its end is not what was written")


# --- JSON files ------------------------------------------------------------------------------


def sealed(values: Mapping[str, Any]) -> str:
    """Return values as the text of a JSON file that holds its own checksum."""
    plain = {key: value for key, value in values.items() if key != CHECKSUM}
    text = json.dumps(plain, indent=1)
    return json.dumps({**plain, CHECKSUM: f"{zlib.crc32(text.encode()):08x}"}, indent=1) + "\n"


def unsealed(text: str, must: bool = False) -> dict[str, Any]:
    """Return the values of a JSON file; its checksum is checked.

    Args:
        text: of the file.
        must: the file must have a checksum; else it may be older than checksums.

    Raises:
        ValueError: if it is no JSON object, or not as it was written.
    """
    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError(f"it holds a {type(values).__name__}, not an object")
    if (CHECKSUM in values or must) and sealed(values) != text:
        raise ValueError("its text is not what was written")
    return {key: value for key, value in values.items() if key != CHECKSUM}


# --- directories -----------------------------------------------------------------------------


def directory_checksums(directory: Path, leave_out: Iterable[str] = ()) -> dict[str, str]:
    """Return the checksum of each file in a directory by its path there; none of hidden files."""
    return {
        name: file_checksum(file)
        for file in sorted(directory.rglob("*"))
        if file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(directory).parts)
        and (name := file.relative_to(directory).as_posix()) not in leave_out
    }


def changed_files(
    directory: Path, written: Mapping[str, str], leave_out: Iterable[str] = ()
) -> dict[str, str]:
    """Return what became of the files of a directory: name -> "changed", "missing" or "added".

    Args:
        directory: with the files.
        written: their checksums when they were written.
        leave_out: files that may change.
    """
    now = directory_checksums(directory, leave_out)
    changed = {name: "changed" for name in written if name in now and now[name] != written[name]}
    missing = {name: "missing" for name in written if name not in now}
    added = {name: "added" for name in now if name not in written and name.endswith(_READ)}
    return changed | missing | added
