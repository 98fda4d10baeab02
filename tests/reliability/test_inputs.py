"""Wrong inputs end in one line before the first forward; a fixed part of tests/reliability/inputs.

The whole is measured by the script. Here stand all misspelt names, and of each option some values.
"""

import inspect
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
        if not inspect.isabstract(made) and issubclass(made, pl.Callback):
            assert made in tried or not inspect.signature(made).parameters, name
