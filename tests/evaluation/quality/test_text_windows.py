import json

import pytest
import torch
from text_tokenizers import make_tokenizer
from tiny import tiny_model
from tokenizers.processors import TemplateProcessing

from prunelight.evaluation.quality.text_quality import text_quality
from prunelight.evaluation.quality.text_windows import (
    TextWindows,
    check_text_length,
    text_windows,
)

WIKI = (
    " \n = River = \n \n The river runs past the mill . \n \n = = Mill = = \n It is old . \n"
) * 20


@pytest.fixture
def tokenizer():
    return make_tokenizer(bos_token="<s>")


def test_wikitext_is_joined_as_the_papers_join_its_rows(tokenizer, tmp_path):
    file = tmp_path / "wiki.txt"
    file.write_text(WIKI, encoding="utf-8")
    rows = ["" if not line.strip() else f"{line}\n" for line in WIKI.split("\n")[:-1]]
    ids = tokenizer("\n\n".join(rows))["input_ids"]
    windows = text_windows(tokenizer, file, 16)
    assert windows.ids.flatten().tolist() == ids[: len(ids) // 16 * 16]
    assert windows.protocol.startswith("WikiText's rows joined by a blank line; ")
    assert windows.text == "wiki.txt"


def test_another_text_stays_as_it_stands(tokenizer, tmp_path):
    file = tmp_path / "own.txt"
    text = "The river runs.\n\nIt is old.\n" * 30
    file.write_text(text, encoding="utf-8")
    windows = text_windows(tokenizer, str(file), 16)
    ids = tokenizer(text)["input_ids"]
    assert windows.ids.flatten().tolist() == ids[: len(ids) // 16 * 16]
    assert windows.protocol.startswith("one text as it stands")


def test_documents_are_joined_by_a_blank_line(tokenizer, tmp_path):
    texts = ["The river runs past the old mill.", "And down to the sea."] * 9
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    windows = text_windows(tokenizer, file, 8, max_windows=2)
    ids = tokenizer("\n\n".join(texts))["input_ids"]
    assert windows.ids.tolist() == [ids[:8], ids[8:16]]
    assert windows.protocol.startswith("18 documents joined by a blank line; 2 of ")


def test_each_window_can_start_with_a_bos_token(tokenizer, tmp_path):
    file = tmp_path / "own.txt"
    file.write_text("The river runs. " * 30, encoding="utf-8")
    windows = text_windows(tokenizer, file, 8, bos="always")
    assert set(windows.ids[:, 0].tolist()) == {tokenizer.bos_token_id}
    assert "each behind a BOS token" in windows.protocol


def test_a_bundled_sample_keeps_its_name(tokenizer):
    windows = text_windows(tokenizer, "sample:validation", 64, max_windows=3)
    assert windows.text == "sample:validation"
    assert windows.ids.shape == (3, 64)
    assert windows.ids.dtype == torch.long


def test_texts_that_cannot_be_measured_are_refused(tokenizer, tmp_path):
    file = tmp_path / "short.txt"
    file.write_text("Too short.", encoding="utf-8")
    with pytest.raises(ValueError, match=r"fill no window of seq_len=512; give more text or a"):
        text_windows(tokenizer, file, 512)
    with pytest.raises(ValueError, match="holds instructions; perplexity is measured on text"):
        text_windows(tokenizer, "sample:instructions", 8)
    with pytest.raises(ValueError, match="max_windows=0 must be at least 1"):
        text_windows(tokenizer, file, 8, max_windows=0)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        text_windows(tokenizer, tmp_path / "none.txt", 8)
    check_text_length(64, None)
    check_text_length(64, 64)
    with pytest.raises(ValueError, match="seq_len=64 must be at most 32, the model's context"):
        check_text_length(64, 32)


def test_the_tail_is_left_out_as_in_the_papers_or_kept_as_a_shorter_window(tokenizer, tmp_path):
    file = tmp_path / "own.txt"
    text = "The river runs past the old mill. " * 9
    file.write_text(text, encoding="utf-8")
    ids = tokenizer(text)["input_ids"]
    left = len(ids) % 16
    assert left > 1
    windows = text_windows(tokenizer, file, 16)
    assert windows.labels is None
    assert f"; {left} tokens that fill no window are left out" in windows.protocol
    kept = text_windows(tokenizer, file, 16, keep_tail=True)
    assert f"the last one of {left};" in kept.protocol
    assert kept.labels[kept.labels != -100].tolist() == ids
    assert kept.ids[kept.labels != -100].tolist() == ids
    short = text_windows(tokenizer, file, 4096, keep_tail=True)
    assert short.ids.shape == (1, 4096)
    assert text_windows(tokenizer, file, 16, keep_tail=True, max_windows=1).labels is None


def test_a_shorter_last_window_counts_what_a_window_of_its_tokens_alone_counts(tokenizer, tmp_path):
    file = tmp_path / "own.txt"
    file.write_text("The river runs past the old mill. " * 9, encoding="utf-8")
    model = tiny_model("llama", vocab_size=len(tokenizer))
    kept = text_windows(tokenizer, file, 16, keep_tail=True)
    quality = text_quality(model, kept)
    last = kept.ids[-1:][kept.labels[-1:] != -100][None]
    alone = text_quality(model, TextWindows("text", "protocol", last))
    assert quality.window_tokens == [15] * (len(kept.ids) - 1) + [last.shape[1] - 1]
    assert quality.window_nll[-1] == pytest.approx(alone.window_nll[0], rel=1e-6)


def test_the_protocol_names_the_special_tokens_of_the_whole_text(tokenizer, tmp_path):
    file = tmp_path / "own.txt"
    file.write_text("The river runs. " * 30, encoding="utf-8")
    assert "special token" not in text_windows(tokenizer, file, 8).protocol
    adding = make_tokenizer(bos_token="<s>")
    adding._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", adding.bos_token_id)]
    )
    windows = text_windows(adding, file, 8)
    assert "1 special token added to the whole text" in windows.protocol
    assert (windows.ids == adding.bos_token_id).sum() == 1
