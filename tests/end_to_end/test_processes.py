"""Windows shared out over processes: the same plans and weights as one process makes.

One launch of three processes (support/prune_ranks.py) writes what the ranks found, and the tests
compare.
"""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import prune_ranks
import pytest
import torch
from prune_ranks import (
    BY_CKA,
    COSTS,
    MAKERS,
    PARTS,
    UNEVEN,
    jobs,
    long,
    padded,
    prune,
    quantize,
    statistics,
    varied_windows,
)
from runs import make_data, write_model
from safetensors.torch import load_file
from tiny import tiny_model, token_windows

import prunelight
from prunelight.calibration.shared_windows import (
    group_of,
    own_windows,
    share_windows,
)
from prunelight.callbacks import (
    DLP,
)
from prunelight.evaluation.perplexity import evaluate
from prunelight.planning.steps import Sparsify
from prunelight.runtime.processes import ProcessGroup
from prunelight.scoring.analysis import analyze

LIMIT = 400  # seconds for all that the processes do, on a busy machine
# Forked, so that all is imported once; from a process that has computed nothing yet.
LAUNCH = """
import sys
import torch.multiprocessing
sys.path.insert(0, sys.argv[1])
from prune_ranks import work
torch.multiprocessing.start_processes(work, sys.argv[2:], nprocs=3, start_method="fork")
"""


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def root(name, tmp_path_factory):
    """Return where the processes wrote what they found."""
    directory = tmp_path_factory.mktemp("ranks")
    (directory / "text").mkdir()
    run = [
        sys.executable,
        "-c",
        LAUNCH,
        str(Path(prune_ranks.__file__).parent),
        str(directory),
        name,
    ]
    process = subprocess.Popen(run, start_new_session=True)
    try:
        assert process.wait(LIMIT) == 0
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return directory


def numbers(root, title, size):
    return [json.loads((root / f"{title}-{rank}.json").read_text()) for rank in range(size)]


# Solvers in which the rounding of a sum grows: ADMM may keep other places, training ends elsewhere.
# Errors then differ by up to 15 % (on two kinds of CPU).
UNSTEADY = ("ALPS", "2:4, ALPS", "2:4, ALPS, swapped", "Wanda, layers trained")


def assert_pruned_alike(places, size, expected, *, scores_too=True, unsteady=False):
    """Compare plan, outcomes and weights of all ranks with those of one process."""
    plan, outcomes, weights = expected
    told = [json.loads((places / f"{rank}.json").read_text()) for rank in range(size)]
    found = [load_file(places / f"{rank}.safetensors") for rank in range(size)]
    assert all(one["plan"] == told[0]["plan"] for one in told)
    assert all(torch.equal(one[key], found[0][key]) for one in found for key in weights)
    shared = prunelight.Plan.from_dict(told[0]["plan"])
    assert [without_shares(s) for s in shared.steps] == [without_shares(s) for s in plan.steps]
    for one, other in zip(shared.steps, plan.steps, strict=True):
        if isinstance(one, Sparsify):
            assert one.sparsity == pytest.approx(other.sparsity, abs=1e-6)
    assert shared.calibration == plan.calibration
    for key, scores in plan.scores.items() if scores_too else ():
        # Redundancies of single cuts stretch a narrow range of perplexities, and their rounding.
        stretched = key == "layer_redundancy" and "single_cut" in plan.scores
        assert_close(list(shared.scores[key]), list(scores), rel=1e-3 if stretched else 1e-4)
    for one, other in zip(told[0]["outcomes"], outcomes, strict=True):
        assert_close(one, other, rel=0.25 if unsteady else 1e-3)
    flipped = 0  # near-ties among what becomes zero
    for key, weight in weights.items() if not unsteady else ():
        other = found[0][key]
        flips = (weight == 0) != (other == 0)
        flipped += int(flips.sum())
        largest = 2e-4 * weight.abs().max().item()
        torch.testing.assert_close(other[~flips], weight[~flips], rtol=0, atol=largest)
    assert flipped <= 4


def assert_close(found, expected, rel=1e-5):
    """Compare JSON values."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, list):
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other, rel)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=rel, abs=1e-6)
    else:
        assert found == expected


def without_shares(step):
    """Return a step without what may differ in its last digits."""
    return replace(step, sparsity={}) if isinstance(step, Sparsify) else step


@pytest.mark.parametrize("title", MAKERS)
def test_two_ranks_plan_and_prune_as_one_process_does(title, root, name):
    expected = prune(MAKERS[title], prunelight.load(name)[0], varied_windows(name, root))
    # These windows are less than a micro-batch: half of them give CKA other kernels.
    other = getattr(MAKERS[title](), "criterion", None) == "cka"
    unsteady = title in UNSTEADY
    assert_pruned_alike(root / f"2 {title}", 2, expected, scores_too=not other, unsteady=unsteady)


@pytest.mark.parametrize("title", UNEVEN)
def test_three_ranks_with_uneven_shares_prune_as_one_process_does(title, root):
    assert_pruned_alike(root / f"3 {title}", 3, prune(UNEVEN[title], tiny_model(), padded()))


@pytest.mark.parametrize("title", BY_CKA)
def test_cka_is_that_of_one_process_where_ranks_have_whole_micro_batches(title, root):
    expected = prune(BY_CKA[title], tiny_model(), long())
    assert_pruned_alike(root / f"2 {title} by CKA", 2, expected)


def test_ranks_feed_every_window_once_and_measure_what_one_process_does(root):
    told, model = numbers(root, "measured", 3), tiny_model()
    assert [len(one["rows"]) for one in told] == [2, 2, 3]
    assert [row for one in told for row in one["rows"]] == padded()["input_ids"].tolist()
    quality, seen = vars(evaluate(model, padded())), vars(analyze(model, padded()))
    for one in told:
        assert one["quality"] == pytest.approx(quality, rel=1e-6)
        one["analysis"]["cka"] = seen["cka"]  # else of others: this text is one micro-batch
        assert_close(one["analysis"], seen)


@pytest.mark.parametrize("rank", range(3))
def test_pooled_statistics_are_those_of_all_tokens(rank, root):
    found = load_file(root / f"statistics-{rank}.safetensors")
    expected = statistics(PARTS, ProcessGroup())
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 7, 64, 65, 200])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("unit", [1, 16])
def test_shares_are_neighbours_of_whole_units_that_leave_out_none(count, size, unit):
    shares = []
    for rank in range(size):
        group = ProcessGroup()
        group.rank, group.size = rank, size
        shares.append(group.rows(count, unit))
    assert [i for rows in shares for i in range(rows.start, rows.stop)] == list(range(count))
    whole = count > unit * (size - 1)
    assert all(rows.start % unit == 0 for rows in shares if whole)
    if count >= size:
        assert all(rows.start < rows.stop for rows in shares)


def test_one_failing_rank_ends_all_with_its_error(root):
    told = numbers(root, "failures", 3)
    reason = "the disk of this rank is gone"
    theirs = f"RuntimeError: rank 1 failed: {reason}"
    assert [one["one"] for one in told] == [theirs, f"ValueError: {reason}", theirs]
    reason = "invalid literal for int() with base 10: 'x'"
    theirs = f"RuntimeError: rank 0 failed: {reason}"
    assert [one["first"] for one in told] == [f"ValueError: {reason}", theirs, theirs]
    for one in told:
        assert one["differ"].startswith(
            "ValueError: the fingerprint is a on rank 0 and b on rank 2; give all ranks the same"
        )
        assert one["few"].startswith("ValueError: 2 windows cannot be shared by 3 ranks, each")


def test_a_fit_of_two_processes_prunes_together_and_ends_together(root, name):
    first, second = numbers(root, "fit", 2)
    windows = make_data(name, root / "text").calibration_windows()
    dense, _ = prunelight.load(name)
    quality = evaluate(dense, make_data(name, root / "text").validation_windows())
    stages = first["made"]["stages"]
    assert [stage["name"] for stage in stages] == ["dense", "pruned", "recovered"]
    assert stages[0]["perplexity"] == pytest.approx(quality.perplexity, rel=1e-6)
    (base,) = (root / "fit").glob("pruned-*")
    plan, _, weights = prune(lambda: DLP(0.5, solver="sparsegpt"), dense, windows)
    saved = load_file(base / "model.safetensors")
    for key, weight in saved.items():
        torch.testing.assert_close(weight, weights[key], rtol=0, atol=2e-4)
    assert json.loads((base / "plan.json").read_text())["calibration"] == plan.calibration
    # With other held-out text the base is used again, and measured again.
    assert all(cost["reused"] for cost in first["again"]["costs"] if "apply" in cost["name"])
    assert first["again"]["evaluation"]["num_samples"] == 2
    assert first["failed"] == "RuntimeError: rank 1 failed: the disk of this rank is gone"
    assert second["failed"] == "ValueError: the disk of this rank is gone"
    for one in (first, second):
        assert one["few"].startswith("ValueError: 1 windows cannot be shared by 2 ranks, each")


def test_each_job_is_done_by_one_rank_and_its_results_are_given_to_all(root):
    told = numbers(root, "jobs", 3)
    assert [one["done"] for one in told] == [[1], [0, 3], [2, 4]]  # loads of 5, 4 and 4
    alone = jobs(ProcessGroup())
    assert alone["done"] == [*range(len(COSTS))]
    assert all(one["results"] == alone["results"] for one in told)


def test_each_matrix_is_solved_by_one_rank(root):
    solves = numbers(root, "solves SparseGPT", 3)
    assert sum(solves) == 6 * 4  # q, k and v share a solve, and gate and up
    assert min(solves) >= 6  # of four a layer, the longest is done by a rank of its own


def test_a_job_that_fails_ends_all_ranks(root):
    reason = "invalid literal for int() with base 10: 'x'"
    theirs = f"RuntimeError: rank 1 failed: {reason}"
    assert [one["job"] for one in numbers(root, "failures", 3)] == [
        theirs,
        f"ValueError: {reason}",
        theirs,
    ]


def test_ranks_round_weights_together_as_one_process_does(root):
    pytest.importorskip("compressed_tensors", reason="pip install 'prunelight[gptq]'")
    found = [load_file(root / f"quantized-{rank}.safetensors") for rank in range(3)]
    expected, rounded_otherwise, rounded = quantize(padded()), 0, 0
    for key, weight in expected.items():
        assert all(torch.equal(one[key], found[0][key]) for one in found)
        if "layers" in key and key.endswith("proj.weight"):
            rounded_otherwise += int((found[0][key] - weight).abs().gt(1e-4).sum())
            rounded += weight.numel()
        else:
            torch.testing.assert_close(found[0][key], weight, rtol=0, atol=1e-6)
    assert rounded_otherwise <= 1e-3 * rounded  # a sum's last digits decide near-ties


def test_windows_that_are_not_shared_belong_to_one_process_alone():
    windows = token_windows(2)
    assert group_of(windows).size == 1
    assert own_windows(windows) is windows
    assert share_windows(windows) is windows  # no process group
    assert ProcessGroup().sum(windows) is windows
