"""Count the options whose change a resume refuses or survives, and the mutants that tests kill.

python tests/reliability/identity.py            # all options of three cases: about 10 minutes
python tests/reliability/identity.py --options 0    # the mutants alone

A mutant is the code that describes and compares runs, with one key of a dictionary or one element
of a set removed, one condition negated, or one comparison turned round. The tests of that code run
on each. A mutant that survives is one that no test would miss.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import io
import os
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType

from rows import ROOT, Row, run

sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import pytest
from option_changes import CLASSES, needlessly_refused, verdicts

from prunelight.run import checkpoints
from prunelight.training.resuming import run_identity

# Module -> functions and tables that are mutated; None: all of it.
MUTATED: dict[ModuleType, tuple[str, ...] | None] = {
    run_identity: None,
    checkpoints: ("check_same_settings", "given_arguments", "check_same_run"),
}
TESTS = ROOT / "tests" / "training" / "test_run_identity.py"
WITHOUT_RUNS = "not (changes_no_weight or is_refused or refused_or_changes)"
SWAPPED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
}


def mutants(tree: ast.Module, names: tuple[str, ...] | None) -> Iterator[tuple[str, ast.Module]]:
    """What was changed, and the changed module, for each small change of the named parts."""
    types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript)
        for inner in ast.walk(node.slice)
    }
    for place, node in enumerate(ast.walk(tree)):
        if id(node) in types:  # dict[str, Any]
            continue
        if names is not None and not _inside(tree, node, names):
            continue
        for what in _changes(node):
            changed = copy.deepcopy(tree)
            twin = [*ast.walk(changed)][place]
            told = _apply(twin, what, changed)
            if told is not None:
                yield (
                    f"line {getattr(node, 'lineno', '?')}: {told}",
                    ast.fix_missing_locations(changed),
                )


def _inside(tree: ast.Module, node: ast.AST, names: tuple[str, ...]) -> bool:
    parts = [part for part in tree.body if getattr(part, "name", None) in names]
    return any(node is inner for part in parts for inner in ast.walk(part))


def _changes(node: ast.AST) -> list[tuple[str, int]]:
    """The changes that a node allows: kind, and which element."""
    if isinstance(node, ast.Dict):
        return [("remove", i) for i in range(len(node.keys))]
    if isinstance(node, ast.Set | ast.Tuple) and isinstance(
        node.ctx if hasattr(node, "ctx") else ast.Load(), ast.Load
    ):
        constants = all(isinstance(e, ast.Constant | ast.Starred | ast.Name) for e in node.elts)
        return [("remove", i) for i in range(len(node.elts))] if constants else []
    if isinstance(node, ast.If | ast.IfExp):
        return [("negate", 0)]
    if isinstance(node, ast.comprehension):
        return [("negate", i) for i in range(len(node.ifs))]
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPPED:
        return [("swap", 0)]
    if isinstance(node, ast.BoolOp):
        return [("swap", 0)]
    return []


def _apply(node: ast.AST, what: tuple[str, int], tree: ast.Module) -> str | None:
    """Change a node in place; return what was done, or None where it is no change of behaviour."""
    kind, index = what
    if kind == "remove" and isinstance(node, ast.Dict):
        key = node.keys.pop(index)
        value = node.values.pop(index)
        return f"no {ast.unparse(key) if key else '**' + ast.unparse(value)}"
    if kind == "remove" and isinstance(node, ast.Set | ast.Tuple):
        return f"no element {ast.unparse(node.elts.pop(index))}"
    if kind == "negate" and isinstance(node, ast.comprehension):
        node.ifs[index] = ast.UnaryOp(ast.Not(), node.ifs[index])
        return f"not {ast.unparse(node.ifs[index].operand)}"
    if kind == "negate" and isinstance(node, ast.If | ast.IfExp):
        told = ast.unparse(node.test)
        node.test = ast.UnaryOp(ast.Not(), node.test)
        return f"not {told}"
    if isinstance(node, ast.BoolOp):
        told = ast.unparse(node)
        node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        return f"and/or in {told}"
    if isinstance(node, ast.Compare):
        told = ast.unparse(node)
        node.ops[0] = SWAPPED[type(node.ops[0])]()
        return f"turned {told}"
    return None


def survives(module: ModuleType, tree: ast.Module) -> bool:
    """Whether the tests pass on a mutant, in a process of its own."""
    process = get_context("fork").Process(target=_test, args=(module, tree))
    process.start()
    process.join(300)
    if process.is_alive():  # it waits for ever: noticed
        process.kill()
        process.join()
    return process.exitcode == 0


def _test(module: ModuleType, tree: ast.Module) -> None:
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    before = dict(vars(module))
    exec(compile(tree, str(module.__file__), "exec"), vars(module))
    for other in [m for name, m in sys.modules.items() if name.startswith("prunelight")]:
        for name, value in list(vars(other).items()):
            if name in before and value is before[name] and other is not module:
                setattr(other, name, vars(module)[name])
    with contextlib.redirect_stdout(io.StringIO()):
        code = pytest.main(
            ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "-k", WITHOUT_RUNS, str(TESTS)]
        )
    os._exit(int(code))


def measure(options: argparse.Namespace) -> list[Row]:
    """Try the options of each case, then the mutants."""
    rows = []
    for case in CLASSES if options.options else ():
        with tempfile.TemporaryDirectory() as root:
            told = verdicts(case, Path(root))
        faults = {name: said for name, said in told.items() if said.startswith("FAULT")}
        faults |= needlessly_refused(told)
        for name, said in faults.items():
            print(f"{case}: {name}: {said}")
        equal = sum(said == "equal" for said in told.values())
        note = f"{equal} change nothing, {len(told) - equal - len(faults)} are refused in one line"
        rows.append(
            Row(f"options changed once on resume, {case}", len(told), len(told) - len(faults), note)
        )
    tried = killed = 0
    for module, names in MUTATED.items():
        for told, tree in mutants(ast.parse(Path(str(module.__file__)).read_text()), names):
            tried += 1
            if survives(module, tree):
                print(f"survives: {module.__name__} {told}", flush=True)
            else:
                killed += 1
            if tried % 20 == 0:
                print(f"{killed} of {tried} mutants killed", flush=True)
    rows.append(Row("mutants of the comparison of runs", tried, killed, "killed by its tests"))
    return rows


if __name__ == "__main__":
    run("identity", measure, options=1)
