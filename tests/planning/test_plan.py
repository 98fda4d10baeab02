"""Plans and their steps: what is written, read again, and refused."""

import json
import re

import pytest
import torch
from plans import make_plan, plan_for
from tiny import tiny_model, token_windows

import prunelight
from prunelight.callbacks import ShortGPT
from prunelight.planning.fingerprints import (
    describe_model,
)
from prunelight.planning.plan import Plan, planned_sparsity
from prunelight.planning.steps import (
    DropSublayers,
    MergeLayers,
    PruneWidth,
    RemoveExperts,
    RemoveLayers,
    Sparsify,
    renumbered,
    step_from_dict,
)


def written(directory, **changes):
    """Write a plan's JSON with some keys changed (None removes a key) and return the path."""
    keys = {**make_plan().to_dict(), **changes}
    path = directory / "plan.json"
    path.write_text(json.dumps({k: v for k, v in keys.items() if v is not None}))
    return path


def test_plan_to_json_to_plan_is_the_same_plan():
    assert Plan.from_dict(json.loads(json.dumps(make_plan().to_dict()))) == make_plan()


def test_json_to_plan_to_json_is_the_same_json():
    text = json.dumps(make_plan().to_dict())
    assert json.dumps(Plan.from_dict(json.loads(text)).to_dict()) == text


def test_a_saved_plan_loads_equal_and_leaves_no_other_file(tmp_path):
    path = tmp_path / "plan.json"
    make_plan().save(path)
    assert Plan.load(path) == Plan.load(str(path)) == make_plan()
    assert list(tmp_path.iterdir()) == [path]


def test_a_real_plan_survives_the_disk(tmp_path):
    plan = ShortGPT(num_layers=2, protected=[0]).plan(tiny_model(), token_windows())
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_a_plan_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "plan.json"
    make_plan().save(path)
    with pytest.raises(TypeError, match="not JSON serializable"):
        make_plan(arguments={"ratio": torch.ones(1)}).save(path)
    assert Plan.load(path) == make_plan()
    assert list(tmp_path.iterdir()) == [path]


def test_the_json_form_is_the_documented_one():
    value = make_plan().to_dict()
    assert value["format"] == 1
    assert value["steps"] == [
        {"kind": "remove_layers", "layers": [1, 3]},
        {"kind": "remove_layers", "layers": [4]},
    ]


def test_keys_with_defaults_may_be_left_out(tmp_path):
    plan = Plan.load(written(tmp_path, calibration=None, scores=None, versions=None))
    assert plan.calibration == {}
    assert plan.scores == {}
    assert plan.versions["prunelight"] == prunelight.__version__
    assert set(plan.versions) == {"prunelight", "torch", "transformers"}


def test_the_order_of_layers_in_a_step_does_not_matter():
    assert RemoveLayers((4, 1, 2)) == RemoveLayers((1, 2, 4))


@pytest.mark.parametrize("layers", [(1.0,), (True,), ("1",), (None,)])
def test_layers_must_be_whole_numbers(layers):
    with pytest.raises(ValueError, match="must be a list of whole numbers"):
        RemoveLayers(layers)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((6,), r"layers=\[6\] must lie in \[0, 5\]"),
        ((-1, 2), r"layers=\[-1\] must lie in \[0, 5\]"),
        ((2, 2), r"layers=\[2, 2\] must not name a layer twice"),
        ((0, 1, 2, 3, 4, 5), "would remove all 6 layers; keep one"),
    ],
)
def test_a_step_that_does_not_fit_the_model_is_refused_by_position(layers, message):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        RemoveLayers(layers).check(6)
    plan = make_plan(model=describe_model(model), steps=(RemoveLayers((0,)), RemoveLayers(layers)))
    with pytest.raises(ValueError, match=rf"steps\[1\] \(remove_layers\): .*{message}"):
        plan.check(model)


@pytest.mark.parametrize(
    ("second", "message"),
    [((1, 2), "must not name a layer twice"), ((2, 3, 4, 5), "would remove all 6 layers")],
)
def test_steps_are_checked_together(second, message):
    model = tiny_model()
    steps = (RemoveLayers((0, 1)), RemoveLayers(second))
    with pytest.raises(ValueError, match=rf"steps\[1\] \(remove_layers\): .*{message}"):
        make_plan(model=describe_model(model), steps=steps).check(model)


def test_an_unknown_kind_of_step_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="kind='melt' is not a known kind of step: .*remove_l"):
        step_from_dict({"kind": "melt", "layers": [1]})
    with pytest.raises(ValueError, match="kind=None is not a known kind"):
        step_from_dict({"layers": [1]})


@pytest.mark.parametrize("keys", [{}, {"layers": [1], "why": "because"}, {"layer": [1]}])
def test_a_step_has_exactly_its_own_keys(keys):
    with pytest.raises(ValueError, match=r"'remove_layers' has keys .* it must have \['layers'\]"):
        step_from_dict({"kind": "remove_layers", **keys})


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_format_is_refused(tmp_path, version):
    with pytest.raises(ValueError, match=rf"format={version!r} must be 1; use the version"):
        Plan.load(written(tmp_path, format=version))


@pytest.mark.parametrize("key", ["method", "arguments", "model", "steps"])
def test_a_missing_key_is_named(tmp_path, key):
    with pytest.raises(ValueError, match=rf"missing keys \['{key}'\], unknown keys \[\]"):
        Plan.load(written(tmp_path, **{key: None}))


def test_an_unknown_key_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"missing keys \[\], unknown keys \['notes'\]"):
        Plan.load(written(tmp_path, notes="mine"))


@pytest.mark.parametrize(
    ("key", "value"),
    [("method", 3), ("arguments", [1]), ("model", "llama"), ("steps", {}), ("scores", 1.5)],
)
def test_a_value_of_the_wrong_type_is_named(tmp_path, key, value):
    with pytest.raises(ValueError, match=rf"keys \['{key}'\] hold values of the wrong type"):
        Plan.load(written(tmp_path, **{key: value}))


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"kind": "melt"}, "kind='melt' is not a known kind"),
        ({"kind": "remove_layers", "layers": 3}, "layers=3 must be a list of whole numbers"),
        ({"kind": "remove_layers", "layers": "12"}, "must be a list of whole numbers"),
        ({"kind": "remove_layers", "layers": [1.5]}, "must be a list of whole numbers"),
        ("remove_layers", "must be an object with a kind"),
        (7, "7 must be an object with a kind"),
    ],
)
def test_a_bad_step_in_a_file_is_named_by_file_and_position(tmp_path, step, message):
    path = written(tmp_path, steps=[{"kind": "remove_layers", "layers": [1]}, step])
    with pytest.raises(
        ValueError, match=rf"plan.json is not a valid plan: steps\[1\]: .*{message}"
    ):
        Plan.load(path)


@pytest.mark.parametrize("content", [b"", b'{"format": 1, "met', b"\xff\xfe{", b"[1, 2]", b"null"])
def test_a_corrupt_file_is_named(tmp_path, content):
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken.json is not a valid plan"):
        Plan.load(path)


def test_a_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent.json"):
        Plan.load(tmp_path / "absent.json")


def test_a_plan_fits_the_model_it_was_made_for():
    model = tiny_model()
    plan_for(model, 2).check(model)


@pytest.mark.parametrize(
    ("key", "value"),
    [("model_type", "qwen2"), ("num_hidden_layers", 7), ("hidden_size", 64)],
)
@pytest.mark.parametrize("strict", [True, False])
def test_a_plan_for_a_model_of_another_shape_is_refused(key, value, strict):
    model = tiny_model()
    plan = make_plan(model={**describe_model(model), key: value})
    with pytest.raises(
        ValueError, match=rf"another model: {key} is {value!r} in the plan"
    ) as error:
        plan.check(model, strict=strict)
    assert "strict=False" not in str(error.value)


def test_a_plan_for_other_weights_is_refused_unless_not_strict():
    plan, tuned = plan_for(tiny_model(seed=0), 2), tiny_model(seed=1)
    with pytest.raises(
        ValueError, match="fingerprint is .* in this model; .* or pass strict=False"
    ):
        plan.check(tuned)
    plan.check(tuned, strict=False)


def test_a_model_that_moved_to_another_directory_is_the_same_model():
    model = tiny_model()
    plan = plan_for(model, 2)
    model.config._name_or_path = "elsewhere"
    assert describe_model(model)["name"] == "elsewhere"
    plan.check(model)


# --- shares of zeros --------------------------------------------------------------------------


PATH = "model.layers"


def name_of(index, name="mlp.up_proj"):
    return f"{PATH}.{index}.{name}"


def sparse(*layers, share=0.5, **rest):
    return Sparsify({name_of(index): share for index in layers}, "wanda", **rest)


STEPS = {
    "plain": sparse(0, 3),
    "pattern": Sparsify({name_of(1): 0.5, name_of(2): 0.25}, "magnitude", "2:4"),
    "options": Sparsify({name_of(1): 1 / 3}, "sparsegpt", None, {"dampening": 0.1, "bits": None}),
    "nothing": Sparsify({}, "wanda"),
    "merge": MergeLayers(((4, 5), (2, 3)), "mean"),
    "drop": DropSublayers(attention=(4, 2), mlp=(3,)),
    "experts": RemoveExperts({"4": (1, 0), "2": (3, 5)}),
    "width": PruneWidth({"2": (1,), "0": (0,)}, {"0": (5, 3)}, correction=True),
    "width with biases": PruneWidth({"2": (1,), "0": (0,)}, correction="bias"),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=list(STEPS))
def test_a_step_survives_json(step, tmp_path):
    plan = make_plan(steps=(RemoveLayers((1,)), step))
    text = json.dumps(plan.to_dict())
    assert Plan.from_dict(json.loads(text)) == plan
    assert json.dumps(Plan.from_dict(json.loads(text)).to_dict()) == text
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").steps == plan.steps


@pytest.mark.parametrize(
    ("step", "written"),
    [
        (
            MergeLayers(((25, 26, 27), (14, 13))),
            {"kind": "merge_layers", "groups": [[13, 14], [25, 26, 27]], "merge": "top"},
        ),
        (
            DropSublayers(attention=(3,)),
            {"kind": "drop_sublayers", "attention": [3], "mlp": []},
        ),
        (
            PruneWidth({"0": (1, 0)}, {"0": (7,)}),
            {
                "kind": "prune_width",
                "heads": {"0": [0, 1]},
                "neurons": {"0": [7]},
                "correction": False,
            },
        ),
    ],
)
def test_the_json_forms_of_depth_and_width_steps_are_the_documented_ones(step, written):
    assert make_plan(steps=(step,)).to_dict()["steps"] == [written]
    assert step_from_dict(written) == step


def test_the_json_form_of_a_sparsify_step_is_the_documented_one():
    (step,) = make_plan(steps=(sparse(0),)).to_dict()["steps"]
    assert step == {
        "kind": "sparsify",
        "sparsity": {"model.layers.0.mlp.up_proj": 0.5},
        "solver": "wanda",
        "pattern": None,
        "options": {},
    }


def test_optional_keys_of_a_step_are_filled():
    written = {"kind": "sparsify", "sparsity": {name_of(0): 0.5}, "solver": "wanda"}
    assert step_from_dict(written) == sparse(0)
    assert step_from_dict({**written, "pattern": "2:4"}) == sparse(0, pattern="2:4")


@pytest.mark.parametrize(
    "keys",
    [{"solver": "wanda"}, {"sparsity": {}}, {"sparsity": {}, "solver": "wanda", "alpha": 1}],
)
def test_missing_and_unknown_keys_of_a_sparsify_step_are_refused(keys):
    with pytest.raises(ValueError, match="'sparsify' has keys .* it must have .*'solver'"):
        step_from_dict({"kind": "sparsify", **keys})


@pytest.mark.parametrize(
    ("key", "value"),
    [("sparsity", 0.5), ("sparsity", [0.5]), ("options", None), ("options", "act_order")],
)
def test_a_sparsify_step_of_wrong_types_is_named_by_file_and_position(tmp_path, key, value):
    step = {"kind": "sparsify", "sparsity": {}, "solver": "wanda", key: value}
    message = r"plan.json is not a valid plan: steps\[0\]: sparsity and options must be objects"
    with pytest.raises(ValueError, match=message):
        Plan.load(written(tmp_path, steps=[step]))


@pytest.mark.parametrize("share", ["0.5", None, True])
def test_a_share_that_is_no_number_is_named_by_file_and_position(tmp_path, share):
    step = {"kind": "sparsify", "sparsity": {"a": 0, "b": share}, "solver": "wanda"}
    message = re.escape(f"steps[0]: sparsity={share!r} of b must be a number in [0, 1)")
    with pytest.raises(ValueError, match=rf"plan.json is not a valid plan: {message}"):
        Plan.load(written(tmp_path, steps=[step]))


@pytest.mark.parametrize("share", [1, 1.0, -0.1, 70, float("nan"), float("inf")])
def test_a_share_outside_its_range_is_refused_by_position(share):
    model = tiny_model()
    message = re.escape(f"sparsity={share} of {name_of(2)} must lie in [0, 1)")
    step = Sparsify({name_of(1): 0, name_of(2): share}, "wanda")
    plan = make_plan(model=describe_model(model), steps=(RemoveLayers((0,)), step))
    with pytest.raises(ValueError, match=rf"steps\[1\] \(sparsify\): {message}"):
        plan.check(model)


def test_the_shares_of_several_plans_follow_the_layers():
    plans = [
        make_plan(steps=steps)
        for steps in (
            (sparse(1, 4, share=0.5),),
            (RemoveLayers((2,)),),  # 4 becomes 3
            # Both count the layers that this plan found: 0 goes, 1 and 3 become 0 and 2.
            (sparse(3, share=0.7), RemoveLayers((0,)), sparse(4, share=0.2)),
        )
    ]
    assert planned_sparsity(plans, PATH) == {name_of(0): 0.5, name_of(2): 0.7, name_of(3): 0.2}
    assert planned_sparsity(plans[:2], PATH) == {name_of(1): 0.5, name_of(3): 0.5}
    assert planned_sparsity([], PATH) == {}


def test_a_removed_layer_takes_its_shares_along():
    for steps in ((sparse(0, 1), RemoveLayers((1,))), (RemoveLayers((1,)), sparse(0, 1))):
        assert planned_sparsity([make_plan(steps=steps)], PATH) == {name_of(0): 0.5}
    later = [make_plan(steps=(sparse(1),)), make_plan(steps=(RemoveLayers((1,)),))]
    assert planned_sparsity(later, PATH) == {}


def test_names_are_renumbered_by_the_layer_and_nothing_else():
    path = "transformer.h"
    shares = {f"{path}.{i}.mlp.experts.3.w2": i / 100 for i in (0, 2, 11)}
    left = {f"{path}.0.mlp.experts.3.w2": 0.0, f"{path}.9.mlp.experts.3.w2": 0.11}
    assert renumbered(shares, path, {1, 2}) == left
    assert renumbered(shares, path, ()) == shares
