"""Check a wheel that is installed in a fresh environment, outside the checkout.

`.ci/wheel` builds the wheel and calls this file. An editable install and a source checkout find
every folder of the repository by themselves, so both hide a folder that pyproject.toml forgot.

Run: python -I check_wheel.py WHEEL REPOSITORY
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import subprocess
import sys
from pathlib import Path, PurePosixPath
from zipfile import ZipFile

FOLDERS = ("prunelight", "callbacks", "configs")  # of the repository, that are installed


def wheel_path(path: str) -> str:
    """Return where a file of the repository lies in the wheel."""
    return path if path.startswith("prunelight/") else f"prunelight/{path}"


def git_files(repository: Path) -> dict[str, Path]:
    """Return what must be installed: the path in the wheel -> the tracked file."""
    command = ["git", "-C", str(repository), "ls-files", "-z", *FOLDERS]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {wheel_path(path): repository / path for path in listed.split("\0") if path}


def check_files(wheel: Path, expected: dict[str, Path]) -> None:
    """Raise ValueError unless the wheel holds the tracked files and no others."""
    with ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n and not n.endswith("/")}
        missing, unknown = sorted(set(expected) - names), sorted(names - set(expected))
        different = [
            name
            for name in sorted(names & set(expected))
            if archive.read(name) != expected[name].read_bytes()
        ]
    for files, fault in (
        (missing, "lacks (name their folders in pyproject.toml, [tool.setuptools])"),
        (unknown, "holds, though git does not know them"),
        (different, "holds with another content"),
    ):
        if files:
            raise ValueError(f"{wheel.name} {fault}: {', '.join(files)}")


def check_modules(expected: dict[str, Path]) -> int:
    """Import every module from the installed wheel; return their number.

    Raises:
        ValueError: if a module comes from elsewhere.
    """
    modules = [PurePosixPath(name) for name in sorted(expected) if name.endswith(".py")]
    for path in modules:
        name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        file = importlib.import_module(name).__file__
        if file is None or not Path(file).is_relative_to(sys.prefix):
            raise ValueError(f"{name} was imported from {file}, not from the wheel in {sys.prefix}")
    return len(modules)


def check_configs(expected: dict[str, Path]) -> int:
    """Let the command line parse every installed config by its bare name; return their number.

    Raises:
        ValueError: if the command line refuses a config.
    """
    from prunelight.cli import main

    configs = [file for name, file in sorted(expected.items()) if name.endswith(".yaml")]
    for config in configs:
        text = config.read_text(encoding="utf-8")
        command = re.search(rf"prunelight (\w+) --config {re.escape(config.name)}", text)
        verb = command[1] if command else "fit"
        told = io.StringIO()
        try:
            with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
                main([verb, "--config", config.name, "--print_config"])
            raise ValueError(f"prunelight {verb} --print_config did not stop for {config.name}")
        except SystemExit as stopped:
            if stopped.code:
                raise ValueError(f"{config.name}: {stopped.code} {told.getvalue()}") from stopped
    return len(configs)


def main() -> None:
    """Check the wheel that the arguments name."""
    wheel, repository = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    if Path.cwd().is_relative_to(repository):
        raise ValueError("start this check outside the repository, which Python would import")
    expected = git_files(repository)
    check_files(wheel, expected)
    modules, configs = check_modules(expected), check_configs(expected)
    print(f"{wheel.name}: {len(expected)} files, {modules} modules and {configs} configs")  # noqa: T201


if __name__ == "__main__":
    main()
