"""Every method of the table plans, applies, trains, resumes, saves, reloads and generates."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from math import floor
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import train_ranks
from methods_table import METHODS, VARIANTS, gradually
from runs import SEQ_LEN, local_paths, make_data, make_module, make_trainer, write_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import prunelight
from prunelight.callbacks import (
    DLP,
    ShortGPT,
    SlidingLayerMerging,
    WeightPruning,
    WidthPruning,
)
from prunelight.models.families.matrices import matrices
from prunelight.models.forward import greedy_tokens
from prunelight.planning.plan import planned_sparsity
from prunelight.planning.steps import Sparsify
from prunelight.pruning.sparsity.masks import Pattern
from prunelight.pruning.sparsity.sparsify import amount_of

RECOVERIES = ("lora", "full")
# Methods whose stages are asked by the probes too; one of each kind of result, for the time.
PROBED = ("ShortGPT by number", "sublayers dropped", "width by layer", "SliceGPT", "DLP, gradual")
# Methods that every run of the tests trains whole too: one of each kind of step. A sweep (`-m ""`)
# does so with all.
THOROUGH = (
    "ShortGPT by number",
    "SLM, highest layers",
    "sublayers dropped",
    "width by layer",
    "SliceGPT",
    "DLP, Wanda",
    "DLP, gradual",
)
# Of these, in two processes, which need most time; the plans of two processes are held against one
# in test_processes.py.
SHARED = ("ShortGPT by number", "SliceGPT", "DLP, Wanda", "DLP, gradual")


def chosen_methods(config, names):
    """Return the names of the methods that this run of the tests looks at so."""
    return names if config.option.markexpr == "not sweep" else tuple(METHODS)


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(
    params=[*METHODS, *(pytest.param(name, marks=pytest.mark.sweep) for name in VARIANTS)],
    scope="module",
)
def method(request):
    return {**METHODS, **VARIANTS}[request.param]


@pytest.fixture(params=RECOVERIES, scope="module")
def recovery(request, method):
    thorough = [METHODS[name] for name in chosen_methods(request.config, THOROUGH)]
    if request.param == "full" and method in METHODS.values() and method not in thorough:
        pytest.skip("it is trained by adapters alone, for the time; a sweep trains it whole too")
    return request.param


def fit(method, recovery, name, root, **arguments):
    pl.seed_everything(0, verbose=False)  # adapters start from random numbers
    probes = recovery == "lora" and any(method is METHODS[kind] for kind in PROBED)
    module = make_module(name, recovery=recovery, probes=probes)
    data = make_data(name, root)
    make_trainer(root, method.make()).fit(module, data, weights_only=True, **arguments)
    return AutoModelForCausalLM.from_pretrained(root / "final")


@pytest.fixture(scope="module")
def root(method, recovery, name, tmp_path_factory):
    """Return the directory of a whole run."""
    directory = tmp_path_factory.mktemp("run")
    fit(method, recovery, name, directory)
    return directory


def test_probes_are_asked_of_every_kind_of_result(method, recovery, root):
    if recovery != "lora" or not any(method is METHODS[kind] for kind in PROBED):
        pytest.skip("this run is not probed, for the time")
    stages = json.loads((root / "report.json").read_text())["stages"]
    for stage in stages:
        answers = stage["examined"]
        assert answers["probes"]["sums_2_digits"]["score"] is not None
        assert all(sample["text"] for sample in answers["samples"])
        assert stage["name"] == "dense" or answers["divergence"]["long_text"]["kl_by_position"]


def zeros_of(weight, share, step):
    """Return how many zeros a solver makes where a share of the weight (O, I) is asked for."""
    rows, columns = weight.shape
    if step.solver == "wanda" and step.pattern is None:
        return rows * floor(columns * share + 1e-6)
    return floor(rows * columns * share + 1e-6)


def assert_planned_zeros(model, plans):
    """Check every matrix: number of zeros, and N:M groups."""
    shares, found = planned_sparsity(plans, "model.layers"), matrices(model)
    steps = [step for plan in plans for step in plan.steps if isinstance(step, Sparsify)]
    assert set(shares) == (set(found) if steps else set())
    for name, share in shares.items():
        zero = found[name].parameter == 0
        assert zero.sum() == zeros_of(zero, share, steps[-1])
        amount = amount_of(replace(steps[-1], sparsity=shares), name)
        if isinstance(amount, Pattern):
            assert (zero.view(-1, amount.of).sum(1) == amount.of - amount.kept).all()


def share_of_zeros(model):
    weights = torch.cat([m.parameter.flatten() for m in matrices(model).values()])
    return (weights == 0).double().mean().item()


def test_the_plan_survives_json_and_leads_to_a_model_that_reloads(method, name, tmp_path):
    model, tokenizer = prunelight.load(name)
    windows = make_data(name, tmp_path).calibration_windows()
    plan = method.make().plan(model, windows)
    plan.save(tmp_path / "plan.json")
    assert prunelight.Plan.load(tmp_path / "plan.json") == plan
    model = prunelight.apply(model, plan, windows)
    assert model.config.num_hidden_layers == method.layers
    assert_planned_zeros(model, [plan])
    # Rows of 32 weights round the share down by up to 1 / 32.
    assert share_of_zeros(model) == pytest.approx(method.sparsity or 0, abs=1 / 32)
    prunelight.save(model, tokenizer, tmp_path / "out", plan=plan)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert prunelight.perplexity(again, windows) == prunelight.perplexity(model, windows)


def test_a_fit_prunes_trains_and_leaves_a_model_that_generates(method, name, root):
    final = AutoModelForCausalLM.from_pretrained(root / "final")
    assert final.config.num_hidden_layers == method.layers
    ids = AutoTokenizer.from_pretrained(root / "final")("The river", return_tensors="pt")
    with torch.no_grad():
        uncached = final.generate(**ids, do_sample=False, max_new_tokens=6, use_cache=False)
    cached = greedy_tokens(final, ids["input_ids"], 6)
    assert torch.equal(cached[:, : uncached.shape[1]], uncached)
    report = json.loads((root / "report.json").read_text())
    stages = {stage["name"]: stage for stage in report["stages"]}
    before = "dense" if method.gradual else "pruned"
    assert list(stages) == list(dict.fromkeys(["dense", before, "recovered"]))
    assert stages["recovered"]["perplexity"] < stages[before]["perplexity"]
    assert stages["recovered"]["perplexity"] == pytest.approx(
        prunelight.perplexity(final, make_data(name, root).validation_windows())
    )
    assert stages["recovered"]["linear_sparsity"] == pytest.approx(share_of_zeros(final))
    steps = prunelight.Plan.load(root / "final" / "plan.json").steps
    assert len(report["outcomes"]) == (0 if method.gradual else sum(s.has_outcome for s in steps))


def test_no_directory_of_a_run_holds_a_path_of_this_machine(name, root):
    for directory in (root / "final", *root.glob("pruned-*")):
        assert local_paths(directory, root, Path(name).parent) == []


def test_a_recovery_leaves_exactly_the_planned_zeros(method, root):
    final = AutoModelForCausalLM.from_pretrained(root / "final")
    assert_planned_zeros(final, [prunelight.Plan.load(root / "final" / "plan.json")])
    (base,) = root.glob("pruned-*")
    before, after = (load_file(d / "model.safetensors") for d in (base, root / "final"))
    for name in matrices(final):
        key = f"{name}.weight"
        assert not after[key][before[key] == 0].any()
        assert not torch.equal(after[key], before[key]), "it was not trained"


def test_a_resumed_run_equals_one_that_was_never_stopped(method, recovery, name, root):
    whole = load_file(root / "final" / "model.safetensors")
    (base,) = root.glob("pruned-*/model.safetensors")
    written = base.stat().st_mtime_ns
    parts = fit(method, recovery, name, root, ckpt_path=root / "checkpoints" / "epoch=0.ckpt")
    parts = parts.state_dict()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert base.stat().st_mtime_ns == written, "the base was made again"


@pytest.fixture(scope="module")
def launched(method, request):
    """Skip methods that no two processes fit here."""
    if method not in [METHODS[name] for name in chosen_methods(request.config, SHARED)]:
        pytest.skip("two processes fit one method of each kind, and a sweep the main table")


@pytest.fixture(scope="module")
def group(name, tmp_path_factory, request):
    """Return the directory of the same runs by two processes, all in one launch."""
    directory = tmp_path_factory.mktemp("ranks")
    numbers = {known: str(number) for number, known in enumerate(METHODS)}
    chosen = ",".join(numbers[known] for known in chosen_methods(request.config, SHARED))
    gradual = numbers["DLP, gradual"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    runs = [
        f"ddp:lora:{chosen}",
        f"fsdp2:full:{chosen}",
        f"fsdp2:lora:{gradual}",
        f"fsdp2:full:{gradual}r",
    ]
    if find_spec("bitsandbytes"):
        runs.append("ddp:int8:0")
    done = subprocess.run(
        [*launch, train_ranks.__file__, name, directory, *runs],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return directory


@pytest.mark.slow
def test_two_processes_reach_what_one_reaches(method, recovery, launched, root, group):
    number = list(METHODS.values()).index(method)
    run = group / f"{'ddp' if recovery == 'lora' else 'fsdp2'}-{recovery}-{number}"
    told = json.loads((run / "digests.json").read_text())
    assert len(set(told["digests"])) == 1, "the ranks hold different pruned weights"
    one, two = (
        json.loads((d / "report.json").read_text())["stages"][-1]["perplexity"] for d in (root, run)
    )
    # Sums over two processes round differently, over six steps at a high learning rate.
    assert two == pytest.approx(one, rel=1e-4)
    assert told["validated"] == pytest.approx(two, rel=1e-5)
    assert told["tokenised"] == [["calibration", "train", "validation"], []]
    assert_planned_zeros(
        AutoModelForCausalLM.from_pretrained(run / "final"),
        [prunelight.Plan.load(run / "final" / "plan.json")],
    )


@pytest.mark.slow
def test_sharded_lora_grows_the_same_zeros_and_a_sharded_run_resumes(group):
    number = list(METHODS).index("DLP, gradual")
    perplexities = [
        json.loads((group / f"{strategy}-lora-{number}" / "report.json").read_text())["stages"][-1]
        for strategy in ("ddp", "fsdp2")
    ]
    assert perplexities[1]["perplexity"] == pytest.approx(perplexities[0]["perplexity"], rel=1e-4)
    run = group / f"fsdp2-full-{number}"
    whole = load_file(run / "final-first" / "model.safetensors")
    parts = load_file(run / "final" / "model.safetensors")
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


@pytest.mark.slow
def test_two_processes_train_adapters_over_8_bits_from_one_teacher_cache(group):
    pytest.importorskip("bitsandbytes", reason="pip install 'prunelight[quantization]'")
    run = group / "ddp-int8-0"
    told, report = (json.loads((run / f"{n}.json").read_text()) for n in ("digests", "report"))
    quantized, recovered = report["stages"][-2:]
    assert quantized["name"] == "quantized"
    assert told["validated"] == pytest.approx(recovered["perplexity"], rel=1e-5)
    assert len(list(run.glob("teacher-*/block-*"))) == 2, "each rank asked its own teacher"


COMBINATIONS = {
    "ShortGPT then DLP": lambda: [ShortGPT(num_layers=2), DLP(0.5)],
    "DLP then ShortGPT": lambda: [DLP(0.5), ShortGPT(num_layers=2)],
    "ShortGPT then gradual": lambda: [ShortGPT(num_layers=2), gradually()],
    "gradual then ShortGPT": lambda: [gradually(), ShortGPT(num_layers=2)],
}


@pytest.mark.parametrize("make", COMBINATIONS.values(), ids=COMBINATIONS)
def test_depth_and_sparsity_combine_in_list_order(make, name, tmp_path):
    callbacks = make()
    make_trainer(tmp_path, *callbacks).fit(make_module(name), make_data(name, tmp_path))
    files = [tmp_path / "final" / file for file in ("plan.json", "plan-2.json")]
    plans = [prunelight.Plan.load(file) for file in files]
    assert [plan.method for plan in plans] == [type(c).__name__ for c in callbacks]
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert final.config.num_hidden_layers == 4
    assert_planned_zeros(final, plans)
    if plans[0].method == "ShortGPT":  # else layers with more or fewer zeros are gone
        assert share_of_zeros(final) == pytest.approx(0.5, abs=1 / 32)
    stages = [s["name"] for s in json.loads((tmp_path / "report.json").read_text())["stages"]]
    assert stages == ["dense", "pruned", "recovered"]


INSIDE_LAYERS = {
    "DLP then width": ("lora", lambda: [DLP(0.5), WidthPruning(neuron_ratio=0.25, multiple=8)]),
    "DLP by linear then width": (
        "lora",
        lambda: [DLP(0.5, granularity="linear"), WidthPruning(neuron_ratio=0.25, multiple=8)],
    ),
    "width then DLP": ("full", lambda: [WidthPruning(neuron_ratio=0.25, multiple=8), DLP(0.5)]),
    "zeros then MLPs dropped": (
        "full",
        lambda: [WeightPruning(0.5), ShortGPT(num_layers=2, granularity="mlp")],
    ),
    "MLPs dropped then DLP": (
        "lora",
        lambda: [ShortGPT(num_layers=2, granularity="mlp"), DLP(0.5)],
    ),
    "layers of different widths, then DLP": (
        "lora",
        lambda: [
            ShortGPT(num_layers=1),
            WidthPruning(neuron_ratio=0.25, head_ratio=0.25, multiple=8, allocation="global"),
            DLP(0.5),
        ],
    ),
    "DLP then layers of different widths": (
        "full",
        lambda: [DLP(0.5), WidthPruning(neuron_ratio=0.25, multiple=8, allocation="global")],
    ),
    "merged then width": (
        "lora",
        lambda: [SlidingLayerMerging(num_layers=2), WidthPruning(head_ratio=0.5)],
    ),
}


@pytest.mark.parametrize(("recovery", "make"), INSIDE_LAYERS.values(), ids=INSIDE_LAYERS)
def test_width_sublayers_and_sparsity_combine_and_recovery_keeps_the_zeros(
    recovery, make, name, tmp_path
):
    trainer = make_trainer(tmp_path, *make())
    trainer.fit(make_module(name, recovery=recovery), make_data(name, tmp_path))
    (base,) = tmp_path.glob("pruned-*")
    before, after = (AutoModelForCausalLM.from_pretrained(d) for d in (base, tmp_path / "final"))
    sparse = any(isinstance(callback, WeightPruning) for callback in trainer.callbacks)
    assert share_of_zeros(before) == pytest.approx(0.5 if sparse else 0, abs=0.05)
    trained = matrices(after)
    for path, matrix in matrices(before).items():
        assert not trained[path].parameter[matrix.parameter == 0].any()
        assert not torch.equal(trained[path].parameter, matrix.parameter)


def test_zeros_of_an_earlier_run_are_kept_when_its_result_loses_layers(name, tmp_path):
    sparse, data = WeightPruning(0.5), make_data(name, tmp_path)
    make_trainer(tmp_path, sparse).fit(make_module(name, recovery="none"), data)
    first = str(tmp_path / "final")
    trainer = make_trainer(tmp_path / "next", ShortGPT(num_layers=2))
    trainer.fit(make_module(first), data)
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "next" / "final")
    assert share_of_zeros(final) == 0.5
    files = [tmp_path / "next" / "final" / file for file in ("plan.json", "plan-2.json")]
    assert [prunelight.Plan.load(file).method for file in files] == ["WeightPruning", "ShortGPT"]


def test_two_methods_in_one_run_act_in_list_order(name, tmp_path):
    trainer = make_trainer(tmp_path, ShortGPT(num_layers=2), ShortGPT(ratio=0.5, score="angular"))
    trainer.fit(make_module(name), make_data(name, tmp_path))
    (base,) = tmp_path.glob("pruned-*")
    first, second = (prunelight.Plan.load(base / file) for file in ("plan.json", "plan-2.json"))
    assert (first.model["num_hidden_layers"], second.model["num_hidden_layers"]) == (6, 4)
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert final.config.num_hidden_layers == 2
    assert final.config.max_position_embeddings >= SEQ_LEN
