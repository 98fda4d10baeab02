"""Other programs read our directories: each in its own environment, see docs/loaders.md."""

import os
import re

import pytest
from cases import FAMILIES
from loaders import PYTHONS, measure, states, verdict

from prunelight.models.engines import loads_in

# What each program reads here: a stock result of each kind, and layers out of their places.
READ = {
    ("llama", "2 layers removed"),
    ("llama", "layers merged"),
    ("llama", "half of the weights zero"),
    ("smollm3", "1 layer removed, pattern kept"),
    ("smollm3", "1 layer removed, pattern broken"),
    ("gemma3", "1 layer removed, pattern broken"),
    ("gemma3", "1 layer removed, pattern broken, key in the GGUF"),
}


def environment(engine):
    missing = PYTHONS[engine] not in os.environ
    reason = f"{PYTHONS[engine]} does not name a Python with {engine}; .ci/engines makes one"
    return pytest.param(engine, marks=pytest.mark.skipif(missing, reason=reason))


@pytest.mark.engines
@pytest.mark.slow
@pytest.mark.parametrize("engine", [environment(engine) for engine in PYTHONS])
def test_a_program_reads_what_is_said_that_it_reads(engine):
    chosen = [
        state for state in states() if (state.model, state.state) in READ and engine in state.only
    ]
    assert {state.model for state in chosen} == {model for model, _ in READ}
    for state, figure in zip(chosen, measure(chosen, [engine]), strict=True):
        answer = "yes" if state.options else loads_in(state.make())[engine]
        expected = {"yes": "right", "no: reads it": "wrong", "no: refuses it": "refused"}
        assert verdict(figure) == expected[re.match("yes|no: [a-z]+ it", answer)[0]], figure


def test_every_state_that_is_read_here_exists():
    assert {(state.model, state.state) for state in states()} >= READ
    assert {model for model, _ in READ} <= set(FAMILIES)
