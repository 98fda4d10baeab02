"""`prunelight report RUN`: draws the same files again, or says in one line why it cannot."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from examined_stages import make_examined_record
from html_pages import read_page

from prunelight.commands.report import draw_again, main
from prunelight.evaluation.report.report import write_report


@pytest.fixture
def run(tmp_path):
    write_report(tmp_path / "run", make_examined_record())
    return tmp_path / "run"


def contents(run):
    return {file.name: file.read_bytes() for file in run.iterdir()}


def test_a_redraw_gives_the_same_files(run):
    before = contents(run)
    for name in before.keys() - {"report.json"}:
        (run / name).unlink()
    assert {file.name for file in draw_again(run)} == before.keys() - {"report.json"}
    after = contents(run)
    assert after.keys() == before.keys()
    for name in ("report.json", "report.md", "report.html"):
        assert after[name] == before[name]
    draw_again(run / "report.json")
    assert contents(run)["report.html"] == before["report.html"]


def test_a_report_of_an_older_version_is_drawn(run):
    data = json.loads((run / "report.json").read_text())
    for name in ("date", "command", "machine", "seed", "data", "curves"):
        del data[name]
    for stage in data["stages"]:
        del stage["examined"]
    (run / "report.json").write_text(json.dumps(data))
    draw_again(run)
    read_page((run / "report.html").read_text())


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[]", "is no report of prunelight"),
        ('{"model": "x"}', "is no report of prunelight"),
        ('{"format": 99, "model": "x", "stages": []}', "format=99, this version reads 1; install"),
        ('{"format": "1", "model": "x", "stages": []}', "must be 1"),
        ('{"format": 1, "model": "x", "stages": [], "costs": []}', "lacks or misnames a fact"),
    ],
)
def test_a_file_that_is_no_report_is_one_line(tmp_path, text, told, capsys):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ValueError, match=told):
        draw_again(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path)])
    assert str(stop.value).startswith("prunelight: error: ")
    assert len(str(stop.value).splitlines()) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_bytes_and_runs_without_stages_are_told(tmp_path, run):
    (tmp_path / "report.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is no text"):
        draw_again(tmp_path)
    data = json.loads((run / "report.json").read_text())
    (run / "report.json").write_text(json.dumps(data | {"stages": []}))
    with pytest.raises(ValueError, match="holds no measured stage"):
        draw_again(run)


def test_a_run_without_a_report_is_told_why(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist; give the directory of a run"):
        draw_again(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="has no report.json; give the directory"):
        draw_again(tmp_path)
    (tmp_path / "contest").mkdir()
    (tmp_path / "contest" / "comparison.json").touch()
    with pytest.raises(FileNotFoundError, match="holds a comparison; the `prunelight compare`"):
        draw_again(tmp_path / "contest")
    (tmp_path / "pruned-1").mkdir()
    (tmp_path / "pruned-1" / "measured.json").touch()
    with pytest.raises(FileNotFoundError, match="the run has not ended; start the same command"):
        draw_again(tmp_path)


def test_a_page_of_others_is_not_replaced(run):
    (run / "report.html").write_text("<p>mine</p>")
    with pytest.raises(FileExistsError, match="report.html exists and was not written by"):
        draw_again(run)
    assert (run / "report.html").read_text() == "<p>mine</p>"


def test_the_verb_loads_neither_torch_nor_lightning(run):
    (run / "report.html").unlink()
    code = (
        "import sys; from prunelight.cli import main; main(['report', sys.argv[1]]); "
        "print(sorted({'torch', 'lightning', 'transformers'} & {*sys.modules}))"
    )
    environment = {**os.environ, "PYTHONWARNINGS": "error::DeprecationWarning"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(run)], capture_output=True, text=True, env=environment
    )
    assert done.stdout.strip() == "[]", done.stderr
    assert (run / "report.html").is_file()
