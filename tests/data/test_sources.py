"""Where text comes from: the bundled samples, files and datasets."""

import json

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from text_tokenizers import make_tokenizer, sample

from prunelight.data.instructions import instruction_example
from prunelight.data.sources import read_documents
from prunelight.losses import IGNORED_LABEL


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    ("name", "articles"), [("train", 20), ("calibration", 5), ("validation", 6)]
)
def test_the_bundled_samples_are_whole_articles(name, articles):
    (row,) = read_documents(f"sample:{name}")
    assert row["text"] == sample(name)
    lines = row["text"].split("\n")
    assert lines[1].startswith(" = ")
    titles = [s for s in lines if s.startswith(" = ") and s[3] != "=" and " ; " not in s]
    assert len(titles) == articles


def test_the_bundled_instructions_all_become_examples_of_the_alpaca_template():
    rows = read_documents("sample:instructions")
    assert len(rows) == 175
    tokenizer = make_tokenizer()
    examples = [instruction_example(row, tokenizer, seq_len=4096) for row in rows]
    assert all(labels[-1] != IGNORED_LABEL for _, labels in examples)


def test_the_bundled_samples_share_no_article():
    titles = [
        line
        for name in ("train", "calibration", "validation")
        for line in sample(name).split("\n")
        if line.startswith(" = ") and line[3] != "="
    ]
    assert len(titles) == len(set(titles))


def test_a_text_file_is_one_document_in_the_asked_field(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\ufeffHéllo\nworld\n", encoding="utf-8")
    assert read_documents(str(path), text_field="body") == [{"body": "Héllo\nworld\n"}]


def test_jsonl_json_and_parquet_give_the_same_rows(tmp_path):
    rows = [{"text": "one\u2028line", "id": 1}, {"text": "two", "id": 2}]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "a.jsonl").write_text(lines + "\n\n", encoding="utf-8")
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    for name in ("a.jsonl", "b.json", "c.parquet"):
        assert read_documents(str(tmp_path / name)) == rows


def test_the_lines_of_one_text_are_joined_again(tmp_path):
    lines = ["", " = Title = \n", "", " First . \n"]
    table = pyarrow.Table.from_pylist([{"text": line} for line in lines])
    pyarrow.parquet.write_table(table, tmp_path / "wikitext.parquet")
    (row,) = read_documents(str(tmp_path / "wikitext.parquet"))
    assert row["text"] == " \n = Title = \n \n First . \n"


def test_a_dataset_name_is_read_with_its_config_and_split(tmp_path, monkeypatch):
    asked = []

    def load_dataset(*args, split):
        asked.append((*args, split))
        return datasets.Dataset.from_list([{"text": "hello"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_documents("some/name", split="validation") == [{"text": "hello"}]
    read_documents("wikitext:wikitext-2-raw-v1")
    read_documents("wikitext:wikitext-2-raw-v1[test]")
    read_documents("name[train[:1%]]")
    assert asked == [
        ("some/name", None, "validation"),
        ("wikitext", "wikitext-2-raw-v1", "train"),
        ("wikitext", "wikitext-2-raw-v1", "test"),
        ("name", None, "train[:1%]"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a\.txt is empty; give a source that holds text"),
        ("a.txt", b" \n \n", r"a\.txt is empty"),
        ("a.txt", b"GGUF\0\0\1", r"a\.txt is not UTF-8 text \(it holds NUL bytes\); give another"),
        ("a.txt", "é".encode("latin-1"), r"a\.txt is not UTF-8 text"),
        ("a.csv", b"text\nhello\n", r"a\.csv' must be a file that ends in \.txt, \.jsonl"),
        ("a.jsonl", b"", r"a\.jsonl is empty"),
        ("a.jsonl", b"{oops\n", r"a\.jsonl is not \.jsonl data"),
        ("a.jsonl", b"[1]\n", r"row 0 must be an object with fields, or a text: it is of type int"),
        ("a.json", b"[]", r"a\.json is empty"),
        ("a.parquet", b"PAR0", r"a\.parquet is not \.parquet data"),
        (
            "a.jsonl",
            b'{"b": 1, "a": "x"}\n',
            r"row 0 has no text in field 'text'.*\['a', 'b'\]; set",
        ),
        ("a.jsonl", b'{"text": "x"}\n{"text": null}\n', r"row 1 has no text in field 'text'"),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_documents(str(tmp_path / name))


def test_a_directory_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be a file that ends in"):
        read_documents(str(tmp_path))


@pytest.mark.parametrize("source", ["none.txt", "data/none.jsonl", "/no/where", "./none", "~/none"])
def test_a_path_that_does_not_exist_is_not_taken_for_a_dataset(source):
    with pytest.raises(FileNotFoundError, match=r"does not exist; check the path"):
        read_documents(source)


def test_an_unknown_sample_is_named():
    with pytest.raises(ValueError, match=r"'sample:test' is no bundled sample; .* sample:train"):
        read_documents("sample:test")


@pytest.mark.parametrize("source", ["nobody/nothing", "nobody/nothing:config[test]", "a:b:c["])
def test_a_dataset_that_cannot_be_loaded_is_named(no_hub, source):
    with pytest.raises(ValueError, match=r"is neither a file nor a dataset .*; give a local file"):
        read_documents(source)
