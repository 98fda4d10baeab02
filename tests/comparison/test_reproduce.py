"""The papers' tables: their configs, what was published, and one of them from start to end."""

import json
from importlib.resources import files
from pathlib import Path

import pytest
from runs import write_model

from prunelight.cli import main
from prunelight.commands.compare import _parser
from prunelight.comparison.methods import entrants_of
from prunelight.comparison.papers.catalog import PAPERS, QUICK, table_of
from prunelight.comparison.papers.published import notes_of, published_tables
from prunelight.comparison.settings import ComparisonSettings
from prunelight.config_files import find_configs

TABLES = [(paper, name) for paper, of in PAPERS.items() for name in of.tables]
NOT_HERE = {"dense"}  # rows of papers that no method of ours stands for


def settings_of(*configs):
    given = find_configs([word for config in configs for word in ("--config", config)])
    made = _parser().instantiate(_parser().parse_args(given))
    return ComparisonSettings(
        **{field: made[field] for field in ComparisonSettings.__dataclass_fields__}
    )


@pytest.mark.parametrize(("paper", "name"), TABLES)
def test_every_table_is_a_contest_that_parses_whole_and_quick(paper, name):
    config = PAPERS[paper].tables[name].config
    whole, quick = settings_of(config), settings_of(config, QUICK)
    for one in entrants_of(whole.methods, own_amounts=whole.amounts is None):
        one.check()
    assert json.loads(json.dumps(whole.to_dict()))["methods"] == whole.methods
    assert whole.published == f"{paper}.{name}"
    assert whole.data.num_windows is None, "papers measure the whole text"
    assert whole.methods == quick.methods
    assert (whole.amounts, whole.zeros) == (quick.amounts, quick.zeros)
    assert quick.model.name == "smollm2-135m"
    assert [*quick.data.texts] == ["wikitext2", "instructions"]
    text = (files("prunelight.configs") / "papers" / config).read_text(encoding="utf-8")
    assert f"prunelight reproduce {paper} --table {name}" in text


def test_every_config_of_a_table_is_in_the_catalogue():
    folder = Path(str(files("prunelight.configs"))) / "papers"
    known = {table.config for of in PAPERS.values() for table in of.tables.values()}
    assert {file.name for file in folder.glob("reproduce_*.yaml")} == {*known, QUICK}


@pytest.mark.parametrize(("paper", "name"), TABLES)
def test_published_rows_are_those_of_the_contest(paper, name):
    given = settings_of(table_of(paper, name)[1].config)
    rows = entrants_of(given.methods, own_amounts=given.amounts is None)
    labels = {one.label for one in rows}
    for published in published_tables(f"{paper}.{name}"):
        assert {*published.rows} - NOT_HERE <= labels
        assert all(len(row) == len(published.models) for row in published.rows.values())
        assert published.source
        assert published.protocol
        assert published.measure in ("perplexity", "accuracy")
    assert notes_of(f"{paper}.{name}")


def test_a_model_is_found_in_the_papers_columns_by_its_name():
    table = published_tables("dlp.perplexity")[0]
    assert table.column_of("meta-llama/Llama-2-7b-hf") == "Llama-2-7B"
    assert table.column_of("/models/meta-llama/Llama-2-7b-hf/") == "Llama-2-7B"
    assert table.column_of("smollm2-135m") is None


def test_figures_of_no_paper_are_refused():
    with pytest.raises(ValueError, match=r"published='owl.x' must be PAPER.TABLE"):
        published_tables("owl.x")
    with pytest.raises(ValueError, match=r"published='dlp.alfa' must be one of .*you mean dlp.al"):
        published_tables("dlp.alfa")
    with pytest.raises(ValueError, match=r"published='dlp' must be one of dlp.perplexity, "):
        published_tables("dlp")


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("reproduce dlpp", "there is no paper 'dlpp'; did you mean dlp?"),
        ("reproduce dlp --table alfa", "table='alfa' is none of dlp; did you mean alpha?"),
        ("reproduce", "the following arguments are required: paper"),
        ("reproduce dlp --quick --amountz 3", "there is no option amountz"),
    ],
)
def test_what_there_is_not_is_one_line(command, fault, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(command.split())
    assert stopped.value.code == 2
    assert fault in capsys.readouterr().err.splitlines()[-1]


def test_a_table_ends_in_a_page_with_the_papers_figures_beside_ours(tmp_path, monkeypatch, capsys):
    model = write_model(tmp_path / "meta-llama" / "Llama-2-7b-hf")
    monkeypatch.chdir(tmp_path)
    options = ["--model.name", model, "--data.seq_len", "32", "--data.num_windows", "4"]
    main(["reproduce", "dlp", "--quick", *options])
    out = tmp_path / "runs" / "reproduce" / "dlp-perplexity-quick"
    told = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    ours = {row["label"]: row["perplexity"]["wikitext2"][0] for row in told["rows"]}
    lines = (out / "comparison.md").read_text(encoding="utf-8").splitlines()
    (head,) = [line for line in lines if line.startswith("| method | here: ")][:1]
    assert "Llama-2-7B (this model)" in head
    (row,) = [line for line in lines if line.startswith("| Wanda, DLP | ") and "22.79" in line]
    assert f"| Wanda, DLP | {ours['Wanda, DLP']:.2f} | 20.46 |" in row
    page = (out / "report.html").read_text(encoding="utf-8")
    for word in ("What the paper published", "22.79", "arXiv:2505.23807", "4 windows of 32 tokens"):
        assert word in page
    assert "prunelight reproduce dlp --quick" in page
    capsys.readouterr()
    monkeypatch.setattr("prunelight.comparison.running.bench.load", None)  # all is there
    main(["reproduce", "dlp", "--quick", *options])
