"""Files of a saved directory as others get them: readable, with licence, without local paths."""

from __future__ import annotations

import json
import logging
import shutil
import stat
from collections.abc import Collection, Mapping
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open

from prunelight.models.card.model_card import CARD, is_local_path, write_card
from prunelight.models.loading import BUNDLED, LICENCE_FILES, find_source

log = logging.getLogger(__name__)

# Fields of a tokenizer that say how it was loaded here.
_HOW_LOADED = ("is_local", "local_files_only", "name_or_path")


# Names that a saved directory gives to files of its own.
_TAKEN = (
    "config.json",
    "generation_config.json",
    "prunelight.json",
    "readme.md",
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin",
    "*.py",
    "*tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    ".*",
    *(pattern.lower() for pattern in LICENCE_FILES),
)


def check_names(files: Mapping[str, str], *, with_plan: bool = False) -> None:
    """Check the names and texts of files that a saved directory gets besides its own.

    Raises:
        ValueError: if a name leads elsewhere, is empty, or is that of a file of ours.
        TypeError: if a name or a text is no str.
    """
    for name, text in files.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise TypeError(f"extra_files={{{name!r}: ...}} must map a file name to its text")
        if name in ("", ".", "..") or set(name) & set("/\\:\0") or len(name.encode()) > 200:
            raise ValueError(
                f"extra_files={{{name!r}: ...}} must be a plain file name in the saved directory, "
                "without a folder; write it elsewhere yourself"
            )
        taken = [pattern for pattern in _TAKEN if fnmatch(name.lower(), pattern)]
        if taken or (with_plan and name.lower() == "plan.json"):
            raise ValueError(
                f"extra_files={{{name!r}: ...}} has the name of a file that save itself writes; "
                "take another name"
            )


def check_place(directory: str | Path) -> None:
    """Check that a saved directory can take the place of what is there.

    Raises:
        ValueError: if it cannot be replaced as a whole.
    """
    target = Path(directory).expanduser().resolve()
    if target in (Path.cwd(), *Path.cwd().parents):
        raise ValueError(
            f"directory={str(directory)!r} is the current directory or one that holds it, which "
            "cannot be replaced as a whole; give the name of a new directory in it"
        )
    if target.is_mount():
        raise ValueError(
            f"directory={str(directory)!r} is a mount point, which cannot be replaced as a whole; "
            "give the name of a new directory in it"
        )


def link_parts(directory: Path, files: Mapping[Path, Collection[str]]) -> set[str]:
    """Make files part of a directory, without a copy; return the names of the weights in them.

    Returns:
        No names, and no file in the directory, where the file system links none.
    """
    linked: list[Path] = []
    try:
        for file in files:
            linked.append(directory / f"part-{len(linked):05d}.safetensors")
            linked[-1].hardlink_to(file)
    except OSError as error:
        log.info("weights are copied: %s", error)
        for part in linked:
            part.unlink(missing_ok=True)
        return set()
    return {name for names in files.values() for name in names}


def number_parts(directory: Path, num_parameters: int) -> None:
    """Name the safetensors files of a directory as shards of one model, and write their index."""
    parts = sorted(directory.glob("*.safetensors"))
    weight_map, size = {}, 0
    for number, part in enumerate(parts, 1):
        with safe_open(part, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                weight_map[name] = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
                size += tensors.get_tensor(name).nbytes
        part.rename(directory / f"{number:05d}.part")  # it may have the name of another shard
    for number in range(1, len(parts) + 1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        (directory / f"{number:05d}.part").rename(directory / name)
    metadata = {"total_parameters": num_parameters, "total_size": size}
    index = {"metadata": metadata, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def finish_files(directory: Path, base: str, loads_in: Mapping[str, str] | None = None) -> None:
    """Bring licence and tags of the base into a saved directory, and take local facts out of it.

    Args:
        directory: what `save_pretrained` wrote, with the plans.
        base: name of the model that was pruned, what `prunelight.load` takes; "" for none.
        loads_in: program -> whether it reads the model, for the card.
    """
    forget_loading(directory)
    folder = _folder_of(base)
    if folder is not None:
        for pattern in LICENCE_FILES:
            for file in folder.glob(pattern):
                shutil.copyfile(file, directory / file.name)
    hub_id = BUNDLED[base][1] if base in BUNDLED else base
    card = None if folder is None else folder / CARD
    write_card(directory, card, hub_id, loads_in or {}, _gguf_of(base))
    share_modes(directory)


def share_modes(directory: Path) -> None:
    """Give every file the mode of a file that Python creates: safetensors writes with 0600."""
    probe = directory / ".mode"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for file in directory.rglob("*"):
        if file.is_file():
            file.chmod(mode)


def forget_loading(directory: Path) -> None:
    """Remove from tokenizer_config.json how and from where the tokenizer was loaded."""
    file = directory / "tokenizer_config.json"
    if not file.is_file():
        return
    values = json.loads(file.read_text(encoding="utf-8"))
    kept = {
        name: value
        for name, value in values.items()
        if name not in _HOW_LOADED and not is_local_path(value)
    }
    text = json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    file.write_text(text, encoding="utf-8")


def _gguf_of(base: str) -> str | None:
    """Return the name of the GGUF file that a model is read from; None if it is no GGUF."""
    try:
        return None if not base else find_source(base).gguf_file
    except (ImportError, ValueError, OSError):  # the base is gone
        return None


def _folder_of(base: str) -> Path | None:
    """Return the folder with the files of a model, without asking the network."""
    if not base:
        return None
    try:
        source = find_source(base)
    except (ImportError, ValueError):  # the base is gone, or was never on this machine
        return None
    if Path(source.location).is_dir():
        return Path(source.location)
    try:
        patterns = [*LICENCE_FILES, CARD]
        found = snapshot_download(source.location, allow_patterns=patterns, local_files_only=True)
        return Path(found)
    except (LocalEntryNotFoundError, ValueError):
        return None
