"""What each of three processes does with windows that all of them share.

All three have uneven shares; two of them then go through the table of methods, and through a fit.
"""

import json
import os
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from methods_table import METHODS, VARIANTS
from runs import VARIED_TEXT, make_data, make_module, make_trainer, measure_speed_briefly
from safetensors.torch import save_file
from tiny import tiny_model, token_windows

import prunelight
from prunelight.calibration.cka import CKA
from prunelight.calibration.layer_inputs.input_statistics import InputStatistics
from prunelight.calibration.shared_windows import (
    MICRO_BATCH_TOKENS,
    group_of,
    own_windows,
    share_windows,
)
from prunelight.calibration.statistics import (
    Gram,
    Hessian,
    InputNorm,
    InputVariance,
    MeanCosine,
    exact_median,
)
from prunelight.callbacks import (
    DLP,
    SLEB,
    DynamicSlicing,
    ShortenedLlama,
    ShortGPT,
    SlidingLayerMerging,
    WidthPruning,
)
from prunelight.evaluation.perplexity import evaluate
from prunelight.models.families.matrices import Matrix
from prunelight.pruning.rounding.quantize import quantize_gptq
from prunelight.pruning.sparsity import sparsify
from prunelight.runtime.processes import Job, ProcessGroup
from prunelight.scoring.analysis import analyze

# What the table of methods leaves out.
MORE = {
    "SLM by KL": lambda: SlidingLayerMerging(num_layers=2, criterion="kl"),
    "Shortened LLaMA, perplexity": lambda: ShortenedLlama(num_layers=2),
    "width, Taylor": lambda: WidthPruning(neuron_ratio=0.25, score="taylor", multiple=8),
    "width, fluctuation": lambda: WidthPruning(
        neuron_ratio=0.25, score="fluctuation", multiple=8, correction=False
    ),
}
TABLE = {**METHODS, **VARIANTS}
MAKERS = {**{name: method.make for name, method in TABLE.items()}, **MORE}
UNEVEN = {
    "ShortGPT": lambda: ShortGPT(num_layers=2, ignore_first_tokens=2),
    "SparseGPT": lambda: DLP(0.5, solver="sparsegpt"),
    "sweep": lambda: DynamicSlicing(0.25, round_to=2, embedding="full"),
}
BY_CKA = {
    "SLEB": lambda: SLEB(num_layers=1, criterion="cka"),
    "SLM": lambda: SlidingLayerMerging(num_layers=1, criterion="cka"),
}


def padded():
    """Return seven windows of different lengths: of two, two and three ranks' shares."""
    ids = token_windows(7, 40)
    lengths = torch.tensor([40, 33, 40, 21, 40, 7, 2])
    return {"input_ids": ids, "attention_mask": (torch.arange(40) < lengths[:, None]).long()}


def long():
    """Return windows that fill three micro-batches, so that each rank gets whole ones."""
    windows = token_windows(40, 128)
    assert windows.numel() > 2 * MICRO_BATCH_TOKENS
    return windows


def prune(make, model, windows):
    """Return the plan of a method, what its steps did, and the weights that are left."""
    plan, outcomes = make().plan(model, windows), []
    model = prunelight.apply(model, plan, windows, outcomes=outcomes)
    return plan, outcomes, {name: w.clone() for name, w in model.state_dict().items()}


def quantize(windows):
    """Return the weights and scales of a model that GPTQ rounded."""
    model = tiny_model()
    quantize_gptq(model, windows)
    return {name: w.clone() for name, w in model.state_dict().items()}


PARTS = [slice(0, 20), slice(20, 35), slice(35, 35)]  # of the tokens, a rank


def statistics(parts, group):
    """Return what accumulators say that saw some parts of the tokens, pooled over ranks."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 35, 6, generator=generator) + 3
    pairs = [tokens[:, part] for part in parts]
    kinds = (InputNorm, InputVariance, Hessian, Gram)
    made = [kind(6) for kind in kinds]
    norm, variance, hessian, gram = made
    cosine, cka = MeanCosine(), CKA(2)
    experts = [Matrix(name, torch.nn.Linear(6, 2)) for name in ("first", "second")]
    seen = InputStatistics(experts, Hessian)
    for x, y in pairs:
        cka.update((x, y))
        if len(x):
            cosine.update(x[None], y[None], None, None)
            for one in made:
                one.update(x)
            with seen.watching():
                experts[1].owner(x)
                if len(x) == 20:  # so that only one rank knows the first expert
                    experts[0].owner(y)
    for one in (*made, cosine, cka, seen):
        one.pool(group)
    median = exact_median(lambda: [x.abs() for x, _ in pairs], group)
    return {
        "norms": norm.norms(),
        "mean": variance.mean,
        "variance": variance.variance(),
        "hessian": hessian.result(),
        "gram": gram.result(),
        "cka": cka.result(),
        "experts": torch.stack([seen.of(expert)[0].result() for expert in experts]),
        "numbers": torch.tensor([cosine.result(), cosine.first_result(), median, norm.tokens]),
    }


COSTS = [1.0, 5.0, 1.0, 3.0, 3.0]  # of jobs


def jobs(group):
    """Return which of five jobs this rank did, and what their results are here afterwards."""
    done = []
    results = [torch.zeros(3, 2, dtype=torch.bfloat16).T for _ in COSTS]  # lines are not columns

    def work(index):
        done.append(index)
        results[index].copy_(torch.arange(6).view(2, 3) + 10 * index)

    group.do_shared([Job(cost, [results[i]], partial(work, i)) for i, cost in enumerate(COSTS)])
    return {"done": done, "results": [result.tolist() for result in results]}


# --- what the processes do


def work(rank, root, name):
    """Do all that one of three processes does."""
    measure_speed_briefly()
    torch.set_num_threads(1)
    root = Path(root)
    meet(rank, 3, root)
    group = ProcessGroup.of_default_group()
    assert ProcessGroup.of_default_group()._cpu_group is group._cpu_group, (
        "groups are never closed: one"
    )
    uneven(rank, root, group)
    save_file(statistics([PARTS[rank]], group), root / f"statistics-{rank}.safetensors")
    write(root / f"failures-{rank}.json", failures(rank, group))
    write(root / f"jobs-{rank}.json", jobs(group))
    dist.destroy_process_group()
    if rank < 2:
        meet(rank, 2, root)
        windows = share_windows(varied_windows(name, root))
        for title, make in MAKERS.items():
            keep(root / f"2 {title}", rank, prune(make, prunelight.load(name)[0], windows))
        shared = share_windows(long(), windows.group)
        for title, make in BY_CKA.items():
            keep(root / f"2 {title} by CKA", rank, prune(make, tiny_model(), shared))
        fit(rank, root, name)


def varied_windows(name, root):
    """Windows of many different tokens: of few, solvers turn the rounding of a sum into weights."""
    text = root / "text" / f"varied-{os.getpid()}.txt"
    text.write_text(VARIED_TEXT, encoding="utf-8")
    return make_data(name, root / "text", calibration=str(text)).calibration_windows()


def meet(rank, size, root):
    file = f"file://{root}/meeting-{size}"  # no port may be taken
    dist.init_process_group("gloo", init_method=file, rank=rank, world_size=size)


def write(file, value):
    file.write_text(json.dumps(value))


def keep(place, rank, found):
    plan, outcomes, weights = found
    place.mkdir(exist_ok=True)
    write(place / f"{rank}.json", {"plan": plan.to_dict(), "outcomes": outcomes})
    save_file(weights, place / f"{rank}.safetensors")


def uneven(rank, root, group):
    shared, model = share_windows(padded(), group), tiny_model()
    if find_spec("compressed_tensors"):
        save_file(quantize(shared), root / f"quantized-{rank}.safetensors")
    for title, make in UNEVEN.items():
        with counting_solves() as solves:
            keep(root / f"3 {title}", rank, prune(make, tiny_model(), shared))
        write(root / f"solves {title}-{rank}.json", len(solves))
    rows = own_windows(shared)["input_ids"].tolist()
    quality, seen = vars(evaluate(model, shared)), vars(analyze(model, shared))
    write(root / f"measured-{rank}.json", {"rows": rows, "quality": quality, "analysis": seen})


@contextmanager
def counting_solves():
    """Yield a list that gets an entry for each solve of SparseGPT in this process."""
    solves, plain = [], sparsify.sparsegpt_stacked

    def counted(*args):
        solves.append(len(args[0]))
        return plain(*args)

    sparsify.sparsegpt_stacked = counted
    try:
        yield solves
    finally:
        sparsify.sparsegpt_stacked = plain


class Failing(ShortGPT):
    """Fails on one rank while the others go on to a sum."""

    def plan(self, model, windows):
        if group_of(windows).rank == 1:
            raise ValueError("the disk of this rank is gone")
        return super().plan(model, windows)


def said(call):
    with pytest.raises((ValueError, RuntimeError)) as caught:
        call()
    return f"{caught.type.__name__}: {caught.value}"


def failures(rank, group):
    """Return what each failure raises on this rank."""

    def one_fails():
        failing = ProcessGroup.of_default_group()
        with failing.failing_together(), failing.failing_together():
            Failing(num_layers=1).plan(tiny_model(), share_windows(padded(), failing))

    def one_cannot():
        failing = ProcessGroup.of_default_group()
        with failing.failing_together():
            failing.do_shared([Job(1.0, [], partial(int, text)) for text in ("0", "x", "2")])

    return {
        "one": said(one_fails),
        "job": said(one_cannot),
        "first": said(lambda: ProcessGroup.of_default_group().run_on_rank_zero(lambda: int("x"))),
        "differ": said(lambda: group.check_same("the fingerprint", "b" if rank == 2 else "a")),
        "few": said(lambda: share_windows(token_windows(2), group)),
    }


def fit(rank, root, name):
    """Let Lightning prune in the group that is there already."""
    os.environ["LOCAL_RANK"] = str(rank)

    def run(callback, **arguments):
        settings = {"devices": 2, "strategy": "ddp", "max_epochs": 1, "limit_train_batches": 1}
        module, data = make_module(name), make_data(name, root / "text", **arguments)
        make_trainer(root / "fit", callback, **settings).fit(module, data)

    run(DLP(0.5, solver="sparsegpt"))
    made = (root / "fit" / "report.json").read_text()
    run(DLP(0.5, solver="sparsegpt"), num_validation=2)
    again = (root / "fit" / "report.json").read_text()
    few = said(lambda: run(ShortGPT(num_layers=1), num_calibration=1))
    failed = said(lambda: run(Failing(num_layers=1)))
    alone, data = make_module(name), make_data(name, root / "text")
    settings = {"devices": 2, "strategy": "ddp", "max_epochs": 1, "limit_train_batches": 1}
    make_trainer(root / "plain", **settings).fit(alone, data)
    # Else the second fit of a module starts one on some ranks only, who then wait for the others.
    assert alone.record is not None
    told = {"made": json.loads(made), "again": json.loads(again), "few": few, "failed": failed}
    write(root / f"fit-{rank}.json", told)
