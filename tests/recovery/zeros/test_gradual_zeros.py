"""Laws of the schedule and of the masks that follow from it, without a fit."""

from itertools import pairwise

import pytest
import torch
from tiny import tiny_model, token_windows

from prunelight.models.families.matrices import matrices
from prunelight.pruning.sparsity.masks import Pattern, magnitude_mask, wanda_mask
from prunelight.recovery.lora import LoRA, attach_lora, merge_lora
from prunelight.recovery.zeros.gradual_zeros import (
    GradualMasks,
    RunningNorm,
    Schedule,
    weights_with_adapters,
)
from prunelight.recovery.zeros.masked_lora import mask_adapters
from prunelight.runtime.processes import ProcessGroup

# --- the schedule


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start_step": -1, "end_step": 2}, "start_step=-1 must be at least 0"),
        ({"start_step": 3, "end_step": 3}, "start_step=3 must be at least 0 and below end_step=3"),
        ({"start_step": 0, "end_step": 9, "every": 0}, "schedule.every=0 must be at least 1"),
        ({"start_step": 0, "end_step": 9, "curve": "sine"}, "curve='sine' must be one of cubic, l"),
    ],
)
def test_a_schedule_out_of_range_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**arguments)


@pytest.mark.parametrize("curve", ["cubic", "linear"])
def test_progress_rises_from_nothing_at_the_start_to_all_at_the_end(curve):
    schedule = Schedule(3, 17, curve=curve)
    progress = [schedule.progress(step) for step in range(25)]
    assert progress[:4] == [0.0] * 4
    assert progress[17:] == [1.0] * 8
    assert all(low < high for low, high in pairwise(progress[3:18]))


def test_a_cubic_schedule_is_ahead_of_a_linear_one():
    cubic, linear = (Schedule(3, 17, curve=curve) for curve in ("cubic", "linear"))
    assert all(cubic.progress(step) > linear.progress(step) for step in range(4, 17))
    assert linear.progress(10) == pytest.approx(1 / 2)
    assert cubic.progress(10) == pytest.approx(1 - 1 / 8)


def test_zeros_are_due_every_few_steps_and_at_the_end():
    schedule = Schedule(2, 9, every=3)
    assert [step for step in range(20) if schedule.due(step)] == [5, 8, 9]
    assert [step for step in range(20) if Schedule(2, 8, every=3).due(step)] == [5, 8]
    assert [step for step in range(20) if Schedule(0, 4, every=9).due(step)] == [4]


# --- the masks

HALFWAY = Schedule(0, 2, every=1, curve="linear")  # half of the zeros after step 1


class Masks:
    """The masks so far of a model's matrices, as a run keeps them."""

    def __init__(self, model, amount, solver="wanda"):
        self.found = matrices(model)
        pairs = {name: (matrix, amount) for name, matrix in self.found.items()}
        self.gradual = GradualMasks(pairs, HALFWAY, solver, ProcessGroup())
        self.kept = {n: torch.ones_like(m.parameter).bool() for n, m in self.found.items()}

    def see(self, model, ids, mask=None):
        with torch.no_grad(), self.gradual.watching(mask):
            model(ids, use_cache=False)

    def after(self, step, weight=lambda matrix: matrix.parameter):
        self.kept = dict(self.gradual.masks(step, self.kept.__getitem__, weight))
        return self.kept


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("amount", [0.5, Pattern(2, 4)], ids=str)
def test_masks_of_one_batch_are_those_of_the_solver_and_those_before_shrink(family, amount):
    model, batch = tiny_model(family), token_windows(8, 16)
    for solver in ("wanda", "magnitude"):
        masks = Masks(model, amount, solver)
        masks.see(model, batch)
        half = masks.after(1)
        whole = masks.after(2)
        for name, matrix in masks.found.items():
            assert not (whole[name] & ~half[name]).any()
            parts = zip(matrix.views(), matrix.views(whole[name]), strict=True)
            for index, (view, kept) in enumerate(parts):
                if solver == "wanda":
                    norms = masks.gradual._input_norms.of(matrix)[index].norms()
                    expected = wanda_mask(view, norms, amount)
                else:
                    expected = magnitude_mask(view, amount)
                assert torch.equal(~kept, expected)


@pytest.mark.parametrize("solver", ["wanda", "magnitude"])
def test_once_pruned_always_pruned_even_if_scores_would_change_it(solver):
    model = tiny_model()
    masks = Masks(model, 0.5, solver)
    masks.see(model, token_windows(2, 16))
    half = masks.after(1)
    masks.see(model, token_windows(2, 16, seed=1))
    reverse = masks.after(2, lambda matrix: 1 / matrix.parameter)
    for name, mask in half.items():
        assert not (reverse[name] & ~mask).any()
        assert (~mask).sum() == mask.numel() / 4
        assert (~reverse[name]).sum() == mask.numel() / 2


def test_running_norms_forget_older_batches():
    norm = RunningNorm(3)
    first, second = torch.randn(5, 3), torch.randn(4, 3)
    norm.update(first)
    norm.update(second)
    expected = 0.9 * first.square().sum(0) + second.square().sum(0)
    torch.testing.assert_close(norm.norms(), expected.sqrt())


def test_norms_ignore_padding():
    model, ids = tiny_model(), token_windows(3, 12)
    padded = torch.cat([ids, torch.full((3, 9), 7)], dim=1)
    mask = torch.arange(21).expand(3, 21) < 12
    plain, ignoring, counting = (Masks(model, 0.5) for _ in range(3))
    plain.see(model, ids)
    ignoring.see(model, padded, mask)
    counting.see(model, padded)
    kept, same_kept, other = (masks.after(1) for masks in (plain, ignoring, counting))
    assert all(torch.equal(kept[name], same_kept[name]) for name in kept)
    assert not all(torch.equal(kept[name], other[name]) for name in kept)


def test_running_norms_go_on_from_a_checkpoint(tmp_path):
    model = tiny_model("mixtral")
    whole, first, second = (Masks(model, 0.5) for _ in range(3))
    batches = token_windows(2, 8), token_windows(2, 8, seed=1)
    for batch in batches:
        whole.see(model, batch)
    first.see(model, batches[0])
    torch.save(first.gradual.state_dict(), tmp_path / "state.pt")
    second.gradual.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    second.see(model, batches[1])
    kept, resumed = whole.after(1), second.after(1)
    assert all(torch.equal(kept[name], resumed[name]) for name in kept)


class TwoRanks(ProcessGroup):
    """This rank and one that has seen three times as much."""

    def __init__(self):
        super().__init__()
        self.size = 2

    def sum(self, values):
        return 4 * values


def test_a_checkpoint_holds_the_running_norms_of_all_processes_not_those_of_the_first():
    model, ids = tiny_model(), token_windows(2, 8)
    alone, two = Masks(model, 0.5), Masks(model, 0.5)
    two.gradual.group = TwoRanks()
    for masks in (alone, two):
        masks.see(model, ids)
    mine, mean = (masks.gradual.state_dict()["sums"] for masks in (alone, two))
    for name, found in mine.items():
        assert torch.equal(mean[name][0][1], 2 * found[0][1])


def test_experts_seen_by_one_process_only_are_pruned_alike_on_both():
    model = tiny_model("mixtral", num_local_experts=8)
    group = [Masks(model, 0.5), Masks(model, 0.5)]
    for masks, ids in zip(group, token_windows(2, 3).split(1), strict=True):
        masks.see(model, ids)
    sums = [[], []]
    for masks, mine in zip(group, sums, strict=True):
        masks.gradual._input_norms.reduce(lambda x, mine=mine: mine.append(x) or x)
    means = [(a + b) / 2 for a, b in zip(*sums, strict=True)]
    for masks in group:
        rest = iter(means)
        masks.gradual._input_norms.reduce(lambda _, rest=rest: next(rest))
    first, second = (masks.after(1) for masks in group)
    unseen = [[bool((x == 0).all()) for x in mine] for mine in sums]
    assert unseen[0] != unseen[1]  # or the test would prove nothing
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_weights_with_adapters_are_those_that_merging_leaves(family):
    model = tiny_model(family)
    found = matrices(model)
    with torch.no_grad():
        for matrix in found.values():
            matrix.parameter[..., ::3] = 0
    wrapped = attach_lora(model, LoRA(r=2))
    mask_adapters(wrapped, found)
    torch.manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    weight = weights_with_adapters(wrapped)
    adapted = {name: weight(matrix) for name, matrix in found.items()}
    assert all((adapted[name][..., ::3] == 0).all() for name in found)
    merged = matrices(merge_lora(wrapped))
    for name, matrix in merged.items():
        torch.testing.assert_close(adapted[name], matrix.parameter)
