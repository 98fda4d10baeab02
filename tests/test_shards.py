"""Windows shared out over processes: the same plans and weights as one process makes.

One launch of three processes writes what the ranks found; the tests compare. Two of them go through
the table of methods, with the windows of the tiny runs; all three have uneven shares.
"""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from runs import make_data, make_module, make_trainer, write_model
from safetensors.torch import load_file, save_file
from test_methods import METHODS
from tiny import tiny_model, token_windows
from transformers import AutoModelForCausalLM

import prunelight
from prunelight.analysis import analyze
from prunelight.architecture import matrices
from prunelight.callbacks import DLP, SLEB, ShortenedLlama, ShortGPT, SlidingLayerMerging
from prunelight.callbacks import DynamicSlicing, WidthPruning
from prunelight.evaluation import evaluate
from prunelight.shares import Ranks, SharedWindows, ranks_of, share_windows
from prunelight.statistics import (
    CKA,
    Gram,
    Hessian,
    InputNorm,
    InputVariance,
    MeanCosine,
    exact_median,
)

LIMIT = 400  # seconds for all that the processes do
# Forked, so that all is imported once; from a process that has computed nothing yet.
LAUNCH = """
import sys
sys.path.insert(0, sys.argv[1])
from test_shards import mp, work
mp.start_processes(work, tuple(sys.argv[2:]), nprocs=3, start_method="fork")
"""
# What the table of methods leaves out.
MORE = {
    "SLM by KL": lambda: SlidingLayerMerging(num_layers=2, criterion="kl"),
    "SLEB by CKA": lambda: SLEB(num_layers=1, criterion="cka"),
    "Shortened LLaMA, perplexity": lambda: ShortenedLlama(num_layers=2),
    "width, Taylor": lambda: WidthPruning(neuron_ratio=0.25, score="taylor", multiple=8),
    "width, fluctuation": lambda: WidthPruning(
        neuron_ratio=0.25, score="fluctuation", multiple=8, correction=False
    ),
}
MAKERS = {**{name: method.make for name, method in METHODS.items()}, **MORE}
UNEVEN = {
    "ShortGPT": lambda: ShortGPT(num_layers=2, ignore_first_tokens=2),
    "DLP, SparseGPT": lambda: DLP(0.5, solver="sparsegpt"),
    "DynamicSlicing, sweep": lambda: DynamicSlicing(0.25, round_to=2, embedding="full"),
}


# --- what the processes do


def padded():
    """Seven windows of different lengths, the last one all padding but two tokens."""
    ids = token_windows(7, 40)
    lengths = torch.tensor([40, 33, 40, 21, 40, 7, 2])
    return {"input_ids": ids, "attention_mask": (torch.arange(40) < lengths[:, None]).long()}


def prune(make, model, windows):
    """Return the plan of a method, what its steps did, and the weights that are left."""
    plan, outcomes = make().plan(model, windows), []
    model = prunelight.apply(model, plan, windows, outcomes=outcomes)
    weights = {name: weight.contiguous() for name, weight in model.state_dict().items()}
    return plan, outcomes, weights


def keep(root, name, found, rank=0):
    plan, outcomes, weights = found
    place = root / name
    place.mkdir(exist_ok=True)
    told = {"plan": plan.to_dict(), "outcomes": outcomes}
    (place / f"{rank}.json").write_text(json.dumps(told))
    save_file({n: w.clone() for n, w in weights.items()}, place / f"{rank}.safetensors")


class Failing(ShortGPT):
    """Fails on one rank while the others go on to a sum."""

    def plan(self, model, windows):
        if ranks_of(windows).rank == 1:
            raise ValueError("the disk of this rank is gone")
        return super().plan(model, windows)


def said(call):
    """Return what a call raises."""
    with pytest.raises((ValueError, RuntimeError)) as caught:
        call()
    return f"{type(caught.value).__name__}: {caught.value}"


def work(rank, root, name):
    """All that one process does."""
    torch.set_num_threads(1)
    root = Path(root)
    meet(rank, 3, root / "meeting3")
    ranks = Ranks.of_default_group()
    uneven(rank, root, ranks)
    failures(rank, root, name, ranks)
    dist.destroy_process_group()
    if rank < 2:
        meet(rank, 2, root / "meeting2")
        windows = share_windows(make_data(name, root / "text").calibration_windows())
        for title, make in MAKERS.items():
            keep(root, title, prune(make, prunelight.load(name)[0], windows), rank)
        fit(rank, root, name)
        dist.destroy_process_group()


def meet(rank, size, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=size)


def uneven(rank, root, ranks):
    shared = share_windows(padded(), ranks)
    for title, make in UNEVEN.items():
        keep(root, f"3 {title}", prune(make, tiny_model(), shared), rank)
    quality, seen = evaluate(tiny_model(), shared), analyze(tiny_model(), shared)
    told = {"quality": vars(quality), "analysis": vars(seen)}
    (root / f"measured-{rank}.json").write_text(json.dumps(told))


def failures(rank, root, name, ranks):
    def fail():
        with failing.together():
            Failing(num_layers=1).plan(tiny_model(), share_windows(padded(), failing))

    def disagree():
        ranks.check_same("the fingerprint", "b" if rank == 2 else "a")

    failing = Ranks.of_default_group()
    told = {
        "failing": said(fail),
        "on zero": said(lambda: Ranks.of_default_group().on_zero(lambda: int("x"))),
        "disagree": said(disagree),
        "too few": said(lambda: share_windows(token_windows(2), ranks)),
    }
    (root / f"failures-{rank}.json").write_text(json.dumps(told))


def fit(rank, root, name):
    """Let Lightning prune: it takes over the group that is there."""
    os.environ["LOCAL_RANK"] = str(rank)
    settings = {"devices": 2, "strategy": "ddp"}
    for title in ("made", "reused"):
        data = make_data(name, root / "text", num_validation=2 if title == "reused" else 3)
        module = make_module(name, recovery="none")
        make_trainer(root / "fit", DLP(0.5, solver="sparsegpt"), **settings).fit(module, data)
        torch.save(module.model.state_dict(), root / f"fit-{title}-{rank}.pt")
        if rank == 0:
            (root / f"fit-{title}.json").write_text((root / "fit" / "report.json").read_text())


# --- what the tests compare


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def root(name, tmp_path_factory):
    """Return where the processes wrote what they found."""
    directory = tmp_path_factory.mktemp("ranks")
    (directory / "text").mkdir()
    make_data(name, directory / "text")  # writes the text before any process reads it
    run = [sys.executable, "-c", LAUNCH, str(Path(__file__).parent), str(directory), name]
    process = subprocess.Popen(run, start_new_session=True)
    try:
        assert process.wait(LIMIT) == 0
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return directory


def read(root, name, rank):
    told = json.loads((root / name / f"{rank}.json").read_text())
    plan = prunelight.Plan.from_dict(told["plan"])
    return plan, told["outcomes"], load_file(root / name / f"{rank}.safetensors")


def compare(found, expected):
    """DEBUG"""
    print()
    print("plan equal", found[0] == expected[0], "steps", found[0].steps == expected[0].steps)
    worst, flips, total = 0, 0, 0
    for name, weight in expected[2].items():
        other = found[2][name]
        if other.shape != weight.shape: print("SHAPE", name); continue
        flip = (weight == 0) != (other == 0)
        flips += int(flip.sum()); total += weight.numel()
        d = (weight - other).abs().masked_fill(flip, 0).max() / weight.abs().max()
        worst = max(worst, d.item())
    print("worst", worst, "flips", flips, "of", total)


@pytest.mark.parametrize("title", MAKERS)
def test_two_ranks_plan_and_prune_as_one_process_does(title, root, name):
    windows = make_data(name, root / "text").calibration_windows()
    expected = prune(MAKERS[title], prunelight.load(name)[0], windows)
    first, second = (read(root, title, rank) for rank in range(2))
    compare(first, expected)
    compare(second, first)

@pytest.mark.parametrize("title", UNEVEN)
def test_three(title, root, name):
    expected = prune(UNEVEN[title], tiny_model(), padded())
    for r in range(3): compare(read(root, f"3 {title}", r), expected)

def test_x(root):
    for r in range(3): print((root/f"failures-{r}.json").read_text())
    for r in range(3): print((root/f"measured-{r}.json").read_text())
