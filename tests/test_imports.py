"""The house as drawn: who may import whom, and how large it may grow."""

import ast
import importlib
import inspect
from functools import cache
from pathlib import Path

import pytest

import prunelight.callbacks
from prunelight.callbacks import PruningCallback

ROOT = Path(__file__).resolve().parent.parent
# From the ground up; a module imports from lower layers and from its own, never in a circle.
LAYERS = (
    {"choices", "files", "loader", "losses", "orthogonality", "shares", "sliced", "steps"},
    {"architecture", "plan", "metrics", "statistics", "allocation", "windows"},
    {"plots", "maps", "report", "calibration", "components", "sparsity"},
    {"walk", "merging", "sharded"},
    {"scoring", "sparsify", "gradual", "models", "similarity", "sliding", "sublayers"},
    {"importance", "replay", "analysis"},
    {"slicing", "variants", "width"},
    {"rotation", "trials"},
    {"surgery", "evaluation", "recovery", "masking", "packing", "precision", "quantization"},
    {"regions"},
    {"adaptation", "head"},
    {"saving", "distributed", "checkpoint", "resume", "teacher_cache"},
    {"handover", "distillation", "retraining"},
    {"teaching", "recording"},
    {"ending"},
    {"data", "module"},
    {"callbacks"},
    {"cli"},
)
LEVEL = {name: level for level, layer in enumerate(LAYERS) for name in layer}
WITH_LIGHTNING = {"callbacks", "cli", "data", "distributed", "ending", "module"}
WITH_LIGHTNING |= {"recording", "resume", "retraining"}
FILES = sorted([*(ROOT / "prunelight").glob("*.py"), *(ROOT / "callbacks").glob("*.py")])
MODULES = [file for file in FILES if file != ROOT / "prunelight" / "__init__.py"]
# `__version__` belongs to the package, which is no module of a layer.
ALLOWED = {("plan", "prunelight")}


def name_of(path):
    return "callbacks" if path.parent.name == "callbacks" else path.stem


def imported(source):
    """Dotted names of all imports, those inside functions too; `from a import b` gives a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(path):
    """Names of the modules of prunelight that a file imports; the package itself: prunelight."""
    for name in imported(path.read_text(encoding="utf-8")):
        parts = name.split(".")
        if parts[0] == "prunelight":
            yield parts[1] if len(parts) > 1 and parts[1] in LEVEL else "prunelight"


def test_imports_are_found_wherever_they_stand():
    source = (
        "import a.b\ndef f():\n    from prunelight.plan import Plan\n    from c import d as e\n"
    )
    assert list(imported(source)) == ["a.b", "prunelight.plan.Plan", "c.d"]


def test_every_module_has_a_layer():
    assert {name_of(path) for path in MODULES} == set(LEVEL)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_module_imports_only_from_its_own_or_a_lower_layer(path):
    name = name_of(path)
    for target in ours(path):
        if (name, target) in ALLOWED or target == name == "callbacks":
            continue
        assert target != "prunelight", f"{name} imports from the package, not from a module"
        assert LEVEL[target] <= LEVEL[name], f"{name} imports {target}, which is above it"


def test_no_module_imports_itself_through_others():
    edges = {path: {p for p in MODULES if p != path and targets(path, p)} for path in MODULES}

    done = set()

    def visit(path, trail):
        assert path not in trail, " -> ".join(p.stem for p in (*trail, path))
        for target in edges[path] if path not in done else ():
            visit(target, (*trail, path))
        done.add(path)

    for path in MODULES:
        visit(path, ())


@cache
def names_in(path):
    return frozenset(imported(path.read_text(encoding="utf-8")))


def targets(path, other):
    package = "prunelight.callbacks" if other.parent.name == "callbacks" else "prunelight"
    module = package if other.stem == "__init__" else f"{package}.{other.stem}"
    names = names_in(path)
    # `from prunelight.callbacks.base import X` gives ...base.X: cut what is imported.
    return module in names | {name.rpartition(".")[0] for name in names}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_lightning_stays_in_data_module_cli_and_callbacks(path):
    if name_of(path) in WITH_LIGHTNING:
        return
    roots = {name.split(".")[0] for name in imported(path.read_text(encoding="utf-8"))}
    assert not roots & {"lightning", "pytorch_lightning", "lightning_fabric"}
    assert not WITH_LIGHTNING & set(ours(path))


def test_no_file_is_longer_than_450_lines_and_all_stay_under_16400():
    files = [*FILES, *(ROOT / "configs").iterdir()]
    lengths = {
        path: len(path.read_text(encoding="utf-8").splitlines())
        for path in files
        if path.suffix in (".py", ".yaml")
    }
    assert {str(path): count for path, count in lengths.items() if count > 450} == {}
    assert sum(lengths.values()) < 16400


def test_callbacks_exports_every_pruning_callback():
    modules = [
        importlib.import_module(f"prunelight.callbacks.{path.stem}")
        for path in sorted((ROOT / "callbacks").glob("*.py"))
        if path.stem != "__init__"
    ]
    found = {
        name
        for module in modules
        for name, value in inspect.getmembers(module, inspect.isclass)
        if issubclass(value, PruningCallback) and value.__module__ == module.__name__
    }
    assert len(found) > 1
    assert {name for name in found if not name.startswith("_")} <= set(prunelight.callbacks.__all__)
    assert all(hasattr(prunelight.callbacks, name) for name in prunelight.callbacks.__all__)
