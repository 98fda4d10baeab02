"""Several documents in one training row, filled by best fit (Ding et al., arXiv:2404.10830).

The longest document comes first. Positions start over with each document; recovery/packed_rows.py
checks that a model then keeps the documents apart.
"""

# T tokens

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import torch
from torch import Tensor

from prunelight.losses import IGNORED_LABEL

PACKINGS = ("stream", "documents")


def cut_document(
    tokens: Sequence[int], seq_len: int, *, bos_token_id: int | None = None
) -> list[Tensor]:
    """Cut one document into pieces of at most `seq_len` tokens, LongTensors (T,).

    With `bos_token_id` each piece starts with it. A piece that would predict nothing is left out.
    """
    start = [] if bos_token_id is None else [bos_token_id]
    width = seq_len - len(start)
    pieces = ([*start, *tokens[at : at + width]] for at in range(0, len(tokens), width))
    return [torch.tensor(piece) for piece in pieces if len(piece) > 1]


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Fill rows: longest first, each into the fullest row that still has room.

    Args:
        lengths: of the documents in tokens, each at most `capacity`.
        capacity: tokens of a row.

    Returns:
        The indices of the documents in each row; the same lengths always give the same rows.
    """
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # room left and index of a row, in order
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(spaces, (lengths[index], 0))
        space, row = spaces.pop(at) if at < len(spaces) else (capacity, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        insort(spaces, (space - lengths[index], row))
    return rows


def pack_documents(
    documents: Sequence[tuple[Tensor, Tensor]], seq_len: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Put documents into rows of at most `seq_len` tokens.

    Args:
        documents: token ids and labels of each, LongTensors (T,).
        seq_len: the most tokens of a row.

    Returns:
        Of each row: token ids, labels (-100 on the first token of a document: the one before must
        not predict it) and positions, which start at 0 with each document. LongTensors (T,).
    """
    rows = []
    for row in best_fit([len(ids) for ids, _ in documents], seq_len):
        labels = [documents[index][1].clone() for index in row]
        for part in labels:
            part[0] = IGNORED_LABEL
        ids = [documents[index][0] for index in row]
        positions = [torch.arange(len(part)) for part in ids]
        rows.append((torch.cat(ids), torch.cat(labels), torch.cat(positions)))
    return rows
