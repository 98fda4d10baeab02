"""Each example runs as a reader starts it: in a fresh process, elsewhere, here on a tiny model."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from functools import cache

import pytest
import torch
from lively_models import lively_model
from runs import write_model
from source_tree import ROOT
from tiny import token_windows
from transformers import AutoModelForCausalLM

import prunelight

EXAMPLES = ROOT / "examples"
TESTED = ["new_method.py", "own_trainer.py", "prune.py", "prune_and_compare.ipynb"]
MOST_LINES = 39  # "in under 40 lines": the class of new_method.py, and the imports that it needs


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    """Six decoder layers."""
    return write_model(tmp_path_factory.mktemp("model"), max_position_embeddings=256)


def environment(**settings):
    """For a process elsewhere: it imports this checkout, whatever is installed."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **settings}


def run(script, directory, *arguments):
    """Run an example in a directory; return what it wrote on both streams."""
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    process = subprocess.run(
        command,
        cwd=directory,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
        check=False,
    )
    assert process.returncode == 0, process.stdout[-4000:]
    return process.stdout


def num_layers(directory):
    """Load a saved model with plain transformers; return how many layers it has."""
    return AutoModelForCausalLM.from_pretrained(directory).config.num_hidden_layers


def report_of(directory):
    return json.loads((directory / "report.json").read_text(encoding="utf-8"))


@cache
def new_method():
    """The module examples/new_method.py."""
    spec = importlib.util.spec_from_file_location("new_method", EXAMPLES / "new_method.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested():
    found = sorted(file.name for file in EXAMPLES.iterdir() if file.is_file())
    assert found == TESTED


# --- prune.py and own_trainer.py --------------------------------------------------------------


def test_prune_removes_a_fifth_of_the_layers_and_saves(name, tmp_path):
    output = run("prune.py", tmp_path, "--model", name)
    assert "removed layers: " in output
    assert num_layers(tmp_path / "smaller") == 5
    assert prunelight.Plan.load(tmp_path / "smaller" / "plan.json").method == "ShortGPT"


@pytest.mark.sweep
@pytest.mark.real
def test_prune_runs_on_its_default_model(smollm2, tmp_path):
    output = run("prune.py", tmp_path)
    before, after = (
        float(line.rpartition(" ")[2])
        for line in output.splitlines()
        if line.startswith("perplexity")
    )
    assert before < after < 10 * before
    assert num_layers(tmp_path / "smaller") == 24


def test_own_trainer_prunes_trains_goes_on_from_a_checkpoint_and_saves(name, tmp_path):
    output = run("own_trainer.py", tmp_path, "--model", name)
    assert "Restored all states from the checkpoint" in output
    assert "layers: 5 epochs: 2" in output
    root = tmp_path / "runs" / "own_trainer"
    assert num_layers(root / "final") == 5
    assert len([*root.glob("pruned-*")]) == 1
    report = report_of(root)
    assert [stage["name"] for stage in report["stages"]] == ["dense", "pruned", "recovered"]
    assert report["recovery"]["mode"] == "MyModule"
    assert report["recovery"]["optimizer_steps"] == 16
    assert report["plans"][0]["calibration"]["num_samples"] == 8


# --- new_method.py ----------------------------------------------------------------------------


def test_a_whole_method_has_less_than_40_lines():
    tree = ast.parse((EXAMPLES / "new_method.py").read_text(encoding="utf-8"))
    (method,) = (node for node in tree.body if isinstance(node, ast.ClassDef))
    used = {node.id for node in ast.walk(method) if isinstance(node, ast.Name)}
    imports = [
        node
        for node in tree.body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        and used & {alias.asname or alias.name for alias in node.names}
    ]
    first = min(node.lineno for node in (method, *method.decorator_list))
    lines = method.end_lineno - first + 1
    lines += sum(node.end_lineno - node.lineno + 1 for node in imports)
    assert lines <= MOST_LINES


def test_new_method_prunes_in_memory_and_in_a_fit(name, tmp_path):
    output = run("new_method.py", tmp_path, "--model", name)
    assert "perplexity without them: " in output
    root = tmp_path / "runs" / "new_method"
    assert num_layers(root / "final") == 4
    (plan,) = report_of(root)["plans"]
    assert plan["method"] == "SmallestUpdate"
    assert plan["arguments"] == {"num_layers": 2}
    assert (root / "layers.png").is_file()


@torch.no_grad()
def test_new_method_scores_the_share_that_a_layer_adds():
    model, windows, states = lively_model(), token_windows(), []
    plan = new_method().SmallestUpdate(num_layers=2).plan(model, windows)
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, args, output: states.append((args[0], output)))
    model(windows, use_cache=False)
    expected = [((y - x).norm(dim=-1) / x.norm(dim=-1)).mean().item() for x, y in states]
    assert plan.scores["update"] == pytest.approx(expected, rel=1e-5)  # sums in another order
    lowest = sorted(range(len(expected)), key=expected.__getitem__)[:2]
    assert sorted(plan.steps[0].layers) == sorted(lowest)


def test_new_method_refuses_to_remove_all_layers():
    with pytest.raises(ValueError, match="num_layers=6 would remove 6 of 6 decoder layers"):
        new_method().SmallestUpdate(num_layers=6).check(lively_model())


# --- prune_and_compare.ipynb ------------------------------------------------------------------


def test_the_notebook_in_git_holds_no_outputs():
    notebook = json.loads((EXAMPLES / "prune_and_compare.ipynb").read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


def test_the_notebook_runs_from_top_to_bottom(name, tmp_path, monkeypatch):
    for package in ("nbclient", "ipykernel"):
        pytest.importorskip(package, reason=f"running a notebook needs pip install {package}")
    import nbformat
    from nbclient import NotebookClient

    for variable, value in environment(PRUNELIGHT_EXAMPLE_MODEL=name).items():
        monkeypatch.setenv(variable, value)
    notebook = nbformat.read(EXAMPLES / "prune_and_compare.ipynb", as_version=4)
    nbformat.validate(notebook)
    client = NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    shown = {kind: value for out in outputs for kind, value in out.get("data", {}).items()}
    assert "image/png" in shown
    table = shown["text/markdown"].splitlines()[2:]
    assert [row.split(" | ")[0] for row in table] == ["| dense", "| ShortGPT", "| ShortenedLlama"]
    assert num_layers(tmp_path / "best-of-two") == 5
