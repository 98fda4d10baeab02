"""`plan` and `apply` apart from a run: they do what a run does, and refuse before they compute."""

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import yaml
from methods_table import METHODS, VARIANTS
from runs import VARIED_TEXT, write_model
from safetensors.torch import load_file
from tiny import tiny_model, token_windows
from transformers import AutoModelForCausalLM
from warm_command import call

import prunelight
from prunelight.cli import main
from prunelight.commands.apply import given_settings
from prunelight.commands.plan import flat_arguments
from prunelight.models.sizes import parameter_count
from prunelight.planner.counting import planned_size
from prunelight.planner.telling import decisions, difference_rows, layer_ranges
from prunelight.planning.plan import Plan
from prunelight.planning.steps import PruneWidth, RemoveLayers, SliceHidden
from prunelight.pruning.abilities import unloaded_model

# Method -> its arguments, and the family of the model. One of each kind of step that needs data.
LAWS = {
    "layers": ("ShortGPT", {"num_layers": 2}, "llama"),
    "layers of gpt2": ("ShortGPT", {"ratio": 0.34, "heal": "linear"}, "gpt2"),
    "sublayers": ("ShortGPT", {"ratio": 0.3, "granularity": "sublayer"}, "qwen3"),
    "merged": ("SlidingLayerMerging", {"num_layers": 2, "merge": "mean"}, "llama"),
    "slices": ("SliceGPT", {"slice_ratio": 0.25, "embedding": "full"}, "llama"),
    "width": ("WidthPruning", {"neuron_ratio": 0.25, "multiple": 8}, "qwen2"),
    "zeros": ("WeightPruning", {"sparsity": 0.5, "solver": "sparsegpt"}, "llama"),
}

# Random tokens give a searched slicing too few directions to carry it out; its widths by hand are
# counted in the same way.
COUNTED = [
    name
    for name, method in {**METHODS, **VARIANTS}.items()
    if not method.gradual and name != "DynamicSlicing, sweep"
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    names = {}

    def of(family):
        if family not in names:
            names[family] = write_model(tmp_path_factory.mktemp("models") / family, family)
        return names[family]

    return of


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(VARIED_TEXT, encoding="utf-8")
    return str(file)


@pytest.fixture
def data(text):
    return [
        *("--data.calibration", text, "--data.seq_len", "32"),
        *("--data.num_calibration", "4", "--data.seed", "3"),
    ]


def options(arguments):
    return [word for name, value in arguments.items() for word in (f"--{name}", str(value))]


def plan_file(models, data, tmp_path, method="ShortGPT", family="llama", **arguments):
    file = tmp_path / f"{method}-{len([*tmp_path.iterdir()])}.json"
    main(
        ["plan", models(family), "--method", method, *options(arguments), *data, "--out", str(file)]
    )
    return file


@pytest.mark.parametrize("law", LAWS)
def test_plan_and_apply_do_what_the_start_of_a_run_does(law, models, text, data, tmp_path):
    method, arguments, family = LAWS[law]
    config = {
        "model": {"name": models(family), "probes": False},
        "data": {
            **dict.fromkeys(("train", "validation", "calibration"), text),
            **{"seq_len": 32, "num_calibration": 4, "num_validation": 2, "seed": 3},
        },
        "trainer": {
            **{"accelerator": "cpu", "devices": 1, "default_root_dir": str(tmp_path / "run")},
            "callbacks": [{"class_path": method, "init_args": arguments}],
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    main(["prune", "--config", str(tmp_path / "config.yaml")])
    (of_run,) = (tmp_path / "run").glob("pruned-*")

    file = plan_file(models, data, tmp_path, method, family, **arguments)
    assert Plan.load(file).to_dict() == Plan.load(of_run / "plan.json").to_dict()
    out = tmp_path / "out"
    main(["apply", models(family), str(file), "--out", str(out), *data])
    weights, of_the_run = (load_file(x / "model.safetensors") for x in (out, of_run))
    assert weights.keys() == of_the_run.keys()
    assert all(torch.equal(weights[name], of_the_run[name]) for name in weights)
    assert json.loads((out / "config.json").read_text()) == json.loads(
        (of_run / "config.json").read_text()
    )
    assert Plan.load(out / "plan.json") == Plan.load(file)
    model, tokenizer = prunelight.load(out)
    assert model(**tokenizer("a b", return_tensors="pt")).logits.isfinite().all()


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.sweep) if n in VARIANTS else n for n in COUNTED],
)
def test_the_counted_size_is_that_of_the_pruned_model(name):
    model, windows = tiny_model(), token_windows(16, 32)
    method = {**METHODS, **VARIANTS}[name].make()
    plan = method.plan(model, windows)
    size = planned_size(model, plan)
    pruned = prunelight.apply(model, plan, windows)
    assert size.after == parameter_count(pruned)


def test_a_plan_is_counted_on_the_config_alone(models, data, tmp_path):
    plan = Plan.load(plan_file(models, data, tmp_path, num_layers=2))
    outline = unloaded_model(models("llama"))
    model, _ = prunelight.load(models("llama"))
    assert outline.device.type == "meta"
    assert planned_size(outline, plan) == planned_size(model, plan)
    assert planned_size(model, plan).share_removed > 0.1


def test_arguments_of_a_method_may_be_written_as_in_a_config(models, data, tmp_path):
    files = [tmp_path / "flat.json", tmp_path / "nested.json"]
    written = [
        ["--method", "ShortGPT", "--num_layers", "2", "--protected", "[0, -1]"],
        [
            *("--method.class_path=ShortGPT", "--method.init_args.num_layers=2"),
            *("--method.protected", "[0, -1]"),
        ],
    ]
    for file, arguments in zip(files, written, strict=True):
        main(["plan", models("llama"), *arguments, *data, "--out", str(file)])
    plans = [Plan.load(file) for file in files]
    assert plans[0] == plans[1]
    assert plans[0].arguments["protected"] == [0, -1]


def test_nothing_but_the_prefix_of_a_method_is_rewritten():
    given = ["--method.init_args.sparsegpt.damp=0.1", "--method", "x", "--methods.y", "method.z"]
    assert flat_arguments(given) == ["--sparsegpt.damp=0.1", "--method", "x", *given[3:]]


def test_a_settings_argument_of_a_method_is_read(models, data, tmp_path):
    given = {"sparsity": 0.5, "solver": "sparsegpt", "sparsegpt.block_size": 16}
    plan = Plan.load(plan_file(models, data, tmp_path, "WeightPruning", **given))
    assert plan.steps[0].options["block_size"] == 16


def test_a_plan_is_shown_with_the_parameters_that_it_leaves(models, data, tmp_path, capsys):
    file = plan_file(models, data, tmp_path, layers="[1, 2, 4]")
    capsys.readouterr()
    main(["plan", "show", str(file), "--model", models("llama")])
    shown = capsys.readouterr().out
    assert "1-2, 4 (3)" in shown
    assert "%)" in shown
    assert "ShortGPT" in shown


def test_two_plans_differ_in_what_they_decide(models, data, tmp_path, capsys):
    files = [plan_file(models, data, tmp_path, layers=layers) for layers in ("[1, 2]", "[2, 3]")]
    capsys.readouterr()
    main(["plan", "diff", *map(str, files)])
    shown = capsys.readouterr().out
    assert "1-2 (2)" in shown
    assert "2-3 (2)" in shown
    assert "removed only here" in shown
    assert "calibration" not in shown
    main(["plan", "diff", str(files[0]), str(files[0])])
    assert "decide the same" in capsys.readouterr().out


def test_other_choices_of_the_same_number_are_told():
    plans = [
        Plan("WidthPruning", {}, {}, (PruneWidth(neurons={"0": kept}),))
        for kept in ((0, 1), (1, 2))
    ]
    assert decisions(plans[0]) == decisions(plans[1])
    assert "steps" in difference_rows(*plans)
    assert difference_rows(plans[0], plans[0]) == {}


def test_layers_are_written_in_ranges():
    assert layer_ranges([7, 1, 3, 2]) == "1-3, 7"
    assert layer_ranges([]) == ""


def test_a_slicing_after_a_removal_is_refused_or_counted():
    model = tiny_model()
    plan = SliceHidden((32, *(24,) * 12))
    size = planned_size(model, Plan("SliceGPT", {}, {}, (plan,)))
    assert size.after < size.before
    with pytest.raises(ValueError, match="must lie|does not exist|layers"):
        planned_size(model, Plan("ShortGPT", {}, {}, (RemoveLayers((99,)),)))


def test_a_directory_that_exists_is_left_alone(models, data, tmp_path):
    file = plan_file(models, data, tmp_path, num_layers=1)
    (tmp_path / "there").mkdir()
    end = call(["apply", models("llama"), str(file), "--out", str(tmp_path / "there")])
    assert end.kind == "one line"
    assert "exists; choose another directory" in end.text
    assert not end.loaded
    assert [*(tmp_path / "there").iterdir()] == []


def test_a_plan_of_another_model_is_refused(models, data, tmp_path):
    file = plan_file(models, data, tmp_path, num_layers=1)
    end = call(["apply", models("qwen2"), str(file), "--out", str(tmp_path / "out")])
    assert end.kind == "one line"
    assert "made for another model" in end.text
    assert not (tmp_path / "out").exists()


def test_a_fine_tuned_model_takes_the_plan_where_that_is_asked_for(models, data, tmp_path):
    file = plan_file(models, data, tmp_path, num_layers=2)
    model, tokenizer = prunelight.load(models("llama"))
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    prunelight.save(model, tokenizer, tmp_path / "tuned")
    command = ["apply", str(tmp_path / "tuned"), str(file), "--out", str(tmp_path / "out")]
    assert "fingerprint" in call(command).text
    main([*command, "--strict", "false"])
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert pruned.config.num_hidden_layers == 4


def test_windows_that_a_step_needs_are_asked_for_before_the_model_is_read(models, data, tmp_path):
    file = plan_file(models, data, tmp_path, "WeightPruning", sparsity=0.5)
    end = call(["apply", models("llama"), str(file), "--out", str(tmp_path / "out")])
    assert end.kind == "one line"
    assert "the step sparsify of the plan looks at calibration windows" in end.text
    assert not end.loaded


def test_number_and_length_of_windows_are_those_of_the_plan(models, data, tmp_path, caplog):
    file = plan_file(models, data, tmp_path, "WeightPruning", sparsity=0.5)
    command = ["apply", models("llama"), str(file), *data[:2], "--data.seed", "3"]
    main([*command, "--out", str(tmp_path / "same")])
    assert "other calibration windows" not in caplog.text
    main([*command, "--data.num_calibration", "3", "--out", str(tmp_path / "other")])
    assert "other calibration windows" in caplog.text


def test_settings_of_the_data_count_as_given_however_they_are_written():
    assert given_settings(["--data.seed=1", "--data.calibration", "x", "--out", "y"]) == {
        *("seed", "calibration")
    }
    assert "calibration" in given_settings(["m", "--data", "{seed: 1}"])
    assert given_settings(["m", "--data.calibration+", "x"]) == {"calibration"}
    assert given_settings(["m", "--dtype", "float32"]) == set()


def test_windows_that_no_step_looks_at_are_told(models, data, tmp_path, caplog):
    file = plan_file(models, data, tmp_path, num_layers=1)
    main(["apply", models("llama"), str(file), *data, "--out", str(tmp_path / "out")])
    assert "data.calibration has no effect" in caplog.text


def test_offload_to_where_the_model_is_is_told(models, data, tmp_path, caplog):
    out = str(tmp_path / "plan.json")
    given = [models("llama"), "--method", "ShortGPT", "--num_layers", "1", "--device", "cpu", *data]
    main(["plan", *given, "--out", out])
    assert "offload" not in caplog.text
    main(["plan", *given, "--out", out, "--offload", "true"])
    assert "offload=True has no effect with device=cpu: the model is there" in caplog.text


def test_a_full_disk_is_told_before_anything_is_computed(models, data, tmp_path, monkeypatch):
    file = plan_file(models, data, tmp_path, num_layers=1)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 9, 9))
    end = call(["apply", models("llama"), str(file), "--out", str(tmp_path / "out")])
    assert end.kind == "one line"
    assert "0.00 GB are free there" in end.text


def test_a_file_that_holds_no_plan_is_not_replaced(models, data, tmp_path):
    (tmp_path / "mine.json").write_text("{}")
    command = ["plan", models("llama"), "--method", "ShortGPT", "--num_layers", "1", *data]
    end = call([*command, "--out", str(tmp_path / "mine.json")])
    assert "exists and holds no plan" in end.text
    assert not end.loaded
    assert (tmp_path / "mine.json").read_text() == "{}"


ODD_PLANS = {
    "number of windows": ({"calibration": {"num_samples": "x"}}, "num_samples='x' must be a whole"),
    "share of zeros": (
        {"steps": [{"kind": "sparsify", "solver": "wanda", "sparsity": {"a": "x"}}]},
        "sparsity='x' of a must be a number",
    ),
}


@pytest.mark.parametrize("odd", ODD_PLANS)
def test_a_plan_that_was_edited_to_an_odd_value_is_one_line(odd, models, data, tmp_path):
    changes, told = ODD_PLANS[odd]
    file = plan_file(models, data, tmp_path, num_layers=1)
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    end = call(["plan", "show", str(file)])
    assert end.kind == "one line", end
    assert told in end.text


def test_a_plan_that_was_edited_to_say_less_is_shown_and_carried_out(
    models, data, tmp_path, capsys
):
    file = plan_file(models, data, tmp_path, "WeightPruning", sparsity=0.5)
    plan = json.loads(file.read_text())
    plan["calibration"] = {"fingerprint": "ab"}
    plan["steps"][0]["sparsity"] = {}
    file.write_text(json.dumps(plan))
    main(["plan", "show", str(file)])
    assert "? windows of ? tokens" in capsys.readouterr().out
    main(["apply", models("llama"), str(file), *data, "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_plan_that_may_not_be_read_is_told_as_that(tmp_path, monkeypatch):
    (tmp_path / "plan.json").write_text("{}")

    def refuse(self, **settings):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_text", refuse)  # a superuser may read everything
    with pytest.raises(PermissionError, match="plan.json cannot be read: Permission denied"):
        Plan.load(tmp_path / "plan.json")


def test_a_share_that_removes_no_expert_is_told(models, data, tmp_path, caplog):
    plan_file(models, data, tmp_path, "ExpertPruning", "qwen3_moe", ratio=0.1)
    assert caplog.text.count("ratio=0.1 removes none of 4 experts") == 1


ODD_FILES = {
    "tokenizer_config.json": "[1]",
    "model.safetensors.index.json": "[]",
    "generation_config.json": "[]",
    "config.json": '{"model_type": "llama", "hidden_act": "nix"}',
}


@pytest.mark.parametrize("name", ODD_FILES)
@pytest.mark.parametrize("verb", ["plan", "estimate"])
def test_odd_files_of_a_model_are_one_line(verb, name, models, data, tmp_path):
    model = shutil.copytree(models("llama"), tmp_path / "model")
    if "index" in name:
        (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    (model / name).write_text(ODD_FILES[name])
    method = ["--method", "ShortGPT", "--num_layers", "1", *data] if verb == "plan" else []
    end = call([verb, str(model), *method])
    of_weights = verb == "estimate" and name != "config.json"  # it reads none, and goes on
    assert end.kind == ("first forward" if of_weights else "one line"), end


PLAN = ["plan", "MODEL", "--method"]
SHORT = [*PLAN, "ShortGPT"]
ERRORS = {
    "no method": (["plan", "MODEL"], "method is missing; name one of BudgetPruning, DLP"),
    "misspelt method": ([*PLAN, "ShortGTP"], "did you mean prunelight.callbacks.ShortGPT"),
    "no pruning method": ([*PLAN, "RecoveryCheckpoint"], "is no pruning method"),
    "misspelt argument": ([*SHORT, "--ratoi", "0.2"], "did you mean ratio"),
    "misspelt data": (
        [*SHORT, "--ratio", "0.2", "--data.seqlen", "2"],
        "did you mean data.seq_len",
    ),
    "no amount": (SHORT, "ShortGPT: nothing says how many layers go"),
    "wrong type": ([*SHORT, "--ratio", "much"], "ratio=much must be a number"),
    "out of range": ([*SHORT, "--ratio", "1.5"], "ratio=1.5"),
    "too many layers": ([*SHORT, "--num_layers", "6"], "6"),
    "no model": (["plan", "/no/model", "--method", "ShortGPT", "--ratio", "0.2"], "/no/model"),
    "no text": ([*SHORT, "--ratio", "0.2", "--data.calibration", "/no.txt"], "does not exist"),
    "window of one": ([*SHORT, "--ratio", "0.2", "--data.seq_len", "1"], "data.seq_len=1"),
    "no device": ([*SHORT, "--ratio", "0.2", "--device", "gpu"], "device='gpu'"),
    "no folder": ([*SHORT, "--ratio", "0.2", "--out", "/no/plan.json"], "there is no directory"),
    "a schedule": (
        [*PLAN, "DLP", "--sparsity", "0.5", "--schedule", "{start_step: 1, end_step: 5}"],
        "prunes while it trains",
    ),
    "no plan to show": (["plan", "show", "/no/plan.json"], "there is no plan /no/plan.json"),
    "nothing to show": (["plan", "show"], "file"),
    "one plan to compare": (["plan", "diff", "a.json"], "second"),
    "no plan to apply": (["apply", "MODEL", "/no/p.json", "--out", "/tmp/o"], "there is no plan"),
    "no out": (["apply", "MODEL", "p.json"], "out"),
    "only how": (
        ["apply", "MODEL", "PLAN", "--out", "NEW", "--data.seed", "1"],
        "no text is given",
    ),
    "here": (["apply", "MODEL", "PLAN", "--out", "."], "cannot be replaced as a whole"),
    "nothing at all": (["plan"], "method is missing"),
    "an abbreviation": ([*SHORT, "--ratio", "0.2", "--data.num", "8"], "data.num"),
    "a plan in a saved model": (
        [*SHORT, "--ratio", "0.2", "--out", "SAVED/plan.json"],
        "lies in a saved model, whose plans say how it was made",
    ),
    "a long name": (["plan", "show", "n" * 300], "File name too long"),
    "a long name of a plan": ([*SHORT, "--ratio", "0.2", "--out", "n" * 300], "too long"),
    "a name too long for its temporary": (
        ["apply", "MODEL", "PLAN", "--out", "n" * 235],
        "File name too long",
    ),
    "an unknown home": (["apply", "MODEL", "PLAN", "--out", "~nobody_xy/new"], "does not know"),
    "no estimate there": (["estimate", "MODEL", "--out", "PLAN"], "exists and holds no estimate"),
    "nowhere for an estimate": (["estimate", "MODEL", "--out", "/proc/no/e.json"], "cannot write"),
    "nowhere to write": ([*SHORT, "--ratio", "0.2", "--out", "/proc/p.json"], "cannot write /proc"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_a_wrong_value_ends_in_one_line_before_the_first_forward(case, models, data, tmp_path):
    command, told = ERRORS[case]
    plan = plan_file(models, data, tmp_path, layers="[1]") if "PLAN" in command else None
    places = {"MODEL": models("llama"), "PLAN": str(plan), "NEW": str(tmp_path / "new")}
    if any("SAVED" in word for word in command):
        prunelight.save(*prunelight.load(models("llama")), tmp_path / "saved")
        places["SAVED/plan.json"] = str(tmp_path / "saved" / "plan.json")
    end = call([places.get(word, word) for word in command])
    assert end.kind == "one line", end
    assert told in end.text


def test_the_commands_work_in_a_shell(models, data, tmp_path):
    def run(*command):
        done = subprocess.run(
            [sys.executable, "-m", "prunelight.cli", *command],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    shown = run("plan", models("llama"), "--method", "ShortGPT", "--num_layers", "2", *data)
    assert "layers removed" in shown
    assert "parameters" in run("apply", models("llama"), "plan.json", "--out", "pruned")
    assert (tmp_path / "pruned" / "model.safetensors").is_file()


def test_a_budget_alone_finds_what_to_remove(models, tmp_path, data):
    out = tmp_path / "plan.json"
    given = ["--budget", "0.8", "--multiple", "8", "--out", str(out)]
    main(["plan", models("llama"), *given, *data])
    plan = Plan.load(out)
    assert plan.method == "BudgetPruning"
    assert plan.found["cost_left"] <= 0.8
    with pytest.raises(SystemExit, match="budget=0.01 of the parameters cannot be met"):
        main(["plan", models("llama"), "--budget", "0.01", "--out", str(out), *data])
