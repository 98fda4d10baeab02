"""Whatever a file of rows holds: it is read as text, or one line names the file and the row."""

import json

import pytest
from drawn import drawn
from odd_rows import GOOD, ROW_FILES, damaged_files, rows_with_one_odd, write_json_lines
from pyarrow import ArrowException
from text_tokenizers import CHATML, make_tokenizer

from prunelight.data.sources import read_documents
from prunelight.training.text_datamodule import TextDataModule

TOKENIZERS = (make_tokenizer(), make_tokenizer(chat_template=CHATML))


def read(path):
    """Return the examples that training would see, or the line that refuses the file."""
    for tokenizer in TOKENIZERS:
        data = TextDataModule(tokenizer, train=str(path), seq_len=4)
        try:
            data.examples("train")
        except (ValueError, FileNotFoundError) as error:
            return str(error)
    return data.examples("train")


def check(answer, path, index=None):
    if not isinstance(answer, str):
        assert answer
        return
    assert "\n" not in answer
    assert len(answer) < 500
    assert str(path) in answer
    if index is not None:
        assert f"row {index}" in answer


@pytest.mark.parametrize("name", ROW_FILES)
@pytest.mark.parametrize("number", [100, pytest.param(4000, marks=pytest.mark.sweep)])
def test_generated_rows_are_read_or_named(name, number, tmp_path):
    path, counts = tmp_path / name, {True: 0, False: 0}

    @drawn(number)
    def read_or_name(draw):
        rows, index = rows_with_one_odd(draw)
        try:
            ROW_FILES[name](path, rows)
        except (TypeError, ValueError, AttributeError, OverflowError, ArrowException):
            return  # no table holds these rows
        answer = read(path)
        counts[isinstance(answer, str)] += 1
        check(answer, path, None if name == "rows.parquet" else index)

    read_or_name()
    assert min(counts.values()) >= 5


def test_damaged_files_are_read_or_named(tmp_path):
    for name, content, index in damaged_files():
        path = tmp_path / name
        path.write_bytes(content)
        check(read(path), path, index)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (7, "7"),
        (-2.5, "-2.5"),
        ("\ud83d\ude00", "😀"),
        ("a \ud800 b", "a \ufffd b"),
        ("", ""),
    ],
)
def test_numbers_and_surrogates_become_text(value, text, tmp_path):
    write_json_lines(tmp_path / "a.jsonl", [GOOD, {"text": value}])
    assert read_documents(str(tmp_path / "a.jsonl"))[1] == {"text": text}


def test_without_a_row_of_its_own_a_fault_names_its_line(tmp_path):
    (tmp_path / "a.json").write_text('[\n {"text": "a"},\n {"text" "b"}\n]\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"a.json is not .json data \(.* line 3 column"):
        read_documents(str(tmp_path / "a.json"))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, r"row 1 has no text in field 'text', only the fields \['text'\]"),
        (True, r"row 1: field 'text' is a truth value \(true\), which is no text"),
        (["a", "b"], r"row 1: field 'text' is a list \(\[\"a\", \"b\"\]\), which is no text"),
        ({"a": 1}, r"row 1: field 'text' is an object \(\{\"a\": 1\}\), which is no text"),
    ],
)
def test_what_has_no_one_meaning_as_text_is_named(value, said, tmp_path):
    write_json_lines(tmp_path / "a.jsonl", [GOOD, {"text": value}])
    with pytest.raises(ValueError, match=f"a.jsonl.*{said}.*set text_field to the field"):
        read_documents(str(tmp_path / "a.jsonl"))


def test_strings_and_lists_of_messages_are_rows_too(tmp_path):
    messages = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello."}]
    write_json_lines(tmp_path / "a.jsonl", ["a text", messages])
    assert read_documents(str(tmp_path / "a.jsonl")) == [{"text": "a text"}, {"messages": messages}]
    write_json_lines(tmp_path / "b.jsonl", [messages])
    assert read_documents(str(tmp_path / "b.jsonl")) == [{"messages": messages}]


def test_the_parts_of_a_message_are_joined(tmp_path):
    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": ", you."}]
    reply = {"role": "assistant", "content": parts}
    row = {"messages": [{"role": "user", "content": "Greet me."}, reply]}
    write_json_lines(tmp_path / "a.jsonl", [row])
    tokenizer = make_tokenizer()
    data = TextDataModule(tokenizer, train=str(tmp_path / "a.jsonl"), seq_len=64)
    ((_, labels),) = data.examples("train")
    assert tokenizer.decode(labels[labels >= 0]) == "Hello, you.</s>"


def test_a_table_of_texts_and_instructions_keeps_both(tmp_path):
    rows = [{**GOOD, "messages": None}, {"text": None, "prompt": "Hello?", "response": "Hello."}]
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    assert read_documents(str(tmp_path / "a.json")) == [GOOD, rows[1]]


def test_a_row_in_another_line_is_told_with_its_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('\n\n{"text": "a"}\nno\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"a.jsonl is not .jsonl data \(row 1 \(line 4\): Expect"):
        read_documents(str(tmp_path / "a.jsonl"))


def test_a_refusal_of_the_chat_template_names_file_and_row(tmp_path):
    write_json_lines(tmp_path / "a.jsonl", [GOOD, {"prompt": "a", "response": "b"}])
    tokenizer = make_tokenizer(chat_template="{{ raise_exception('no such role') }}")
    with pytest.raises(ValueError, match=r"a.jsonl: row 1: the tokenizer's chat template refuses"):
        TextDataModule(tokenizer, train=str(tmp_path / "a.jsonl"), seq_len=4).examples("train")
