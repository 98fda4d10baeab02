"""What the table says of engines is what was measured; its checks; what a depth method asks."""

import json
from functools import cache

import pytest
import torch
from cases import FAMILIES, family_config, removals
from loaders import FIGURES, PYTHONS, verdict
from tiny import tiny_model

from prunelight.models import engines
from prunelight.models.engines import (
    ENGINES,
    READINGS,
    check_engine,
    family_pattern,
    fields_by_place,
    layer_kinds,
    loads_in,
    misreadings,
)
from prunelight.models.families.config_fields import cut_config
from prunelight.planning.layer_pattern import keeps_pattern, lowest_keeping_pattern
from prunelight.pruning.remove_layers import remove_layers


@cache
def figures():
    table = json.loads(FIGURES.read_text(encoding="utf-8"))
    return {(f["model"], f["state"], f["engine"]): f for f in table["figures"]}


def shorter(name, layers):
    config = family_config(name)
    kept = [i for i in range(config.num_hidden_layers) if i not in layers]
    cut_config(config, kept, config.num_hidden_layers)
    return config


CASES = [
    pytest.param(name, removal, engine, id=f"{name}-{removal.state}-{engine}")
    for name in FAMILIES
    for removal in removals(name)
    if not removal.options  # a key in the GGUF is not seen in a config
    for engine in ENGINES
    if (name, removal.state, engine) in figures()
]


@pytest.mark.parametrize(("name", "removal", "engine"), CASES)
def test_what_is_said_of_an_engine_was_measured(name, removal, engine):
    measured = verdict(figures()[name, removal.state, engine])
    answer = loads_in(shorter(name, removal.layers))[engine]
    said = {"yes": "right", "no: reads it wrong": "wrong", "no: refuses it": "refused"}
    assert said[answer.split(": it")[0]] == measured, answer


def test_every_family_of_the_table_was_measured():
    measured = {(FAMILIES[m][0], engine) for m, _, engine in figures() if m in FAMILIES}
    assert measured == {(family, engine) for engine in ENGINES for family in READINGS[engine]}


def test_the_table_and_the_readers_know_the_same_engines():
    assert set(PYTHONS) == set(ENGINES)
