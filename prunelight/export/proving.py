"""Whether another program computes from an export what transformers computes from its source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunelight.data.sources import read_documents
from prunelight.data.token_windows import tokenize
from prunelight.export.targets import Bound, Reading
from prunelight.models.families.config_fields import vocabulary_size
from prunelight.models.forward import evaluating
from prunelight.models.sizes import longest_sequence

# T tokens of a window, P positions that were compared, V vocabulary

_TOKENS = 48  # of a window
_LONGEST_WINDOW = 1024  # of attention, that the texts leave; longer ones are not left
_SAMPLE = "sample:validation"


@dataclass(frozen=True)
class Proof:
    """How far an export is from its source: log-probabilities of all tokens, in nats.

    Attributes:
        engine: the program that read the export.
        version: of the program.
        positions: how many were compared.
        largest_difference: of a log-probability, over all positions and tokens.
        mean_kl: mean over positions of KL(source || export).
        same_top: share of positions with the same most probable token.
        note: a limit of the reading; "" for none.
    """

    engine: str
    version: str
    positions: int
    largest_difference: float
    mean_kl: float
    same_top: float
    note: str = ""

    def line(self) -> str:
        """Return the proof in one sentence."""
        return (
            f"{self.engine} {self.version} read it back: mean KL {self.mean_kl:.2g} nats from "
            f"transformers in float32, same most probable token at {self.same_top:.1%} of "
            f"{self.positions} positions, largest difference of a log-probability "
            f"{self.largest_difference:.2g}"
        )


def proof_windows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, longest: int | None = None
) -> list[list[int]]:
    """Return two fixed windows of token ids: real text, and random ids without special tokens.

    Where layers attend to a window of tokens, the texts are longer than it, up to 1,024 tokens.

    Args:
        model: the source.
        tokenizer: of the model.
        longest: tokens of a text that the engine reads as transformers does; None for all.
    """
    window = getattr(model.config, "sliding_window", None) or 0
    length = _TOKENS + (window if window <= _LONGEST_WINDOW else 0)
    length = min(length, longest or length, longest_sequence(model) or length)
    (document,) = read_documents(_SAMPLE)[:1]
    size = vocabulary_size(model)
    (text,) = tokenize(tokenizer, [document["text"][: 40 * length]])
    known = [token for token in text if token < size][:length]
    generator = torch.Generator().manual_seed(0)
    special = {token for token in tokenizer.all_special_ids if token is not None}
    plain = torch.tensor([token for token in range(size) if token not in special])
    drawn = plain[torch.randint(len(plain), (length,), generator=generator)].tolist()
    return [known, drawn] if len(known) > 1 else [drawn]


def source_logits(
    model: PreTrainedModel, windows: Sequence[Sequence[int]]
) -> list[np.ndarray[Any, Any]]:
    """Return the logits that transformers computes for windows, (T, V) each, in float32."""
    with evaluating(model):
        rows = [
            model(torch.tensor([[*window]], device=model.device)).logits[0] for window in windows
        ]
    return [row.float().cpu().numpy() for row in rows]


def compare(reading: Reading, expected: Sequence[np.ndarray[Any, Any]]) -> Proof:
    """Compare what an engine computed with the logits of transformers, (T, V) each.

    Raises:
        RuntimeError: if the engine tells other shapes, or NaN.
    """
    differences, divergences, same = [], [], []
    for index, (read, source) in enumerate(zip(reading.logits, expected, strict=True)):
        if reading.positions is not None:
            source = source[[*reading.positions[index]]]
        if read.ndim != 2 or read.shape[0] != source.shape[0] or read.shape[1] < source.shape[1]:
            raise RuntimeError(
                f"{reading.engine} computes logits of shape {read.shape} from the export, where "
                f"transformers computes {source.shape}: the export is wrong; please report it"
            )
        ours, theirs = _log_softmax(source), _log_softmax(read[:, : source.shape[1]])
        if not np.isfinite(theirs).all():
            raise RuntimeError(
                f"{reading.engine} computes NaN or infinite logits from the export; take dtype f32"
            )
        differences.append(np.abs(ours - theirs).max())
        divergences.extend((np.exp(ours) * (ours - theirs)).sum(-1))
        same.extend(ours.argmax(-1) == theirs.argmax(-1))
    return Proof(
        engine=reading.engine,
        version=reading.version,
        positions=len(same),
        largest_difference=float(max(differences)),
        mean_kl=float(np.mean(divergences)),
        same_top=float(np.mean(same)),
        note=reading.note,
    )


def check_bound(proof: Proof, bound: Bound, what: str) -> None:
    """Check that an export is near enough to its source.

    Args:
        proof: how far it is.
        bound: how far it may be.
        what: the export, for the error.

    Raises:
        RuntimeError: if it is farther; says by how much.
    """
    value = getattr(proof, bound.measure)
    if not value <= bound.value:  # written so that NaN fails
        words = bound.measure.replace("_", " ")
        raise RuntimeError(
            f"{what} was not kept: {proof.engine} {proof.version} computes other logits from it "
            f"than transformers from its source ({words} of log-probabilities {value:.3g}, allowed "
            f"{bound.value:.3g}; same most probable token at {proof.same_top:.1%} of "
            f"{proof.positions} positions)"
        )


def _log_softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
