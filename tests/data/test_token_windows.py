"""Windows of token ids: how text is packed, drawn and marked."""

import json
import logging

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
import torch
from text_tokenizers import ALPACA, CHAT, CHATML, PAIR, make_tokenizer, sample

from prunelight.data.instructions import instruction_example
from prunelight.data.sources import read_documents
from prunelight.data.token_windows import (
    calibration_windows,
    pack_windows,
    tokenize,
    tokenize_documents,
)
from prunelight.losses import IGNORED_LABEL


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


TEXT = sample("calibration")[:20_000]


# --- windows


def test_the_same_seed_gives_the_same_windows_and_another_seed_others():
    tokenizer = make_tokenizer()
    first, again, other = (
        calibration_windows(tokenizer, TEXT, 8, 64, seed=seed) for seed in (3, 3, 4)
    )
    assert first.shape == (8, 64)
    assert first.dtype == torch.long
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_drawing_windows_leaves_the_global_random_state_alone():
    before = torch.random.get_rng_state()
    calibration_windows(make_tokenizer(), TEXT, 8, 64)
    assert torch.equal(before, torch.random.get_rng_state())


def test_all_windows_together_are_the_text_so_they_do_not_overlap():
    tokenizer = make_tokenizer()
    stream = tokenize_documents(tokenizer, [TEXT])
    count = len(stream) // 64
    windows = calibration_windows(tokenizer, TEXT, count, 64)
    expected = [tuple(stream[i * 64 : (i + 1) * 64]) for i in range(count)]
    assert sorted(map(tuple, windows.tolist())) == sorted(expected)


def test_packing_keeps_every_token_of_the_windows_in_order():
    assert pack_windows(range(11), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert pack_windows(range(11), 4, bos_token_id=99).tolist() == [
        [99, 0, 1, 2],
        [99, 3, 4, 5],
        [99, 6, 7, 8],
    ]
    assert pack_windows([], 4).shape == (0, 4)


def test_every_window_starts_with_bos_when_asked():
    tokenizer = make_tokenizer(bos_token="<s>")
    windows = calibration_windows(tokenizer, TEXT, 5, 32, bos="always")
    assert (windows[:, 0] == tokenizer.bos_token_id).all()
    assert (windows[:, 1:] != tokenizer.bos_token_id).all()
    assert windows.shape == (5, 32)


def test_bos_auto_means_always_for_gemma_and_never_for_others():
    gemma, llama = make_tokenizer(bos_token="<bos>"), make_tokenizer(bos_token="<s>")
    assert (calibration_windows(gemma, TEXT, 5, 32)[:, 0] == gemma.bos_token_id).all()
    assert (calibration_windows(gemma, TEXT, 5, 32, bos="never") != gemma.bos_token_id).all()
    assert (calibration_windows(llama, TEXT, 5, 32) != llama.bos_token_id).all()


def test_documents_are_joined_by_eos_and_blank_ones_are_skipped():
    tokenizer = make_tokenizer()
    one, two = tokenize(tokenizer, ["one", "two"])
    stream = tokenize_documents(tokenizer, ["one", " \n", "two"])
    assert stream == [*one, tokenizer.eos_token_id, *two]
    assert tokenize_documents(make_tokenizer(eos_token=None), ["one", "two"]) == one + two
    assert tokenize_documents(tokenizer, ["", " "]) == []


def test_a_list_of_one_document_equals_the_document():
    tokenizer = make_tokenizer()
    assert torch.equal(
        calibration_windows(tokenizer, TEXT, 4, 32), calibration_windows(tokenizer, [TEXT], 4, 32)
    )


def test_long_text_gives_no_warning_about_the_model_maximum(caplog):
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 16
    with caplog.at_level(logging.WARNING):
        calibration_windows(tokenizer, [TEXT, TEXT], 4, 32)
    assert not caplog.records


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 0}, r"num_samples=0 must be at least 1"),
        ({"seq_len": 1}, r"seq_len=1 must be at least 2"),
        ({"bos": "maybe"}, r"bos='maybe' must be 'auto', 'always' or 'never'"),
        ({"bos": "always"}, r"bos='always' needs a tokenizer with a BOS token; set bos='auto'"),
        ({"text": "hello", "num_samples": 3}, r"holds 0 windows but num_samples=3 were asked"),
        (
            {"text": "a b " * 40, "seq_len": 32},
            r"holds \d windows but num_samples=128 .*; give more",
        ),
    ],
)
def test_bad_window_arguments_are_named(arguments, message):
    defaults = {"text": TEXT, "num_samples": 128, "seq_len": 16}
    with pytest.raises(ValueError, match=message):
        calibration_windows(make_tokenizer(), **{**defaults, **arguments})


# --- sources


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
        ("a.jsonl", b'"text"\n', r"row 0 must be an object with fields: 'text'"),
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


# --- instructions


def split_by_labels(tokenizer, row, seq_len=256):
    tokens, labels = instruction_example(row, tokenizer, seq_len=seq_len)
    assert len(tokens) == len(labels)
    prompt = [t for t, label in zip(tokens, labels, strict=True) if label == IGNORED_LABEL]
    response = [label for label in labels if label != IGNORED_LABEL]
    assert prompt + response == tokens  # the loss is on one stretch, at the end, on the tokens
    return tokenizer.decode(prompt), tokenizer.decode(response)


def test_without_a_chat_template_instructions_get_the_alpaca_template():
    prompt, response = split_by_labels(make_tokenizer(), ALPACA)
    assert prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd the numbers.\n\n### Input:\n1 and 2\n\n### Response:\n"
    )
    assert response == "The sum is 3.</s>"


@pytest.mark.parametrize("given", [{}, {"input": ""}, {"input": None}])
def test_the_alpaca_template_leaves_out_an_empty_input(given):
    row = {"instruction": "Count {x}.", "output": "One.", **given}
    prompt, _ = split_by_labels(make_tokenizer(), row)
    assert prompt.endswith("request.\n\n### Instruction:\nCount {x}.\n\n### Response:\n")
    assert "paired" not in prompt


def test_without_a_chat_template_other_rows_are_plain_text():
    assert split_by_labels(make_tokenizer(), PAIR) == ("The capital of France is", " Paris.</s>")
    prompt, response = split_by_labels(make_tokenizer(), CHAT)
    assert prompt == "Hello\n\nGood day.\n\nWho are you?\n\n"
    assert response == "A parrot.</s>"


@pytest.mark.parametrize("row", [ALPACA, PAIR, CHAT])
def test_with_a_chat_template_only_the_last_reply_is_learned(row):
    tokenizer = make_tokenizer(chat_template=CHATML)
    prompt, response = split_by_labels(tokenizer, row)
    assert prompt.startswith("<|im_start|>system\nBe kind.</s>\n<|im_start|>user\n")
    assert prompt.endswith("</s>\n<|im_start|>assistant\n")
    reply = {id(ALPACA): "The sum is 3.", id(PAIR): " Paris.", id(CHAT): "A parrot."}[id(row)]
    assert response == f"{reply}</s>\n"  # the template's eos, not a second one


def test_eos_is_added_where_the_template_gives_none():
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    _, response = split_by_labels(make_tokenizer(chat_template=template), CHAT)
    assert response == "A parrot.\n</s>"
    without_eos = make_tokenizer(eos_token=None, chat_template=template)
    assert split_by_labels(without_eos, CHAT)[1] == "A parrot.\n"


def test_a_template_that_rewrites_the_prompt_falls_back_to_prompt_and_reply():
    template = "{% for m in messages %}{{ m.role }}\n{{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant\n<think>\n{% endif %}"
    prompt, response = split_by_labels(make_tokenizer(chat_template=template), CHAT)
    assert prompt.endswith("assistant\n<think>\n")
    assert response == "A parrot.</s>"


def test_a_joint_inside_a_token_keeps_the_tokens_of_the_prompt():
    tokenizer = make_tokenizer()
    row = {"prompt": "I like th", "response": "e sea"}
    assert len(tokenize(tokenizer, [" the"])[0]) == 1  # so that the joint is inside a token
    assert split_by_labels(tokenizer, row) == ("I like th", "e sea</s>")


def test_gemma_instructions_start_with_one_bos():
    tokenizer = make_tokenizer(bos_token="<bos>")
    plain, _ = instruction_example(PAIR, tokenizer, seq_len=64)
    tokenizer.chat_template = "<bos>" + CHATML
    chat, _ = instruction_example(PAIR, tokenizer, seq_len=64)
    for tokens in (plain, chat):
        assert tokens[0] == tokenizer.bos_token_id
        assert tokens.count(tokenizer.bos_token_id) == 1


def test_long_examples_are_cut_to_seq_len():
    tokenizer = make_tokenizer()
    whole, whole_labels = instruction_example(PAIR, tokenizer, seq_len=256)
    tokens, labels = instruction_example(PAIR, tokenizer, seq_len=len(whole) - 1)
    assert tokens == whole[:-1]
    assert labels == whole_labels[:-1]


@pytest.mark.parametrize(
    ("row", "seq_len"),
    [
        (PAIR, 4),
        ({"prompt": "Say nothing.", "response": " \n"}, 256),
        ({"instruction": "Say nothing.", "output": None}, 256),
        ({"messages": []}, 256),
        ({"messages": None}, 256),
        ({"messages": CHAT["messages"][:3]}, 256),
        ({"messages": CHAT["messages"][1:2]}, 256),
    ],
)
def test_rows_without_a_response_that_fits_give_none(row, seq_len):
    for template in (None, CHATML):
        tokenizer = make_tokenizer(chat_template=template)
        assert instruction_example(row, tokenizer, seq_len=seq_len) is None


def test_malformed_messages_are_named():
    row = {"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "Hi"}]}
    with pytest.raises(ValueError, match=r"message .*None.* must have strings as role and content"):
        instruction_example(row, make_tokenizer(), seq_len=64)


def test_a_chat_template_that_refuses_the_roles_is_named():
    tokenizer = make_tokenizer(chat_template="{{ raise_exception('no such role') }}")
    with pytest.raises(ValueError, match=r"refuses .*no such role.*; change the rows or set"):
        instruction_example(PAIR, tokenizer, seq_len=64)
