"""Named corpora: what a source names, and how its rows are read here or from the hub's cache."""

import gzip
import json
import logging
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from text_tokenizers import make_tokenizer, sample

from prunelight.data import corpus_reading
from prunelight.data.corpora import CORPORA, corpus_part, is_corpus, wikitext_rows
from prunelight.data.sources import read_documents
from prunelight.evaluation.quality.text_windows import text_windows
from prunelight.training.text_datamodule import TextDataModule


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The directory of PRUNELIGHT_DATA, on a machine without a hub and with an empty cache."""
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("PRUNELIGHT_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "data"


def put(folder, name, rows, field="text"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({field: row}) + "\n" for row in rows), encoding="utf-8")


def put_in_cache(tmp_path, name, split):
    """Return the place of a split in the hub's cache, where `hf download` would have put it."""
    corpus = CORPORA[name]
    repository = tmp_path / "cache" / f"datasets--{corpus.hub_id.replace('/', '--')}"
    commit = "0123456789" * 4 if "/" in corpus.revision else corpus.revision
    if commit != corpus.revision:
        (repository / "refs" / corpus.revision).parent.mkdir(parents=True)
        (repository / "refs" / corpus.revision).write_text(commit)
    path = repository / "snapshots" / commit / corpus.files[split]
    path.parent.mkdir(parents=True)
    return path


@pytest.mark.parametrize(
    ("source", "split", "join", "rows", "revision"),
    [
        ("wikitext2", "test", "blank_lines", (0, None), CORPORA["wikitext2"].revision),
        ("wikitext2:raw", "test", "raw", (0, None), CORPORA["wikitext2"].revision),
        ("wikitext2[validation]@abc", "validation", "blank_lines", (0, None), "abc"),
        ("ptb:blank_lines[validation]", "validation", "blank_lines", (0, None), None),
        ("c4", "validation", "spaces", (0, 1100), None),  # as the papers evaluate on it
        ("c4[validation[:7]]", "validation", "spaces", (0, 7), None),
        ("c4[train]", "train", "documents", (0, None), None),
        ("c4[train[100:300]]", "train", "documents", (100, 300), None),
        ("bookcorpus[train[5:]]", "train", "spaces", (5, None), "refs/convert/parquet"),
    ],
)
def test_what_a_source_names(source, split, join, rows, revision):
    assert is_corpus(source)
    part = corpus_part(source, split="test")
    assert (part.split, part.join, (part.start, part.stop)) == (split, join, rows)
    assert revision in (None, part.revision)


@pytest.mark.parametrize("source", ["wikitext", "c4.txt", "./c4", "allenai/c4:en", "c4s", "sample"])
def test_other_names_are_no_corpora(source):
    assert not is_corpus(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("bookcorpus", r"bookcorpus has no split 'test', only train; write bookcorpus\[train\]"),
        ("wikitext2[dev]", "has no split 'dev', only train, validation, test"),
        ("wikitext2:rows", "cannot be joined by 'rows'; choose blank_lines, spaces, documents, r"),
        ("ptb:raw", "cannot be joined by 'raw'; choose blank_lines, spaces, documents"),
        ("alpaca:spaces[train]", "cannot be joined by 'spaces'; choose documents"),
        ("c4[train[5:5]]", "names no row; give an end above 5"),
        ("c4[train[:10%]]", r"must be written NAME:JOIN\[split\[a:b\]\]@revision"),
        ("c4[", "must be written NAME:JOIN"),
    ],
)
def test_a_source_that_names_nothing_of_a_corpus_is_refused(source, message):
    with pytest.raises(ValueError, match=message):
        read_documents(source, split="test")


def test_wikitext_is_joined_as_the_papers_join_it_from_whatever_file(folder):
    raw = sample("validation")
    rows = wikitext_rows(raw)
    papers = "\n\n".join(rows)
    (folder / "wikitext2").mkdir()
    (folder / "wikitext2" / "test.txt").write_text(raw, encoding="utf-8")
    table = pyarrow.Table.from_pylist([{"text": row} for row in rows])
    pyarrow.parquet.write_table(table, folder / "wikitext2" / "train.parquet")
    put(folder, "wikitext2/validation.jsonl", rows)
    for split in ("test", "train", "validation"):
        assert read_documents("wikitext2", split=split) == [{"text": papers}]
        (whole,) = read_documents(f"wikitext2:raw[{split}]", text_field="body")
        assert whole == {"body": raw}
    assert read_documents("wikitext2:documents[train]") == [
        {"text": row} for row in rows if row.strip()
    ]


def test_a_corpus_says_its_protocol_and_equals_the_file_of_the_same_text(folder):
    (folder / "wikitext2").mkdir()
    path = folder / "wikitext2" / "test.txt"
    path.write_text(sample("validation"), encoding="utf-8")
    tokenizer = make_tokenizer()
    rows = len(wikitext_rows(sample("validation")))
    named = text_windows(tokenizer, "wikitext2", 64)
    assert named.text == "wikitext2"
    assert named.protocol.startswith(f"split test, {rows} rows joined by a blank line; all ")
    assert named.ids.equal(text_windows(tokenizer, path, 64).ids)
    raw = text_windows(tokenizer, "wikitext2:raw", 64)
    assert raw.protocol.startswith(f"split test, {rows} rows joined as they stand; ")
    assert raw.ids.shape != named.ids.shape or not raw.ids.equal(named.ids)


def test_sentences_of_treebank_and_books_are_joined_by_spaces(folder):
    (folder / "ptb").mkdir()
    (folder / "ptb" / "test.txt").write_text(
        " no it was n't \n\n but <unk> was \n", encoding="utf-8"
    )
    assert read_documents("ptb", split="test") == [{"text": "no it was n't but <unk> was"}]
    put(folder, "ptb/validation.jsonl", ["a b", "c"], field="sentence")  # the hub's field
    put(folder, "ptb/train.jsonl", ["a b", "c"])
    assert read_documents("ptb[train]") == read_documents("ptb[validation]") == [{"text": "a b c"}]
    assert read_documents("ptb:blank_lines[train]") == [{"text": "a b\n\nc"}]
    put(folder, "bookcorpus/train.jsonl", ["usually , he would be tearing .", "but not today ."])
    (book,) = read_documents("bookcorpus")
    assert book["text"] == "usually , he would be tearing . but not today ."


def test_alpaca_gives_instructions(folder):
    row = {"instruction": "Add.", "input": "1 1", "output": "2", "text": "all of it"}
    (folder / "alpaca").mkdir()
    (folder / "alpaca" / "train.json").write_text(json.dumps([row]), encoding="utf-8")
    assert read_documents("alpaca") == [row]
    data = TextDataModule(make_tokenizer(), train="alpaca", seq_len=256)
    ((ids, labels),) = data.examples("train")
    assert len(ids) == len(labels)
    assert (labels == -100).any()


def test_a_big_corpus_ends_when_there_is_enough_and_says_so(folder, caplog):
    put(folder, "c4/train.jsonl", [f"{i:04d} " + "x" * 95 for i in range(50)])
    with caplog.at_level(logging.INFO):
        rows = read_documents("c4", enough=250)
    assert [row["text"][:4] for row in rows] == ["0000", "0001", "0002"]
    place = folder / "c4" / "train.jsonl"
    ended = "they are enough, c4[train[:N]] takes N rows"
    assert f"c4 is {place}: split train, 3 rows, each a document; {ended}" in caplog.text
    assert len(read_documents("c4")) == 50
    rows = read_documents("c4[train[10:12]]", enough=1)  # the source itself says how many
    assert [row["text"][:4] for row in rows] == ["0010", "0011"]


def test_c4_is_evaluated_on_the_first_1100_documents_joined_by_spaces(folder):
    put(folder, "c4/validation.jsonl", [f"w{i}" for i in range(1200)])
    (row,) = read_documents("c4", split="test", enough=10)
    assert row["text"] == " ".join(f"w{i}" for i in range(1100))


def test_the_datamodule_reads_as_much_of_a_stream_as_its_windows_need(folder):
    put(folder, "c4/train.jsonl", [sample("train")[i : i + 1000] for i in range(0, 90_000, 1000)])
    tokenizer = make_tokenizer()

    def windows(seed, **more):
        return TextDataModule(
            tokenizer, calibration="c4", num_calibration=4, seq_len=64, seed=seed, **more
        ).calibration_windows()

    assert windows(0).shape == (4, 64)
    assert windows(0).equal(windows(0))
    assert not windows(0).sort(0).values.equal(windows(1).sort(0).values)
    data = TextDataModule(tokenizer, calibration="c4", num_calibration=4, seq_len=64)
    data.calibration_windows()
    read = sum(len(ids) for ids, _ in data.examples("calibration"))
    assert 8 * 4 * 64 <= read < len(tokenizer(sample("train")[:90_000])["input_ids"])


def test_a_gzipped_file_in_the_cache_of_the_hub_is_streamed(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    path = put_in_cache(tmp_path, "c4", "train")
    lines = [json.dumps({"text": f"document {i}", "url": "u"}) for i in range(9)]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    assert read_documents("c4[train[2:4]]") == [{"text": "document 2"}, {"text": "document 3"}]
    assert len(read_documents("c4", enough=25)) == 3
    assert not [*(tmp_path / "datasets").rglob("*.arrow")]  # nothing of it was prepared


def test_a_parquet_copy_in_the_cache_of_the_hub_is_read(folder, tmp_path):
    table = pyarrow.Table.from_pylist([{"sentence": "mr. vinken"}, {"sentence": "is chairman"}])
    pyarrow.parquet.write_table(table, put_in_cache(tmp_path, "ptb", "test"))
    assert read_documents("ptb", split="test") == [{"text": "mr. vinken is chairman"}]


@pytest.mark.parametrize("name", CORPORA)
def test_a_corpus_that_is_not_here_is_one_line_that_names_the_files(folder, name):
    message = rf"the corpus {name} \({CORPORA[name].hub_id}, .*cannot be reached \(.*go online, or "
    with pytest.raises(ValueError, match=message) as raised:
        read_documents(name)
    text = str(raised.value)
    endings = ".parquet, .jsonl, .json" + ("" if name == "alpaca" else ", .txt")
    assert (
        f"put its split train at {folder / name / 'train'} with one of the endings {endings}"
        in (text)
    )
    assert "\n" not in text


def test_without_the_variable_the_line_names_it(folder, monkeypatch):
    monkeypatch.delenv("PRUNELIGHT_DATA")
    message = r"at \$PRUNELIGHT_DATA/ptb/test with .*, where PRUNELIGHT_DATA names a directory"
    with pytest.raises(ValueError, match=message):
        read_documents("ptb", split="test")


def test_a_variable_that_names_no_directory_is_refused(folder, monkeypatch):
    monkeypatch.setenv("PRUNELIGHT_DATA", str(folder / "nowhere"))
    with pytest.raises(
        ValueError, match=r"PRUNELIGHT_DATA=.*nowhere is no directory; name the one"
    ):
        read_documents("ptb", split="test")


def test_a_row_of_a_local_file_without_text_is_named(folder):
    put(folder, "ptb/test.jsonl", ["a"], field="line")
    with pytest.raises(ValueError, match="row 0 has no text in field 'sentence' or 'text'; rename"):
        read_documents("ptb", split="test")


def test_a_damaged_local_file_is_named(folder):
    (folder / "c4").mkdir()
    (folder / "c4" / "train.jsonl").write_text("{oops\n")
    with pytest.raises(ValueError, match=r"train\.jsonl is not \.jsonl data"):
        read_documents("c4")


def test_a_name_near_a_corpus_is_told(folder):
    with pytest.raises(ValueError, match="did you mean the corpus wikitext2"):
        read_documents("wikitext-2")


def test_files_on_the_hub_that_cannot_be_reached_or_are_written_wrongly(folder):
    with pytest.raises(ValueError, match=r"hf://datasets/a/b/c.json.gz' cannot be reached or read"):
        read_documents("hf://datasets/a/b/c.json.gz")
    for source in ("hf://datasets/a", "hf://datasets/a/b/c.pickle"):
        with pytest.raises(ValueError, match="must be hf://datasets/OWNER/NAME@REVISION/PATH"):
            read_documents(source)


def test_files_on_the_hub_are_streamed_with_their_revision(tmp_path, monkeypatch):
    """The hub is a directory here; everything else is that of `datasets`."""
    rows = [{"text": f"{i:03d} " + "y" * 96} for i in range(20)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    asked = []
    load_dataset = datasets.load_dataset

    def local(builder, *, data_files, **arguments):
        asked.append((builder, *data_files))
        return load_dataset(builder, data_files=[str(tmp_path / "a.parquet")], **arguments)

    monkeypatch.setattr(datasets, "load_dataset", local)
    source = "hf://datasets/me/mine@refs%2Fconvert%2Fparquet/x/*.parquet"
    assert len(read_documents(source, enough=450)) == 5
    assert read_documents(f"{source}[3:5]") == rows[3:5]
    assert asked == [("parquet", source)] * 2


def test_every_corpus_ends_by_itself_if_nobody_says_how_much(folder, monkeypatch):
    monkeypatch.setattr(corpus_reading, "MOST_CHARACTERS", 30)
    for name in ("c4", "pg19", "bookcorpus"):
        put(folder, f"{name}/train.jsonl", ["ten  chars"] * 9)
        text = "".join(row["text"] for row in read_documents(name))
        assert text.count("ten") == 3


def test_the_page_on_data_has_each_corpus_as_the_catalogue_has_it():
    page = (Path(__file__).parents[2] / "docs" / "your-model.md").read_text(encoding="utf-8")
    table = page.split("### Corpora by name")[1].split("\n\n")[1]
    for name, corpus in CORPORA.items():
        (row,) = [line for line in table.splitlines() if line.startswith(f"| `{name}` |")]
        assert f"`{corpus.hub_id}`" in row
        assert row.endswith(f"| {corpus.licence} |")
        assert f"| {', '.join(corpus.files)} |" in row
