"""Texts become token windows that never overlap.

Each document is tokenised whole, since chunks would give other tokens at their ends. The EOS token
joins the documents. Perplexity of the Gemma family explodes without a BOS token, so `bos="auto"`
starts each window of that family with BOS. Other families get no BOS, as in the pruning papers.
"""

# N windows, T seq_len, S tokens of a stream

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

Bos = Literal["auto", "always", "never"]

# Documents that are Python integers at a time: these take ten times the bytes of a token here.
_DOCUMENTS_AT_ONCE = 256


def calibration_windows(
    tokenizer: PreTrainedTokenizerBase,
    text: str | Sequence[str],
    num_samples: int = 128,
    seq_len: int = 2048,
    *,
    seed: int = 0,
    bos: Bos = "auto",
) -> Tensor:
    """Draw non-overlapping token windows from a text; the same seed gives the same windows.

    Args:
        tokenizer: the model's tokenizer.
        text: one document, or several documents, which the EOS token joins.
        num_samples: windows to draw; SparseGPT, Wanda and DLP use 128 windows of 2048 tokens.
        seq_len: tokens of a window; a BOS token counts.
        seed: seed of a private generator; the global random state is neither read nor changed.
        bos: "always" starts every window with the BOS token, "never" adds none, "auto" is "always"
            for tokenizers of the Gemma family (BOS token `<bos>`) and "never" for others.

    Returns:
        LongTensor (num_samples, seq_len).

    Raises:
        ValueError: if a number is out of range, the text holds fewer windows than `num_samples`, or
            `bos` is "always" and the tokenizer has no BOS token.
    """
    stream = tokenize_documents(tokenizer, [text] if isinstance(text, str) else text)
    windows = pack_windows(stream, seq_len, bos_token_id=bos_token_id(tokenizer, bos))  # (N, T)
    return windows[sample_indices(len(windows), num_samples, seed=seed)].long()


def bos_token_id(tokenizer: PreTrainedTokenizerBase, bos: Bos) -> int | None:
    """Return the token that must start every window, or None.

    Raises:
        ValueError: if `bos` is no known choice, or is "always" and the tokenizer has no BOS token.
    """
    if bos not in ("auto", "always", "never"):
        raise ValueError(f"bos={bos!r} must be 'auto', 'always' or 'never'")
    if bos == "always" and tokenizer.bos_token_id is None:
        raise ValueError("bos='always' needs a tokenizer with a BOS token; set bos='auto'")
    starts_with_bos = bos == "always" or (bos == "auto" and tokenizer.bos_token == "<bos>")
    return tokenizer.bos_token_id if starts_with_bos else None


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each text, without special tokens or a warning about long texts."""
    encode = partial(tokenizer.__call__, add_special_tokens=False, verbose=False)
    return encode([*texts])["input_ids"] if texts else []


def tokenized(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Iterator[Tensor]:
    """Yield the token ids of each text that is not blank, int32 (T,): 4 bytes a token."""
    texts = [text for text in texts if text.strip()]
    for start in range(0, len(texts), _DOCUMENTS_AT_ONCE):
        for ids in tokenize(tokenizer, texts[start : start + _DOCUMENTS_AT_ONCE]):
            yield torch.tensor(ids, dtype=torch.int32)


def tokenize_documents(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Tensor:
    """Return one token stream, int32 (S,): the documents that are not blank, joined by EOS."""
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    end = torch.tensor(eos, dtype=torch.int32)
    parts = [part for ids in tokenized(tokenizer, texts) for part in (end, ids)]
    return torch.cat(parts[1:]) if parts else end[:0]  # no EOS before the first one


def pack_windows(
    tokens: Sequence[int] | Tensor, seq_len: int, *, bos_token_id: int | None = None
) -> Tensor:
    """Cut a token stream, (S,), into consecutive windows, (N, seq_len), int64 or as the stream is.

    With `bos_token_id` each window is that token and seq_len - 1 tokens of the stream. Tokens at
    the end of the stream that do not fill a window are left out.

    Raises:
        ValueError: if `seq_len` is below 2.
    """
    if seq_len < 2:
        raise ValueError(f"seq_len={seq_len} must be at least 2: one token predicts the next")
    width = seq_len if bos_token_id is None else seq_len - 1
    whole = tokens[: len(tokens) // width * width]
    windows = whole if isinstance(whole, Tensor) else torch.tensor(whole).long()
    windows = windows.view(-1, width)
    return windows if bos_token_id is None else pad(windows, (1, 0), value=bos_token_id)


def sample_indices(available: int, num_samples: int, *, seed: int) -> Tensor:
    """Draw `num_samples` different indices below `available`, in random order, LongTensor (N,).

    Raises:
        ValueError: if `num_samples` is below 1 or above `available`.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples} must be at least 1; the default is 128")
    if num_samples > available:
        raise ValueError(
            f"the text holds {available} windows but num_samples={num_samples} were asked for; "
            "give more text, or lower num_samples or seq_len"
        )
    return torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:num_samples]
