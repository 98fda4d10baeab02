"""Windows of token ids: how text is packed and drawn."""

import logging
import tracemalloc

import pytest
import torch
from text_tokenizers import make_tokenizer, sample

from prunelight.data import token_windows
from prunelight.data.token_windows import (
    calibration_windows,
    pack_windows,
    tokenize,
    tokenize_documents,
)

TEXT = sample("calibration")[:20_000]


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
    expected = [tuple(window.tolist()) for window in stream.split(64)[:count]]
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
    assert stream.tolist() == [*one, tokenizer.eos_token_id, *two]
    without_eos = tokenize_documents(make_tokenizer(eos_token=None), ["one", "two"])
    assert without_eos.tolist() == one + two
    assert tokenize_documents(tokenizer, ["", " "]).tolist() == []


def test_a_token_takes_four_bytes_and_never_all_are_python_integers_at_once(monkeypatch):
    monkeypatch.setattr(token_windows, "_DOCUMENTS_AT_ONCE", 8)
    tokenizer = make_tokenizer()
    tracemalloc.start()
    try:
        stream = tokenize_documents(tokenizer, [TEXT[:2000]] * 400)
        _, peak = tracemalloc.get_traced_memory()  # of Python's objects: tensors are not among them
    finally:
        tracemalloc.stop()
    assert stream.element_size() == 4
    assert pack_windows(stream, 64).data_ptr() == stream.data_ptr(), "and windows no more"
    assert peak < 2 * len(stream), "a list alone has 8 bytes a token, and needs two of them"


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
