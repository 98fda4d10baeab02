"""Sparsity on SmolLM2-135M: perplexity of allocations x solvers, and what they cost in F.

    python tests/benchmarks/sparsity.py quality --calibration c4.jsonl --evaluation wiki.test.raw
    python tests/benchmarks/sparsity.py cost

Without files, both texts are those that come with prunelight. F is one forward of the calibration
windows through the whole dense model, taken in turn with what it is compared to.
"""

import argparse
import copy
import statistics
import time
from contextlib import contextmanager

import torch
from common import measuring, told

import prunelight
from prunelight.calibration import layer_walk as walk
from prunelight.calibration.statistics import Hessian, InputNorm
from prunelight.calibration.windows import micro_batches
from prunelight.callbacks import DLP, WeightPruning
from prunelight.models.families.layers import decoder_layers
from prunelight.models.families.matrices import layer_matrices
from prunelight.models.forward import evaluating
from prunelight.models.sizes import parameter_bytes
from prunelight.pruning.sparsity import sparsify
from prunelight.training.text_datamodule import TextDataModule

CPU = torch.device("cpu")
ALLOCATIONS = ("uniform", "owl", "dlp", "dlp_mean")
SOLVERS = ("magnitude", "wanda", "sparsegpt")


def forward(model, windows):
    with evaluating(model):
        for batch in micro_batches(model, windows):
            model(**batch)


def seconds(call):
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def sparse(model, windows, **arguments):
    pruned = copy.deepcopy(model)
    method = WeightPruning(**arguments)
    return prunelight.apply(pruned, method.plan(pruned, windows), windows)


def quality(model, data_of, amounts, allocations, solvers, seeds):
    _, evaluated = data_of(0)
    print(f"dense {prunelight.perplexity(model, evaluated):.2f}", flush=True)
    for amount in amounts:
        for solver in solvers:
            for allocation in allocations:
                found = []
                for seed in range(seeds):
                    windows, _ = data_of(seed)
                    share = {"pattern": amount} if ":" in amount else {"sparsity": float(amount)}
                    model_ = sparse(model, windows, solver=solver, allocation=allocation, **share)
                    found.append(prunelight.perplexity(model_, evaluated))
                print(f"{amount} {solver} {allocation}: {told(found)}", flush=True)


@contextmanager
def timed(sums, owner, name, label):
    """Add the time spent in `owner.name` to sums[label], less what is counted inside it."""
    plain = getattr(owner, name)

    def call(*args, **kwargs):
        before, start = sum(sums.values()), time.perf_counter()
        try:
            return plain(*args, **kwargs)
        finally:
            inside = sum(sums.values()) - before
            sums[label] = sums.get(label, 0.0) + time.perf_counter() - start - inside

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, plain)


def cost(model, windows, rounds, loading):
    layer = decoder_layers(model)[0]
    for solver, goal in (("wanda", 2.5), ("sparsegpt", 4.5)):
        ratios, allocation, splits = [], [], []
        for _ in range(rounds):
            pruned = copy.deepcopy(model)
            unit, _ = seconds(lambda: forward(model, windows))
            method = DLP(sparsity=0.7, solver=solver)
            planned, plan = seconds(lambda: method.plan(pruned, windows))  # noqa: B023
            sums = {}
            with (
                timed(sums, walk.LayerWalk, "forward", "forward"),
                timed(sums, walk.LayerWalk, "__enter__", "enter"),
                timed(sums, InputNorm, "update", "statistics"),
                timed(sums, Hessian, "update", "statistics"),
                timed(sums, sparsify, "_solve", "solve and write"),
            ):
                applied, _ = seconds(lambda: prunelight.apply(pruned, plan, windows))  # noqa: B023
            ratios.append(applied / unit)
            allocation.append(planned / unit)
            sums["load"] = loading
            splits.append({name: round(value / unit, 2) for name, value in sums.items()})
        median = statistics.median
        print(f"{solver}: {median(ratios):.2f} F (goal {goal}); rounds {told(ratios)}")
        print(f"  DLP's allocation {median(allocation):.2f} F (goal 1); rounds {told(allocation)}")
        print("  split in F", splits[ratios.index(sorted(ratios)[len(ratios) // 2])])
        pruned = copy.deepcopy(model)
        with measuring(CPU) as idle:
            pass
        with measuring(CPU) as phase:
            prunelight.apply(pruned, plan, windows)
        above = phase.peak_bytes - idle.peak_bytes
        states = windows.numel() * model.config.hidden_size * model.dtype.itemsize
        hessians = sum(4 * m.in_features**2 for m in layer_matrices(model, 0))  # q, k, v share one
        print(
            f"  memory above the loaded model {above / 1e6:.0f} MB = "
            f"{above / parameter_bytes(model):.2f} checkpoints = "
            f"{above / parameter_bytes(layer):.1f} decoder layers; the states are "
            f"{states / 1e6:.0f} MB, one layer's Hessians at most {hessians / 1e6:.0f} MB",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("quality", "cost"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", help="a text file; default: the bundled sample")
    parser.add_argument("--evaluation", help="a text file; default: the bundled sample")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--validation-samples", type=int, default=32)
    parser.add_argument("--amounts", nargs="*", default=["0.5", "0.7", "2:4"])
    parser.add_argument("--allocations", nargs="*", default=ALLOCATIONS)
    parser.add_argument("--solvers", nargs="*", default=SOLVERS)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    start = time.perf_counter()
    model, tokenizer = prunelight.load(options.model, dtype="bfloat16")
    loading = time.perf_counter() - start

    def data_of(seed):
        files = {"calibration": options.calibration, "validation": options.evaluation}
        data = TextDataModule(
            tokenizer,
            seq_len=options.seq_len,
            num_calibration=options.samples,
            num_validation=options.validation_samples,
            seed=seed,
            **{name: file for name, file in files.items() if file},
        )
        return data.calibration_windows(), data.validation_windows()

    if options.what == "cost":
        cost(model, data_of(0)[0], options.rounds, loading)
    else:
        quality(
            model, data_of, options.amounts, options.allocations, options.solvers, options.seeds
        )


if __name__ == "__main__":
    main()
