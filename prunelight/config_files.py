"""Configs of the command line, found by name: a file here, or one that is installed."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path

import yaml

from prunelight.models.loading import MOST_LETTERS, longest_part


def find_configs(arguments: Sequence[str]) -> list[str]:
    """Replace each config name by the path of the installed config, unless a file here has it.

    Raises:
        FileNotFoundError: if a name is neither a file here nor an installed config.
    """
    paths = list(arguments)
    for position, argument in enumerate(paths):
        option, separator, value = argument.partition("=")
        if option in ("--config", "-c") and separator:
            paths[position] = f"{option}={_config_path(value)}"
        elif position and paths[position - 1] in ("--config", "-c"):
            paths[position] = _config_path(argument)
    return paths


def _config_path(name: str) -> str:
    # "-" is the standard input; and a config may be given as text.
    if longest_part(name) > MOST_LETTERS and not set(name) & set(":{[\n"):
        raise FileNotFoundError(
            f"config {name[:40]!r}... is no file: its name has {len(name)} letters"
        )
    if name == "-" or (set(name) & set(":{[\n") and not Path(name).expanduser().is_file()):
        return name
    if Path(name).expanduser().exists():
        _check_yaml(Path(name).expanduser())
        return name
    root = Path(str(files("prunelight.configs")))
    installed = {path.name: path for path in sorted(root.rglob("*.yaml"))}
    path = installed.get(name, root / name)  # papers/dlp_wanda_70.yaml too
    if path.is_file():
        return str(path)
    near = get_close_matches(Path(name).name, installed) or installed
    raise FileNotFoundError(
        f"config {name!r} is neither a file here nor installed; installed are: {', '.join(near)}"
    )


def _check_yaml(path: Path) -> None:
    """Check that a config can be read.

    Raises:
        ValueError: if it is a directory, no text, or no YAML of options.
    """
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        told = " ".join(str(error).split())
        raise ValueError(f"config {str(path)!r} is no YAML file: {told}") from error
    except RecursionError as error:
        raise ValueError(f"config {str(path)!r} is nested too deeply") from error
    if not isinstance(config, dict):
        raise ValueError(
            f"config {str(path)!r} must hold options, such as model.name; it holds a "
            f"{type(config).__name__}"
        )
