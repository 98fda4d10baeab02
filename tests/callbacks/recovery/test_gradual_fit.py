"""Fits in which sparsity rises; recovery/zeros/test_gradual_zeros.py tests the schedule itself."""

import csv
from itertools import pairwise
from math import floor

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from runs import make_data, make_module, make_trainer, write_model
from tiny import token_windows

import prunelight
from prunelight.callbacks import DLP, WeightPruning
from prunelight.models.families.matrices import matrices
from prunelight.pruning.sparsity.masks import Pattern, magnitude_mask
from prunelight.pruning.sparsity.sparsify import amount_of
from prunelight.recovery.zeros.gradual_zeros import Schedule, weights_with_adapters

SCHEDULE = Schedule(1, 5, every=2)  # of six steps: due after 3 and 5
CASES = {
    "wanda": ("full", DLP, {"sparsity": 0.5}),
    "magnitude": ("lora", WeightPruning, {"sparsity": 0.7, "solver": "magnitude"}),
    "mixed 4:8": ("lora", DLP, {"pattern": "4:8", "granularity": "linear", "alpha": 0.2}),
}


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


class Recorder(pl.Callback):
    """Notes after every batch where weights are zero, and after which optimizer step."""

    def __init__(self):
        self.zeros = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        found = pl_module.masks.matrices
        zeros = {name: matrix.parameter.detach() == 0 for name, matrix in found.items()}
        self.zeros.append((trainer.global_step, zeros))


def fit(name, root, callback, recovery="full", module_arguments=None, **arguments):
    pl.seed_everything(0, verbose=False)
    recorder = Recorder()
    trainer = make_trainer(root, callback, recorder, **arguments)
    module = make_module(name, recovery=recovery, **(module_arguments or {}))
    root.mkdir(exist_ok=True)
    trainer.fit(module, make_data(name, root))
    return recorder.zeros, module, trainer


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def run(request, name, tmp_path_factory):
    """Return the directory of a run, what was recorded, and its plan."""
    (recovery, method, arguments), root = request.param, tmp_path_factory.mktemp("run")
    callback = method(**arguments, schedule=SCHEDULE)
    logger = CSVLogger(root, name="logs", version=0)
    zeros, _, _ = fit(name, root, callback, recovery, logger=logger, log_every_n_steps=1)
    return root, zeros, prunelight.Plan.load(root / "final" / "plan.json").steps[0]


def planned(step, name, shape, progress):
    """Return how many zeros a matrix of a llama has at some progress of the schedule."""
    amount, (rows, columns) = amount_of(step, name), shape
    if isinstance(amount, Pattern):
        zeros = floor((amount.of - amount.kept) * progress + 1e-9)
        return rows * columns // amount.of * zeros
    if step.solver == "wanda":
        return rows * floor(columns * amount * progress + 1e-6)
    return floor(rows * columns * amount * progress + 1e-6)


def assert_follows(schedule, zeros, step):
    done = 0
    for global_step, masks in zeros:
        done = global_step if schedule.due(global_step) else done
        for name, mask in masks.items():
            assert mask.sum() == planned(step, name, mask.shape, schedule.progress(done))


def test_zeros_of_a_fit_are_those_of_the_schedule_at_every_step(run):
    _, zeros, step = run
    assert [global_step for global_step, _ in zeros] == [1, 2, 3, 4, 5, 6]
    assert_follows(SCHEDULE, zeros, step)
    assert sum(mask.sum() for mask in zeros[2][1].values()) > 0


def test_masks_of_a_fit_only_shrink_and_are_frozen_after_the_end(run):
    _, zeros, _ = run
    for (_, before), (_, after) in pairwise(zeros):
        assert all(not (before[name] & ~after[name]).any() for name in before)
    (_, at_end), (_, later) = zeros[-2:]
    assert all(torch.equal(at_end[name], later[name]) for name in later)


def test_the_result_has_the_last_masks_and_every_planned_zero(run):
    root, zeros, step = run
    found = matrices(prunelight.load(root / "final")[0])
    assert set(found) == set(step.sparsity)
    for name, matrix in found.items():
        assert torch.equal(matrix.parameter == 0, zeros[-1][1][name])
        amount = amount_of(step, name)
        if isinstance(amount, Pattern):
            groups = (matrix.parameter == 0).view(-1, amount.of)
            assert (groups.sum(1) == amount.of - amount.kept).all()


class Weights(pl.Callback):
    """Notes the weights of the moment, before a callback that comes later changes them."""

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == 3:
            weight, found = weights_with_adapters(pl_module), pl_module.masks.matrices
            self.noted = {name: weight(matrix).clone() for name, matrix in found.items()}


@pytest.mark.parametrize("recovery", ["full", "lora"])
def test_zeros_are_chosen_by_the_weights_of_the_moment(recovery, name, tmp_path):
    weights, recorder = Weights(), Recorder()
    callback = WeightPruning(0.5, solver="magnitude", schedule=SCHEDULE)
    trainer = make_trainer(tmp_path, weights, callback, recorder)
    trainer.fit(make_module(name, recovery=recovery), make_data(name, tmp_path))
    dense, _ = prunelight.load(name)
    share = 0.5 * SCHEDULE.progress(3)
    chosen = {n: magnitude_mask(weight, share) for n, weight in weights.noted.items()}
    at_first = {n: magnitude_mask(m.parameter, share) for n, m in matrices(dense).items()}
    masks = recorder.zeros[2][1]
    assert all(torch.equal(masks[name], chosen[name]) for name in masks)
    assert not all(torch.equal(masks[name], at_first[name]) for name in masks)


def test_the_share_of_zeros_is_logged(run):
    root, zeros, _ = run
    with (root / "logs" / "version_0" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["prune/sparsity"]]
    logged = {int(row["step"]): float(row["prune/sparsity"]) for row in rows}
    assert set(logged) == {2, 4, 5}  # Lightning counts from 0, and repeats the last value
    for index, share in logged.items():
        flat = torch.cat([mask.flatten() for mask in zeros[index][1].values()])
        assert share == pytest.approx(flat.double().mean().item())


def test_steps_are_those_of_the_optimizer_under_gradient_accumulation(name, tmp_path):
    schedule = Schedule(0, 4, every=1)
    callback = DLP(0.5, schedule=schedule)
    arguments = {"accumulate_grad_batches": 2, "limit_train_batches": 4}
    zeros, _, trainer = fit(name, tmp_path, callback, **arguments)
    assert [step for step, _ in zeros] == [0, 1, 1, 2, 2, 3, 3, 4]
    assert trainer.global_step == 4
    assert_follows(schedule, zeros, prunelight.Plan.load(tmp_path / "final" / "plan.json").steps[0])


def test_gradient_checkpointing_leads_to_the_same_masks(name, tmp_path):
    masks = []
    for checkpointing in (False, True):
        arguments = {"gradient_checkpointing": checkpointing}
        callback = DLP(0.5, schedule=SCHEDULE)
        zeros, _, _ = fit(name, tmp_path / str(checkpointing), callback, "full", arguments)
        masks.append((zeros[-1][1], callback.state_dict()["sums"]))
    for (first, squares), (second, others) in [masks]:
        assert all(torch.equal(first[n], second[n]) for n in first)
        for key in squares:
            torch.testing.assert_close(squares[key][0][1], others[key][0][1])


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_adapters_of_other_layouts_follow_the_schedule_too(family, tmp_path):
    name = write_model(tmp_path / "tiny", family)
    callback = WeightPruning(0.5, solver="magnitude", schedule=SCHEDULE)
    zeros, _, _ = fit(name, tmp_path, callback, "lora")
    for step, masks in zeros:
        done = 5 if step == 6 else step if SCHEDULE.due(step) else 3 if step > 3 else 0
        for mask in masks.values():
            experts = mask if mask.ndim == 3 else mask[None]
            expected = floor(experts[0].numel() * SCHEDULE.progress(done) / 2 + 1e-6)
            assert [int(expert.sum()) for expert in experts] == [expected] * len(experts)


def test_zeros_that_a_model_had_before_are_kept_from_the_start(name, tmp_path):
    data, before = make_data(name, tmp_path), DLP(0.5, solver="magnitude")
    make_trainer(tmp_path, before).fit(make_module(name, recovery="none"), data)
    sparse = str(tmp_path / "final")
    first = {n: m.parameter == 0 for n, m in matrices(prunelight.load(sparse)[0]).items()}
    callback = DLP(0.7, schedule=SCHEDULE)
    zeros, _, _ = fit(sparse, tmp_path / "next", callback, "lora")
    for _, masks in zeros:
        assert all(not (first[name] & ~masks[name]).any() for name in first)
    final = matrices(prunelight.load(tmp_path / "next" / "final")[0])
    weights = torch.cat([matrix.parameter.flatten() for matrix in final.values()])
    assert 0.7 - 1 / 32 < (weights == 0).double().mean() < 0.8


class Fails(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 4:
            raise RuntimeError("the disk is full")


def test_a_failed_fit_leaves_no_hooks_behind_and_can_be_started_again(name, tmp_path):
    module, data = make_module(name), make_data(name, tmp_path)
    with pytest.raises(RuntimeError, match="the disk is full"):
        make_trainer(tmp_path, DLP(0.5, schedule=SCHEDULE), Fails()).fit(module, data)
    assert not any(child._forward_pre_hooks for child in module.model.modules())
    make_trainer(tmp_path, DLP(0.5, schedule=SCHEDULE)).fit(module, data)
    assert not any(child._forward_pre_hooks for child in module.model.modules())
    for matrix in matrices(module.model).values():
        assert (matrix.parameter == 0).double().mean() > 0.25


def test_padding_of_training_batches_does_not_count(name, tmp_path):
    data, ids = make_data(name, tmp_path), token_windows(12, 8) % 60
    mask = (torch.arange(8) < 5).long().expand(12, 8)
    rows = [
        {"input_ids": i, "labels": i, "attention_mask": m} for i, m in zip(ids, mask, strict=True)
    ]
    data.train_dataloader = lambda: torch.utils.data.DataLoader(rows, batch_size=2)
    callback = DLP(0.5, schedule=SCHEDULE)
    make_trainer(tmp_path, callback).fit(make_module(name), data)
    sums = callback.state_dict()["sums"]
    assert {tokens for found in sums.values() for tokens, _ in found} == {5 * 2 * 5}  # five steps


class Stops(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, *args):
        trainer.should_stop = trainer.global_step == 3


def test_a_training_that_stops_early_says_that_zeros_are_missing(name, tmp_path, caplog):
    trainer = make_trainer(tmp_path, DLP(0.5, schedule=SCHEDULE), Stops())
    trainer.fit(make_module(name), make_data(name, tmp_path))
    assert "training ended after step 3, before schedule.end_step=5" in caplog.text
    prunelight.load(tmp_path / "final")


@pytest.mark.parametrize(
    ("end_step", "arguments", "message"),
    [
        (7, {}, r"schedule.end_step=7 must not come after the end of training, 6 optimizer steps"),
        (5, {"recovery": "none"}, "recovery='none' must be lora or full"),
        (5, {"keep_zeros": False}, "keep_zeros=False True"),
    ],
)
def test_a_schedule_that_does_not_fit_the_run_is_refused_before_anything_is_written(
    end_step, arguments, message, name, tmp_path
):
    trainer = make_trainer(tmp_path, DLP(0.5, schedule=Schedule(1, end_step)))
    data = make_data(name, tmp_path)
    with pytest.raises(ValueError, match=message):
        trainer.fit(make_module(name, **arguments), data)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize("first", [True, False])
def test_a_schedule_has_the_target_of_its_own_plan_whatever_stands_beside_it(first, name, tmp_path):
    gradual, other = DLP(0.75, schedule=SCHEDULE), WeightPruning(0.25, solver="magnitude")
    methods = [gradual, other] if first else [other, gradual]
    trainer, module = make_trainer(tmp_path, *methods), make_module(name, recovery="full")
    trainer.fit(module, make_data(name, tmp_path))
    assert module.record.stages[-1].linear_sparsity == pytest.approx(0.75, abs=0.03)
