"""Names that may leave this machine: a folder's name stays, the path to it does not."""

from __future__ import annotations

from pathlib import Path


def without_folders(name: str) -> str:
    """Return the last part of an absolute path, or any other name as it is (a hub id, say)."""
    return Path(name).name if Path(name).expanduser().is_absolute() else name
