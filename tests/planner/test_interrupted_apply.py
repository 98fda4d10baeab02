"""`apply` keeps the layers that a step has finished in files, for memory and for the next start."""

import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import psutil
import pytest
import torch
from file_limits import files_of_at_most
from killed_at_rename import kill_at_rename
from plans import make_plan
from runs import VARIED_TEXT, write_model
from source_tree import ROOT
from tiny import token_windows
from warm_command import call

from prunelight.cli import main
from prunelight.models.families.matrices import matrices
from prunelight.models.loading import load
from prunelight.models.sizes import parameter_count
from prunelight.planner.applying import goes_to_disk
from prunelight.planning.fingerprints import describe_model
from prunelight.planning.plan import Plan
from prunelight.planning.steps import Sparsify
from prunelight.pruning.apply import apply
from prunelight.pruning.sparsity.sparsify import SOLVERS

# Plan -> arguments of WeightPruning; the last one has two steps, which both keep layers.
SOLVED = {
    "wanda": {"solver": "wanda"},
    "healed": {"solver": "wanda", "heal": "linear"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a model of six layers, a text, and a plan for each of some solvers."""
    place = tmp_path_factory.mktemp("apply")
    write_model(place / "model", dtype=torch.bfloat16)
    (place / "text.txt").write_text(VARIED_TEXT, encoding="utf-8")
    for name, arguments in SOLVED.items():
        method = ["--method", "WeightPruning", "--sparsity", "0.5"]
        method += [word for key, value in arguments.items() for word in (f"--{key}", value)]
        main(["plan", f"{place}/model", *method, *data(place), "--out", f"{place}/{name}"])
    return place


def data(place, seed="3"):
    return [
        *("--data.calibration", str(place / "text.txt"), "--data.seq_len", "32"),
        *("--data.num_calibration", "4", "--data.seed", seed),
    ]


def command(place, solver, out, **changes):
    return [
        "apply",
        f"{place}/model",
        f"{place}/{solver}",
        "--out",
        str(out),
        *data(place, **changes),
    ]


@pytest.fixture(scope="module")
def killed(place, tmp_path_factory):
    """Returns what a killed run of a plan left, copied into a directory where `out` will be."""
    left = {}

    def of(plan, number, directory):
        if plan not in left:
            left[plan] = tmp_path_factory.mktemp("killed")
            kill_at_rename(number, r"layer-.*", command(place, plan, left[plan] / "out"))
            assert not (left[plan] / "out").exists()
        return shutil.copytree(left[plan] / ".out.layers", directory / ".out.layers")

    return of


def check_same(place, plan, directory, **changes):
    """Start the killed command again: it must give the weights of a run that was left to end."""
    out, whole = directory / "out", directory / "whole"
    main(command(place, plan, out, **changes))
    main(command(place, plan, whole, **changes))
    name = "model.safetensors"
    assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert {file.name for file in directory.iterdir()} == {"out", "whole"}


@pytest.mark.parametrize(("plan", "killed_at", "left"), [("wanda", 4, [3]), ("healed", 9, [6, 2])])
def test_a_killed_apply_goes_on_after_its_last_whole_layer(
    place, killed, tmp_path, caplog, plan, killed_at, left
):
    layers = killed(plan, killed_at, tmp_path)
    folders = sorted(layers.glob("step-*"))
    assert [len([*folder.glob("layer-*")]) for folder in folders] == left
    with caplog.at_level("INFO"):
        check_same(place, plan, tmp_path)
    assert f"layers 0-{left[-1] - 1} are finished" in caplog.text


def test_layers_of_other_windows_are_not_taken(place, killed, tmp_path, caplog):
    killed("wanda", 4, tmp_path)
    check_same(place, "wanda", tmp_path, seed="4")
    assert "layers of another computation (windows)" in caplog.text


def test_a_damaged_layer_and_those_after_it_are_computed_again(place, killed, tmp_path, caplog):
    file = killed("wanda", 4, tmp_path) / "step-0" / "layer-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with caplog.at_level("INFO"):
        check_same(place, "wanda", tmp_path)
    assert "layers 0-0 are finished" in caplog.text


def test_a_byte_that_changed_in_a_layer_is_noticed(place, killed, tmp_path, caplog):
    file = killed("wanda", 4, tmp_path) / "step-0" / "layer-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 64  # of the last weight
    file.write_bytes(content)
    with caplog.at_level("INFO"):
        check_same(place, "wanda", tmp_path)
    assert "layer-00001.safetensors is damaged (its bytes are not those that were" in caplog.text
    assert "layers 0-0 are finished" in caplog.text


def test_layers_that_another_attention_computed_are_not_taken(place, killed, tmp_path, caplog):
    killed("wanda", 4, tmp_path)
    main([*command(place, "wanda", tmp_path / "out"), "--attn_implementation", "eager"])
    assert "layers of another computation (attention)" in caplog.text


def test_a_full_disk_while_layers_are_written_is_one_line(place, tmp_path):
    with files_of_at_most(5_000), pytest.raises(SystemExit, match="cannot write .*layer-00000"):
        main(command(place, "wanda", tmp_path / "out"))
    main(command(place, "wanda", tmp_path / "out"))


@pytest.mark.parametrize("solver", SOLVERS)
def test_kept_layers_have_the_weights_and_facts_of_those_in_memory(place, tmp_path, solver):
    results = []
    for scratch in (None, tmp_path / "layers", tmp_path / "layers"):  # the last one finds all
        model, _ = load(place / "model")
        step = Sparsify(dict.fromkeys(matrices(model), 0.5), solver)
        plan = make_plan(model=describe_model(model), steps=(step,))
        outcomes = []
        apply(model, plan, token_windows(), outcomes=outcomes, scratch=scratch)
        results.append((model, outcomes))
    in_memory, outcomes = results[0]
    for model, others in results[1:]:
        assert others == outcomes
        for (name, weight), other in zip(
            in_memory.named_parameters(), model.parameters(), strict=True
        ):
            assert torch.equal(weight, other)
            zeros = name.removesuffix(".weight") in step.sparsity
            assert zeros == (str(tmp_path / "layers") in mapped_from(other))


def mapped_from(tensor):
    """The file that a tensor's memory is mapped from; empty if it is no file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(number, 16) for number in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return " ".join(line.split()[5:])
    return ""


def test_a_disk_without_room_for_layers_holds_them_in_memory(place, monkeypatch, caplog):
    model, _ = load(place / "model")
    plan, places = Plan.load(place / "wanda"), (place / "out", place / ".out.layers")
    size = 2 * parameter_count(model)
    assert goes_to_disk(model, plan, *places, size)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, size + 2**26))
    assert not goes_to_disk(model, plan, *places, size)
    assert "a run that is killed starts anew" in caplog.text
    memory = namedtuple("memory", "available")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(0))
    with pytest.raises(OSError, match="do not fit in memory either"):
        goes_to_disk(model, plan, *places, size)


@pytest.fixture(scope="module")
def depth_plan(place):
    """A plan whose steps write no layers beside the result."""
    file = place / "depth"
    made = ["plan", f"{place}/model", "--method", "ShortGPT", "--num_layers", "1", *data(place)]
    main([*made, "--out", str(file)])
    return file.name


@pytest.mark.parametrize("plan", ["wanda", "depth"])
def test_two_processes_do_not_make_one_directory(place, depth_plan, tmp_path, plan):
    """The lock is that of another process: this one holds it for both of its own."""
    holder = "import sys; from pathlib import Path; from prunelight.runtime.files.directory_lock "
    holder += "import DirectoryLock; lock = DirectoryLock(Path(sys.argv[1])); print(flush=True)"
    with subprocess.Popen(
        [sys.executable, "-c", f"{holder}; input()", str(tmp_path / ".out.layers")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        process.stdout.readline()
        end = call(command(place, plan, tmp_path / "out"))
        process.communicate(b"\n")
    assert end.kind == "one line"
    assert "is in use by process" in end.text
    assert "choose another out" in end.text
