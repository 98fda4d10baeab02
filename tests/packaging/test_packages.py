"""pyproject.toml names the folders and data files that git holds: a forgotten one fails at once.

`check_wheel.py` checks the same of a built wheel; this test needs no build.
"""

import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").is_file())
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = SETTINGS["tool"]["setuptools"]
INSTALLED = ("prunelight", "callbacks", "configs")  # folders of the repository


@pytest.fixture(scope="module")
def tracked():
    """Files that git tracks in the installed folders, without those that are deleted on disk."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", *INSTALLED], capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [Path(path) for path in listed.stdout.split("\0") if path]
    return [file for file in files if (ROOT / file).is_file()]


def package_of(folder):
    """Package name of a folder of the repository: callbacks/recovery -> that of prunelight."""
    parts = folder.parts if folder.parts[0] == "prunelight" else ("prunelight", *folder.parts)
    return ".".join(parts)


def folder_of(package):
    """Folder of a package, by the mapping that pyproject.toml gives to setuptools."""
    mapping = SETUPTOOLS["package-dir"]
    parts = package.split(".")
    for length in range(len(parts), 0, -1):
        if (mapped := mapping.get(".".join(parts[:length]))) is not None:
            return ROOT.joinpath(mapped, *parts[length:])
    return ROOT.joinpath(*parts)


def test_every_folder_with_python_files_is_a_package_of_pyproject(tracked):
    folders = {file.parent for file in tracked if file.suffix == ".py"}
    assert set(map(package_of, folders)) - set(SETUPTOOLS["packages"]) == set()


def test_every_package_has_an_init_file(tracked):
    folders = {file.parent for file in tracked if file.suffix == ".py"}
    assert {folder for folder in folders if folder / "__init__.py" not in tracked} == set()


def test_every_package_of_pyproject_is_a_folder_with_tracked_files(tracked):
    folders = {ROOT / file.parent for file in tracked}
    packages = SETUPTOOLS["packages"]
    assert [package for package in packages if folder_of(package) not in folders] == []
    assert len(packages) == len(set(packages))


def test_every_data_file_is_package_data(tracked):
    data = {ROOT / file for file in tracked if file.suffix != ".py"}
    packed = {
        file
        for package, patterns in SETUPTOOLS["package-data"].items()
        for pattern in patterns
        for file in folder_of(package).glob(pattern)
    }
    assert data - packed == set()


def test_every_licence_file_of_pyproject_exists():
    assert [f for f in SETTINGS["project"]["license-files"] if not (ROOT / f).is_file()] == []
