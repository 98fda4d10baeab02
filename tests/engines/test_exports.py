"""llama.cpp reads our GGUFs, tokenizers included; see docs/exporting.md for all figures."""

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
    for figure in figures:
        assert "refused" not in figure, figure


def test_every_family_that_is_written_was_measured_dense_and_pruned():
    figures = json.loads(FIGURES.read_text(encoding="utf-8"))["figures"]
    bound = DTYPES["f32"].value
    near = [
        (figure["model"].replace("gemma3", "gemma3_text"), figure["state"])
        for figure in figures
        if figure["format"] == "GGUF f32" and figure.get("largest_difference", 1) < bound
    ]
    assert {model for model, state in near if state == "dense"} >= {*FAMILIES}
    assert {model for model, state in near if "removed" in state} >= {*FAMILIES}


def test_every_state_that_is_read_here_exists():
    assert {(state.model, state.state) for state in states()} >= READ
