"""Wrong inputs end in one line before the first forward; a fixed part of tests/reliability/inputs.

The whole is measured by the script. Here stand all misspelt names, and of each option some values.
"""

import inspect
import sys
from collections import defaultdict

import lightning.pytorch as pl
import pytest
from drawn import drawn
from warm_command import call
from wrong_commands import TinyRun, misspellings, random_config, whole_runs
from wrong_inputs import RANGES, TARGETS, option_cases, options

from prunelight import callbacks

# Of each group of options so many values go through the command line.
NUM_VALUES = 6


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return TinyRun(tmp_path_factory.mktemp("inputs"))


def cases_that_need_no_model():
    """Return wrong values that are known to be wrong without a model, spread over the options."""
    groups = defaultdict(list)
    for case in option_cases():
        if (
            not case.right
            and case.value in (None, "x", 1.5, "", -1)
            and case.option != "model.name"
        ):
            groups[case.option.rpartition(".")[0]].append(case)
    return [c for cases in groups.values() for c in cases[:: len(cases) // NUM_VALUES + 1]]


@pytest.mark.parametrize("case", cases_that_need_no_model(), ids=str)
def test_a_wrong_value_is_one_line(case, tiny):
    end = tiny.end_of(case)
    assert end.kind == "one line", end
    assert case.is_named_in(end.text)


def test_misspelt_names_and_unreadable_configs_are_one_line(tiny):
    for command in misspellings(tiny):
        end = tiny.call(command)
        assert end.kind == "one line", (command, end)
        assert command.is_named_in(end.text), (command, end)


def test_methods_that_exclude_each_other_are_one_line_and_others_run(tiny):
    for command in whole_runs(tiny):
        end = tiny.call(command)
        assert end.kind == ("first forward" if command.right else "one line"), (command, end)


def test_random_edits_of_a_config_are_one_line_or_a_run(tiny):
    @drawn(12)
    def check(draw):
        end = tiny.call(random_config(tiny, draw))
        assert end.kind in ("one line", "first forward"), end

    check()


def test_the_errors_of_the_command_line_name_value_rule_and_remedy(tiny):
    for arguments, told in {
        ("--trainer.precision", "fp16"): "trainer.precision=fp16 must be one of 64, 32, 16, ",
        ("--data.seq_len", "32.5"): "data.seq_len=32.5 must be a whole number",
        ("--model.lora", "3"): "model.lora=3 must be a mapping with some of r, alpha, dropout",
        ("--trainer.max_steps", "null"): "trainer.max_steps=None must be a whole number",
    }.items():
        end = call(["fit", "--config", tiny.write(tiny.config), *arguments])
        assert end.kind == "one line"
        assert told in end.text


def test_every_option_has_right_and_wrong_values():
    known = options()
    assert set(RANGES) <= set(known)
    without_range = {
        option
        for option, hint in known.items()
        if option not in RANGES and hint in (int, float, int | None, float | None)
    }
    assert not without_range


def test_every_callback_is_tried():
    tried = {target.made for target in TARGETS.values()}
    for name in callbacks.__all__:
        made = getattr(callbacks, name)
        if made is callbacks.TaskEvaluation:  # needs rows of tasks: see tests/evaluation/tasks
            continue
        if not inspect.isabstract(made) and issubclass(made, pl.Callback):
            assert made in tried or not inspect.signature(made).parameters, name


def with_trainer(tiny, **settings):
    config = {**tiny.config, "trainer": {**tiny.config["trainer"], **settings}}
    config["trainer"].setdefault("default_root_dir", tiny.directory())
    return call(["fit", "--config", tiny.write(config)])


def with_model(tiny, **settings):
    config = {**tiny.config, "model": {**tiny.config["model"], **settings}}
    config["trainer"] = {**tiny.config["trainer"], "default_root_dir": tiny.directory()}
    return call(["fit", "--config", tiny.write(config)])


@pytest.mark.parametrize(
    ("callbacks", "told"),
    [
        ("ShortGPT", "give exactly one of ratio, num_layers, layers, parameter_ratio"),
        ({"class_path": "ShortGPT", "init_args": {"num_layers": -1}}, "num_layers=-1 must be at"),
        ([{"class_path": "ShortGPT", "num_layers": 2}], "its arguments as init_args"),
        ([{"ShortGPT": {"num_layers": 2}}], "its arguments as init_args"),
        ([{"class_path": "ShortGPT", "init_args": None}], "init_args must be a mapping"),
        (
            [{"class_path": "EarlyStopping", "init_args": {"monitor": "val/perplexty"}}],
            "did you mean val/perplexity",
        ),
        (
            [{"class_path": "ModelCheckpoint", "init_args": {"monitor": "val/accuracy"}}],
            "would keep the worst step; set mode='max'",
        ),
    ],
)
def test_callbacks_in_odd_forms_are_one_line(callbacks, told, tiny):
    end = with_trainer(tiny, callbacks=callbacks)
    assert end.kind == "one line", end
    assert told in end.text


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        ("AdamW", {"lr": -1}, "Invalid learning rate: -1"),
        ("AdamW", {"betas": [2, 3]}, "Invalid beta parameter"),
        ("SparseAdam", {}, "does not support dense gradients"),
    ],
)
def test_an_optimizer_that_cannot_train_is_refused_before_the_model_is_read(
    name, arguments, told, tiny
):
    optimizer = {"class_path": f"torch.optim.{name}", "init_args": arguments}
    end = with_model(tiny, optimizer=optimizer)
    assert end.kind == "one line", end
    assert told in end.text
    assert not end.loaded


def test_optimizers_of_matrices_and_a_validation_by_the_clock_are_right(tiny):
    muon = {"class_path": "torch.optim.Muon"}
    assert with_model(tiny, optimizer=muon).kind == "first forward"
    assert with_trainer(tiny, val_check_interval="00:00:00:10").kind == "first forward"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--seed_everything", "-1"), "seed_everything=-1 must lie in [0, 4294967295]"),
        (("--ckpt_path", ""), "ckpt_path='' must be the file of a checkpoint"),
        (("--config", "x" * 5000), "has 5000 letters"),
        (("--model.name", "x" * 500), "has 500 letters"),
        (("--trainer.default_root_dir", "https://x/y"), "must be a directory of this machine"),
    ],
)
def test_values_at_the_edge_are_one_line(arguments, told, tiny):
    end = call(["fit", "--config", tiny.write(tiny.config), *arguments])
    assert end.kind == "one line", end
    assert told in end.text


def test_a_seed_of_the_environment_that_is_no_number_is_named(tiny, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "x")
    assert "PL_GLOBAL_SEED='x' in the environment" in with_trainer(tiny).text


def test_a_name_is_never_read_as_a_config_that_names_classes(tiny, monkeypatch):
    monkeypatch.chdir(tiny.root)
    monkeypatch.syspath_prepend(str(tiny.root))
    (tiny.root / "payload.py").write_text("X = 1\n", encoding="utf-8")
    for name in ("names.yaml", "org/model"):
        (tiny.root / name).parent.mkdir(exist_ok=True)
        (tiny.root / name).write_text("class_path: payload.X\n", encoding="utf-8")
        end = with_model(tiny, name=name)
        assert end.kind == "one line", end
        assert "payload" not in sys.modules


def test_no_config_comes_from_another_machine(tiny):
    url = "http://127.0.0.1:9/config.yaml"
    for end in (
        call(["fit", "--config", url]),
        with_model(tiny, lora=url),
        with_model(tiny, name=url),
        with_trainer(tiny, callbacks=url),
    ):
        assert end.kind == "one line", end
        assert "refused" not in end.text  # nobody asked there
