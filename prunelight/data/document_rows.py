"""Several documents in one training row, filled by best fit (Ding et al., arXiv:2404.10830).

The longest document is placed first. Positions restart at 0 with each document. The check that a
model then keeps the documents of a row apart is in `prunelight/recovery/packed_rows.py`.
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
    tokens: Sequence[int] | Tensor, seq_len: int, *, bos_token_id: int | None = None
) -> list[Tensor]:
    """Cut one document into pieces of at most `seq_len` tokens, int32 (T,).

    Each piece starts with `bos_token_id`, if one is given. A piece of one token, which predicts
    nothing, is left out.
    """
    ids = torch.as_tensor(tokens, dtype=torch.int32)
    bos = ids.new_tensor([] if bos_token_id is None else [bos_token_id])
    pieces = (torch.cat([bos, piece]) for piece in ids.split(seq_len - len(bos)))
    return [piece for piece in pieces if len(piece) > 1]


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Assign documents to rows: the longest first, each to the fullest row that has room for it.

    Args:
        lengths: length of each document in tokens, at most `capacity`.
        capacity: tokens that fit in a row.

    Returns:
        For each row the indices of its documents. The same lengths always give the same rows.
    """
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # free tokens and index of each row, the fullest row first
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        best = bisect_left(spaces, (lengths[index], 0))
        space, row = spaces.pop(best) if best < len(spaces) else (capacity, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        insort(spaces, (space - lengths[index], row))
    return rows


def pack_documents(
    documents: Sequence[tuple[Tensor, Tensor]], seq_len: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Pack documents into rows of at most `seq_len` tokens.

    Args:
        documents: token ids and labels of each document, (T,), of one type of whole numbers.
        seq_len: the most tokens of a row.

    Returns:
        Token ids, labels and positions of each row, (T,), of the same type. The label of a
        document's first token is -100: a token of another document must not predict it.
        Positions start at 0 with each document.
    """
    rows = []
    for row in best_fit([len(ids) for ids, _ in documents], seq_len):
        labels = [documents[index][1].clone() for index in row]
        for part in labels:
            part[0] = IGNORED_LABEL
        ids = [documents[index][0] for index in row]
        positions = [torch.arange(len(part), dtype=part.dtype) for part in ids]
        rows.append((torch.cat(ids), torch.cat(labels), torch.cat(positions)))
    return rows
