"""What is told of where a result comes from leads to no folder and holds no secret."""

import re
from pathlib import Path

import pytest

from prunelight.runtime.origin import command_line, date_now, machine_facts, without_paths


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (
            ["/usr/bin/prunelight", "fit", "--config", "/home/me/a b/x.yaml"],
            "prunelight fit --config x.yaml",
        ),
        (["/src/prunelight/cli.py", "fit", "--root=/a b/c d/"], 'prunelight fit "--root=c d"'),
        (["x.py", "--root=/home/me/run/"], "x.py --root=run"),
        (["x.py", "--root=~me/run", "~/a/b"], "x.py --root=run b"),
        (["x.py", "['/a/b.txt', '/c/d.txt']"], "x.py \"['b.txt', 'd.txt']\""),
        (["x.py", "runs/first", "https://host/a"], "x.py runs/first https://host/a"),
        (["x.py", "--a.api_key=b", "--hf_token", "c"], "x.py --a.api_key=*** --hf_token ***"),
        (["x.py", "--max_tokens=9", "--tokenizer", "t"], "x.py --max_tokens=9 --tokenizer t"),
        ([], ""),
    ],
)
def test_a_command_is_told_without_folders_and_secrets(given, shown):
    assert command_line(given) == shown


def test_sources_keep_their_kind_and_their_last_part():
    assert without_paths("json:/data/mine/rows.jsonl") == "json:rows.jsonl"
    assert without_paths("sample:validation") == "sample:validation"
    assert without_paths("a / b") == "a / b"


def test_facts_of_the_machine_do_not_name_it():
    import platform

    facts = machine_facts()
    assert facts["processor"]
    assert facts["cores"] >= 1
    assert re.fullmatch(r"\d+ GB", facts["memory"])
    assert platform.node() not in str(facts)
    assert str(Path.home()) not in str(facts)


def test_a_date_says_its_zone():
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", date_now())
