"""A plan is carried out whole, or the model stays bit for bit as it was."""

import copy

import pytest
import torch
from drawn import drawn
from tiny import tiny_model, token_windows
from wrong_plans import bits, check_same_bits, try_plan

import prunelight
from prunelight.models.families.layers import layers_path
from prunelight.models.families.matrices import matrices
from prunelight.planning.fingerprints import describe_model
from prunelight.planning.plan import Plan
from prunelight.planning.steps import DropSublayers, MergeLayers, PruneWidth, Sparsify

FAMILIES = ("llama", "qwen3", "gpt2", "mixtral", "gemma2")
WINDOWS = token_windows(8, 16)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("number", [40, pytest.param(200, marks=pytest.mark.sweep)])
def test_a_refused_plan_leaves_the_model_as_it_was(family, number):
    errors = []
    drawn(number)(lambda draw: errors.append(try_plan(draw, family)))()
    assert any(errors)
    assert not all(errors)


def plan_of(model, *steps):
    return Plan("by hand", {}, describe_model(model), steps)


def refuses(model, match, *steps, windows=None):
    before = bits(model)
    with pytest.raises((ValueError, TypeError), match=match):
        prunelight.apply(model, plan_of(model, *steps), windows)
    check_same_bits(before, bits(model))


def test_what_was_dropped_cannot_be_sparsified():
    model = tiny_model()
    name = f"{layers_path(model)}.3.self_attn.q_proj"
    sparsify = Sparsify({name: 0.5}, "magnitude")
    refuses(
        model, r"steps\[1\] \(sparsify\) cannot follow", DropSublayers(attention=(3,)), sparsify
    )


def test_a_pattern_must_divide_the_widths_that_are_left():
    model = tiny_model()
    name = f"{layers_path(model)}.0.mlp.down_proj"
    width = PruneWidth(neurons={str(i): tuple(range(30)) for i in range(6)})
    sparsify = Sparsify({name: 0.5}, "magnitude", "2:4")
    refuses(model, r"steps\[1\] \(sparsify\) cannot follow", width, sparsify)


def test_layers_that_an_earlier_step_made_different_cannot_be_mixed():
    model = tiny_model()
    merge = MergeLayers(((2, 3),), "mean")
    refuses(model, r"steps\[1\] \(merge_layers\) cannot follow", DropSublayers(mlp=(3,)), merge)


def test_windows_that_the_model_cannot_read_are_refused_before_the_first_step():
    model = tiny_model()
    sparsify = Sparsify({next(iter(matrices(model))): 0.5}, "wanda")
    refuses(model, "token id", DropSublayers(mlp=(3,)), sparsify, windows=WINDOWS + 10_000)


def test_a_plan_of_several_steps_is_carried_out_as_before():
    model = tiny_model()
    merged = copy.deepcopy(model)
    steps = (DropSublayers(mlp=(3,)), Sparsify({next(iter(matrices(model))): 0.5}, "wanda"))
    prunelight.apply(model, plan_of(model, *steps), WINDOWS)
    for step in steps:
        prunelight.apply(merged, Plan("by hand", {}, {}, (step,)), WINDOWS)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, merged.state_dict()[name])
