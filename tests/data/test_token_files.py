"""Examples that go through a file are those that were written."""

import pytest
import torch

from prunelight.data.token_files import read_examples, write_examples


def example(*lengths, parts):
    ids = torch.arange(sum(lengths), dtype=torch.int32)
    labels = ids if parts == "text" else ids.clone().neg()
    positions = [torch.arange(len(ids), dtype=torch.int32)] if parts == "packed" else []
    return (ids, labels, *positions)


@pytest.mark.parametrize("parts", ["text", "instructions", "packed"])
def test_examples_are_the_same_after_a_file(parts, tmp_path):
    file = tmp_path / "examples.safetensors"
    examples = [example(length, parts=parts) for length in (5, 1, 9)]
    write_examples(examples, "joined by blank lines", file)
    again, joined = read_examples(file)
    assert joined == "joined by blank lines"
    assert len(again) == 3
    for one, other in zip(examples, again, strict=True):
        assert len(one) == len(other)
        assert all(map(torch.equal, one, other))
        assert all(part.dtype == torch.int32 for part in other)
        assert (other[0] is other[1]) == (parts == "text")


def test_text_and_instructions_in_one_file_keep_their_labels(tmp_path):
    examples = [example(4, parts="text"), example(3, parts="instructions")]
    write_examples(examples, "", tmp_path / "both.safetensors")
    again, _ = read_examples(tmp_path / "both.safetensors")
    for one, other in zip(examples, again, strict=True):
        assert all(map(torch.equal, one, other))


def test_a_file_stays_readable_when_it_is_removed(tmp_path):
    file = tmp_path / "examples.safetensors"
    write_examples([example(4, parts="text")], "", file)
    again, _ = read_examples(file)
    file.unlink()
    assert again[0][0].tolist() == [0, 1, 2, 3]
