"""What `apply` makes of whole plans: several steps, wrong models, faulty steps."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
from surgery import check_equal, check_unchanged, plan_that_removes, reloaded, snapshot
from tiny import NUM_LAYERS, tiny_model, token_windows

import prunelight
from prunelight.models.families.layers import layers_path
from prunelight.models.families.matrices import matrices
from prunelight.planning.fingerprints import describe_model
from prunelight.planning.plan import Plan, planned_sparsity
from prunelight.planning.steps import STEPS, RemoveLayers, Sparsify, Step
from prunelight.pruning.apply import KINDS
from prunelight.pruning.remove_layers import remove_layers
from prunelight.pruning.sparsity.sparsify import sparsify

WINDOWS = token_windows()


@pytest.mark.parametrize("steps", [[(6,)], [(0,), (7,)], [(0,), (0,)], [(0, 1, 2), (3, 4, 5)]])
def test_a_plan_that_does_not_fit_leaves_the_model_unchanged(steps):
    model = tiny_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"steps\[{len(steps) - 1}\] \(remove_layers\)"):
        prunelight.apply(model, plan_that_removes(model, *steps))
    check_unchanged(model, before)


def test_a_plan_for_another_model_is_refused_and_the_model_unchanged():
    model = tiny_model("llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match="another model: model_type is 'mistral' in the plan"):
        prunelight.apply(model, plan_that_removes(tiny_model("mistral"), (1,)))
    check_unchanged(model, before)


def test_a_plan_applies_to_other_weights_only_if_not_strict():
    plan, tuned = plan_that_removes(tiny_model(), (1, 2)), tiny_model(seed=1)
    before = snapshot(tuned)
    with pytest.raises(ValueError, match="fingerprint .* strict=False"):
        prunelight.apply(tuned, plan)
    check_unchanged(tuned, before)
    expected = copy.deepcopy(tuned)
    remove_layers(expected, [1, 2])
    check_equal(prunelight.apply(tuned, plan, strict=False), expected)


def test_a_plan_is_not_applied_twice():
    model = tiny_model()
    plan = plan_that_removes(model, (1,))
    prunelight.apply(model, plan)
    with pytest.raises(ValueError, match="num_hidden_layers is 6 in the plan and 5 in"):
        prunelight.apply(model, plan)


def test_every_step_of_a_plan_has_an_entry_in_the_table_of_apply():
    assert [*KINDS] == [*STEPS.values()]


def test_a_step_without_an_entry_is_refused_before_the_others_are_carried_out():
    @dataclass(frozen=True)
    class Melt(Step):
        kind: ClassVar[str] = "melt"

    model = tiny_model()
    before = snapshot(model)
    steps = (RemoveLayers((1,)), Melt())
    plan = Plan(method="by hand", arguments={}, model=describe_model(model), steps=steps)
    with pytest.raises(TypeError, match="no surgery is known for the step .*Melt"):
        prunelight.apply(model, plan)
    check_unchanged(model, before)


# --- zeros and removals together --------------------------------------------------------------


REMOVED = (1, 4)


def combined(model, *steps):
    return Plan(method="by hand", arguments={}, model=describe_model(model), steps=steps)


def shares_of(model):
    """A share for each matrix that tells its layer."""
    path = f"{layers_path(model)}."
    indices = {n: int(n.removeprefix(path).partition(".")[0]) for n in matrices(model)}
    return {name: (1 + index) / 8 for name, index in indices.items()}


def zeros_of(model):
    return {n: (m.parameter == 0).double().mean().item() for n, m in matrices(model).items()}


@pytest.mark.parametrize("removed_first", [False, True])
@pytest.mark.parametrize("solver", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "rwkv"])
def test_a_combined_plan_counts_the_layers_of_the_dense_model(family, solver, removed_first):
    model, by_hand = tiny_model(family), tiny_model(family)
    steps = (Sparsify(shares_of(model), solver), RemoveLayers(REMOVED))
    plan, outcomes = combined(model, *(steps[::-1] if removed_first else steps)), []
    assert prunelight.apply(model, plan, WINDOWS, outcomes=outcomes) is model
    planned = planned_sparsity([plan], layers_path(model))
    assert sorted(set(planned.values())) == [
        (1 + i) / 8 for i in range(NUM_LAYERS) if i not in (1, 4)
    ]
    assert zeros_of(model) == pytest.approx(planned, abs=1e-9)
    (outcome,) = outcomes
    assert set(outcome) == {
        "sparsity",
        "layer_sparsity",
        "reconstruction_error",
        "notes",
        "outliers_kept",
    }
    assert len(outcome["layer_sparsity"]) == NUM_LAYERS - len(REMOVED) * removed_first
    # All matrices of a layer have the same planned share here, so the layer has it, too.
    assert sorted(outcome["layer_sparsity"]) == pytest.approx(
        sorted(set(planned.values() if removed_first else shares_of(by_hand).values())), abs=1e-9
    )
    assert outcome["sparsity"] == pytest.approx(
        planned if removed_first else shares_of(by_hand), abs=1e-9
    )
    if removed_first:
        remove_layers(by_hand, REMOVED)
        sparsify(by_hand, Sparsify(planned, solver), WINDOWS)
    else:
        sparsify(by_hand, Sparsify(shares_of(by_hand), solver), WINDOWS)
        remove_layers(by_hand, REMOVED)
    check_equal(model, by_hand)


def test_zeros_in_several_steps_and_plans_are_all_there():
    model, outcomes = tiny_model(), []
    up, down = "model.layers.{}.mlp.up_proj", "model.layers.{}.mlp.down_proj"
    first = combined(
        model,
        Sparsify({up.format(0): 0.5, up.format(3): 0.25}, "wanda"),
        RemoveLayers((2,)),
        Sparsify({down.format(3): 0.5, down.format(2): 0.5}, "magnitude"),  # 2 is gone by now
    )
    prunelight.apply(model, first, WINDOWS, outcomes=outcomes)
    second = combined(model, RemoveLayers((0,)), Sparsify({up.format(4): 0.75}, "sparsegpt"))
    prunelight.apply(model, second, WINDOWS, outcomes=outcomes)
    planned = planned_sparsity([first, second], "model.layers")
    assert planned == {up.format(1): 0.25, down.format(1): 0.5, up.format(3): 0.75}
    assert {name: share for name, share in zeros_of(model).items() if share} == planned
    assert [len(outcome["sparsity"]) for outcome in outcomes] == [2, 1, 1]
    assert [len(outcome["reconstruction_error"]) for outcome in outcomes] == [6, 0, 4]


@pytest.mark.parametrize(
    ("step", "windows", "message"),
    [
        (Sparsify({"lm_head": 0.5}, "wanda"), WINDOWS, "lm_head is no matrix of the decoder"),
        (Sparsify({}, "melt"), WINDOWS, "solver='melt' must be one of"),
        (Sparsify({}, "wanda"), None, "solver='wanda' needs calibration windows; pass them to"),
        (Sparsify({"x": 2}, "wanda"), WINDOWS, r"steps\[1\] \(sparsify\): sparsity=2 of x must"),
    ],
)
def test_a_faulty_sparsify_step_leaves_the_model_unchanged(step, windows, message):
    model = tiny_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        prunelight.apply(model, combined(model, RemoveLayers((1,)), step), windows)
    check_unchanged(model, before)


def test_zeros_survive_the_disk(tmp_path):
    model = tiny_model("mixtral")
    plan = combined(model, Sparsify(shares_of(model), "wanda"), RemoveLayers(REMOVED))
    prunelight.apply(model, plan, WINDOWS)
    assert zeros_of(reloaded(model, tmp_path)) == zeros_of(model)
