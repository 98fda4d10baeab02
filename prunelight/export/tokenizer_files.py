"""The files of a tokenizer, copied beside an export as they were saved."""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from pathlib import Path

from prunelight.models.loading import LICENCE_FILES

# Names of such files in a saved directory; licences go along.
PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "spiece.model",
    "sentencepiece.bpe.model",
    *LICENCE_FILES,
)


def copy_tokenizer(directory: Path, out: Path) -> list[str]:
    """Copy the files of a saved model's tokenizer, and its licence.

    Args:
        directory: of the saved model.
        out: existing directory of the export.

    Returns:
        Names of the files, in order.
    """
    names = sorted(
        file.name
        for file in directory.iterdir()
        if file.is_file() and any(fnmatch(file.name, pattern) for pattern in PATTERNS)
    )
    for name in names:
        shutil.copyfile(directory / name, out / name)
    return names
