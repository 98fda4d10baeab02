"""Other programs read our exports as it was measured; see docs/exporting.md for all figures."""

import json
import os

import pytest
from exports import FIGURES, FORMATS, measure, states

from prunelight.export.gguf.families import FAMILIES
from prunelight.export.gguf.target import DTYPES

HERE = [name for name, kind in FORMATS.items() if (kind.variable or "PATH") in os.environ]
READ = {
    ("llama", "2 layers removed"),
    ("llama", "attention and MLPs dropped"),
    ("llama", "layers of different widths"),
    ("gemma3", "1 layer removed, pattern broken"),
    ("smollm3", "1 layer removed, pattern kept"),
    ("mixtral", "2 layers removed"),
    ("gpt2", "2 layers removed"),
}


def recorded():
    return json.loads(FIGURES.read_text(encoding="utf-8"))["figures"]


@pytest.mark.engines
@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_a_program_reads_an_export_as_it_was_measured(name):
    if name not in HERE:
        pytest.skip(f"{FORMATS[name].variable} does not name a Python; .ci/engines makes one")
    chosen = [state for state in states() if (state.model, state.state) in READ]
    models = FORMATS[name].models or {model for model, _ in READ}
    figures = list(measure(chosen, [name]))
    assert {figure["model"] for figure in figures} == {m for m, _ in READ} & {*models}
    measured = {(f["model"], f["state"]): f for f in recorded() if f["format"] == name}
    for figure in figures:
        expected = measured[figure["model"], figure["state"]]
        assert ("refused" in figure) == ("refused" in expected), figure
    assert any("refused" not in figure for figure in figures)


def test_every_family_that_is_written_was_measured_dense_and_pruned():
    bound = DTYPES["f32"].value
    near = [
        (figure["model"].replace("gemma3", "gemma3_text"), figure["state"])
        for figure in recorded()
        if figure["format"] == "GGUF f32" and figure.get("largest_difference", 1) < bound
    ]
    assert {model for model, state in near if state == "dense"} >= {*FAMILIES}
    assert {model for model, state in near if "removed" in state} >= {*FAMILIES}


def test_every_state_that_is_read_here_exists():
    assert {(state.model, state.state) for state in states()} >= READ


def test_what_went_silently_wrong_is_refused_and_layers_that_differ_are_held():
    refused = {(f["format"], f["state"]) for f in recorded() if "refused" in f}
    assert ("CTranslate2 f32", "sliced with one rotation") in refused
    assert ("DeciLM f32", "layers of different widths") not in refused
