"""A teacher, and data that it is asked about."""

import json

import pytest
from runs import TEXT, make_data, write_model

import prunelight
from prunelight.recovery.distillation.teacher_cache import BLOCK


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def teacher(name):
    return prunelight.load(name)[0]


@pytest.fixture(scope="module")
def data(name, tmp_path_factory):
    """Two files of examples: windows of text, and instructions of other lengths with a prompt."""
    directory = tmp_path_factory.mktemp("data")
    rows = [
        {"instruction": f"Say {word} {i}", "output": f"{word} " * (1 + i % 5)}
        for i, word in enumerate(["river", "mill", "sea", "old", "runs"] * 6)
    ]
    file = directory / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    text = directory / "long.txt"
    text.write_text(TEXT * 3, encoding="utf-8")
    made = make_data(name, directory, train=[str(text), str(file)])
    assert BLOCK < len(made.examples("train")) < 2 * BLOCK
    return made
