"""Rows of whole documents: nothing is lost, and none is too long."""

import random

import pytest
import torch
from tiny import token_windows

from prunelight.data.document_rows import best_fit, cut_document, pack_documents
from prunelight.losses import IGNORED_LABEL


def documents(*lengths):
    parts = [token_windows(1, length, seed=length)[0] for length in lengths]
    return [(part, part) for part in parts]


@pytest.mark.parametrize("seed", range(5))
def test_rows_hold_every_document_once_and_none_too_much(seed):
    lengths = [random.Random(seed * 100 + i).randint(1, 64) for i in range(60)]
    rows = best_fit(lengths, 64)
    assert sorted(index for row in rows for index in row) == list(range(60))
    assert all(sum(lengths[index] for index in row) <= 64 for row in rows)
    assert rows == best_fit(lengths, 64)
    # No two rows fit into one: else the second would not have been opened.
    filled = sorted(sum(lengths[index] for index in row) for row in rows)
    assert len(rows) == 1 or filled[0] + filled[1] > 64


def test_a_document_goes_into_the_fullest_row_that_has_room():
    assert best_fit([7, 3, 5, 2], 10) == [[0, 1], [2, 3]]
    assert best_fit([], 10) == []


@pytest.mark.parametrize("bos", [None, 1])
def test_pieces_of_a_long_document_are_that_document(bos):
    tokens = list(range(10, 35))
    pieces = [piece.tolist() for piece in cut_document(tokens, 8, bos_token_id=bos)]
    if bos is not None:
        assert {piece.pop(0) for piece in pieces} == {bos}
    assert max(map(len, pieces)) == 8 - (bos is not None)
    whole = [token for piece in pieces for token in piece]
    assert whole == tokens[: len(whole)]
    assert len(tokens) - len(whole) <= 1  # one token alone predicts nothing


def test_no_document_predicts_the_next_and_positions_start_over():
    given = documents(7, 3, 5)
    for ids, labels, positions in pack_documents(given, 10):
        starts = positions == 0
        assert (labels[starts] == IGNORED_LABEL).all()
        assert torch.equal(labels[~starts], ids[~starts])
        assert torch.equal(positions.diff()[~starts[1:]], torch.ones(int((~starts).sum())).long())
    assert all(torch.equal(ids, labels) for ids, labels in given)  # what was given is unchanged
