"""The house as drawn: which folder may import which, how full a folder is, who knows Lightning."""

import importlib
import inspect
from collections import Counter
from functools import cache

import pytest
from source_tree import ROOT, imported

import prunelight.callbacks
from prunelight.callbacks import PruningCallback

# From the ground up: a folder imports from itself and from folders with a lower number.
FLOORS = {
    "losses": 0,
    "version": 0,
    "quiet_libraries": 0,
    "one_line_errors": 0,
    "runtime": 1,
    "planning": 2,
    "data": 2,
    "models": 3,
    "config_files": 4,
    "calibration": 4,
    "scoring": 5,
    "evaluation": 5,
    "pruning": 6,
    "export": 7,
    "recovery": 7,
    "run": 8,
    "training": 9,
    "callbacks": 10,
    "comparison": 11,
    "parse_errors": 11,
    "planner": 12,
    "verbs": 12,
    "commands": 13,
    "lightning_cli": 14,
    "cli": 15,
}
WITH_LIGHTNING = {"training", "callbacks", "comparison", "parse_errors", "lightning_cli"}
# Parts of the run that speak with a Trainer.
RUN_WITH_LIGHTNING = {"measurements.py", "strategies.py"}
MOST_FILES = 9  # of a folder, beside __init__.py
MOST_ARROWS = 119  # between folders
FILES = sorted(
    file
    for folder in ("prunelight", "callbacks")
    for file in (ROOT / folder).rglob("*.py")
    if file not in (ROOT / "prunelight" / "__init__.py", ROOT / "prunelight" / "moved.py")
)


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "prunelight" else ("prunelight", *parts)
    return ".".join(parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def folder_of(module):
    """The top folder (or file) of a module: prunelight.pruning.slicing.basis -> pruning."""
    return module.split(".")[1]


@cache
def imports_of(module):
    """Our own modules that a module imports."""
    found = set()
    for name in imported(MODULES[module].read_text(encoding="utf-8")):
        target = name if name in MODULES else name.rpartition(".")[0]
        if target in MODULES and target != module:
            found.add(target)
    return frozenset(found)


def test_imports_are_found_wherever_they_stand():
    source = (
        "import a.b\ndef f():\n    from prunelight.plan import Plan\n    from c import d as e\n"
    )
    assert list(imported(source)) == ["a.b", "prunelight.plan.Plan", "c.d"]


def test_every_folder_has_a_floor():
    assert {folder_of(module) for module in MODULES} == set(FLOORS)


@pytest.mark.parametrize("module", MODULES)
def test_a_folder_imports_only_from_folders_below_it(module):
    own = folder_of(module)
    for target in imports_of(module):
        other = folder_of(target)
        assert own == other or FLOORS[other] < FLOORS[own], f"{module} imports {target}"


@pytest.mark.parametrize("module", MODULES)
def test_no_module_imports_from_the_package_itself(module):
    names = set(imported(MODULES[module].read_text(encoding="utf-8")))
    faces = {name for name in names if name.rpartition(".")[0] == "prunelight"}
    assert faces <= {*MODULES}


def test_no_module_imports_itself_through_others():
    done = set()

    def visit(module, trail):
        assert module not in trail, " -> ".join((*trail, module))
        for target in imports_of(module) if module not in done else ():
            visit(target, (*trail, module))
        done.add(module)

    for module in MODULES:
        visit(module, ())


def test_the_folders_have_few_arrows_between_them():
    arrows = {
        (folder_of(module), folder_of(target))
        for module in MODULES
        for target in imports_of(module)
    }
    assert len({(a, b) for a, b in arrows if a != b}) <= MOST_ARROWS


def test_no_folder_holds_more_files_than_a_reader_can_survey():
    counts = Counter(path.parent for path in FILES if path.name != "__init__.py")
    counts.pop(ROOT / "callbacks")  # one file a method
    assert {str(folder): n for folder, n in counts.items() if n > MOST_FILES} == {}


@pytest.mark.parametrize("module", MODULES)
def test_lightning_stays_where_it_is_needed(module):
    path = MODULES[module]
    if folder_of(module) in WITH_LIGHTNING or path.name in RUN_WITH_LIGHTNING:
        return
    roots = {name.split(".")[0] for name in imported(path.read_text(encoding="utf-8"))}
    assert not roots & {"lightning", "pytorch_lightning", "lightning_fabric"}


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
