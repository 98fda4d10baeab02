"""A model that is streamed: its weights stay on the CPU, and its layers compute elsewhere."""

import json
import os
import subprocess
import sys
from functools import cache

import pytest
from device_parity import NAMES, check
from source_tree import ROOT

ALWAYS = (
    "ShortGPT by number",
    "ShortGPT, angular",
    "SLEB",
    "Shortened LLaMA, Taylor",
    "width",
    "SliceGPT",
    "DLP, Wanda",
    "2:4, SparseGPT",
    "ShortGPT, healed",
)
# One look at the scores needs each weight on the device once. The probe of a walk brings one layer
# more, a sixth of this model; hidden states are small.
ONE_PASS = dict.fromkeys(("ShortGPT by number", "ShortGPT, angular", "width", "DLP, Wanda"), 1.2)


@cache
def on_the_other_device(family, names, num_windows=8):
    """What each of some methods does there, by name; torch is changed in a process of its own."""
    support = str(ROOT / "tests" / "support")
    paths = os.pathsep.join([str(ROOT), support, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, f"{support}/other_device.py", family, str(num_windows), *names],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {row["name"]: row for row in rows}


@pytest.mark.parametrize("name", ALWAYS)
def test_a_method_does_the_same_where_layers_compute_on_another_device(name):
    row = on_the_other_device("llama", ALWAYS)[name]
    check(row, "cpu")
    assert row["to_device"] < ONE_PASS.get(name, float("inf"))


def test_scores_bring_each_layer_once_for_all_micro_batches():
    names = ("ShortGPT by number", "ShortGPT, angular", "DLP, Wanda")
    for row in on_the_other_device("llama", names, 300).values():  # three micro-batches
        check(row, "cpu")
        assert row["to_device"] < 1.6  # hidden states are not small beside a tiny model


def test_all_scores_together_bring_each_layer_once():
    row = on_the_other_device("llama", ())["surroundings"]
    assert row["left_out"] == {}
    assert row["scored"] < 2  # a sixth each for two probes of a layer, and the hidden states


def test_an_analysis_brings_each_layer_once_and_once_more_for_attention():
    row = on_the_other_device("llama", ())["surroundings"]
    expected, found = row["told"]
    assert found == pytest.approx(expected, abs=1e-4)
    assert row["analysed"] < 3.4  # of three micro-batches and two; hidden states are not small


@pytest.mark.parametrize(
    ("name", "most"),
    [("perplexity", 1.7), ("text", 1.7), ("divergence", 3.4), ("kept logits", 2.2)],
)
def test_an_evaluation_brings_each_layer_once_for_all_micro_batches(name, most):
    row = on_the_other_device("llama", ())["surroundings"]["evaluated"][name]  # 5 micro-batches
    found, expected = row["values"]
    assert found == pytest.approx(expected, rel=1e-5)
    # A sixth for the probe of a layer, the hidden states, and the second model or what is kept.
    assert row["moved"] < most


def test_a_streamed_model_whose_layers_cannot_be_run_alone_is_scored_and_evaluated_all_the_same():
    row = on_the_other_device("llama", ())["surroundings"]
    scores, expected = row["not_alone"]
    assert scores == pytest.approx(expected, abs=1e-6)
    found, expected = row["perplexity_not_alone"]
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_streamed_model_is_checked_and_timed_on_the_device():
    row = on_the_other_device("llama", ())["surroundings"]
    assert (row["reloaded_on"], row["generation_fault"], row["compared"]) == ("emulated", "", True)
    assert row["first_token"] > 0
    assert {*row["home"]} == {"cpu"}
    assert row["walks_on"] == "emulated:0"  # asked for as "emulated", as a user writes "cuda"


@pytest.mark.sweep
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ALWAYS])
def test_so_does_every_other_method(name):
    check(on_the_other_device("llama", tuple(NAMES))[name], "cpu")


# The emulation has not all operations of gpt2 (a look for padding) and mixtral (a histogram).
@pytest.mark.parametrize(
    "family",
    [
        "opt",
        "qwen3",
        *(
            pytest.param(name, marks=pytest.mark.sweep)
            for name in ("gemma2", "rwkv", "mamba", "bloom")
        ),
    ],
)
def test_layers_of_every_family_go_to_the_device(family):
    for row in on_the_other_device(family, ("ShortGPT by number", "Wanda")).values():
        check(row, "cpu")
