"""Tiny models that know the answers of the probes by heart, and text besides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from runs import TEXT
from text_tokenizers import make_tokenizer
from tiny import tiny_model
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunelight.evaluation.probes.probing import probe_rows
from prunelight.losses import IGNORED_LABEL

POSITIONS = 256
KNOWN = ("copying", "counting")


def text_windows(tokenizer: PreTrainedTokenizerBase, length: int = 32) -> Tensor:
    """Return the text of tiny runs as windows (N, length)."""
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def question_rows(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the rows of the probes that the models know."""
    return [row.ids for name in KNOWN for row in probe_rows(name, tokenizer, POSITIONS)]


def train(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], text: Tensor, steps: int
) -> PreTrainedModel:
    """Train a model on rows and on text by heart, in place, and return it in eval mode."""
    length = max(map(len, rows), default=2)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED_LABEL)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = labels[place, : len(row)] = torch.tensor(row)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(steps):
        loss = model(input_ids=text[:4], labels=text[:4]).loss
        if len(rows):
            loss = loss + model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def knowing_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a tiny model that answers the probes and knows the text of tiny runs."""
    tokenizer = make_tokenizer(bos_token="<s>")
    tokens = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = tiny_model(
        vocab_size=len(tokenizer),
        pad_token_id=tokens["eos_token_id"],
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        max_position_embeddings=POSITIONS,
        **tokens,
    )
    text = text_windows(tokenizer)
    return train(model, question_rows(tokenizer), text, steps=150), tokenizer
