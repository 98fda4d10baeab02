"""Ask a model the questions of all probes, in a few batches.

All probes together feed a model at most `MOST_TOKENS` tokens, so that they cost less than one
forward of the calibration windows (16 x 512 tokens in the quickstart).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunelight.evaluation.probes.questions import QUESTIONS
from prunelight.evaluation.probes.results import FEWEST_QUESTIONS, PROBES, ProbeResult
from prunelight.evaluation.probes.rows import Row, make_rows
from prunelight.evaluation.probes.samples import Sample, generation_probes, samples
from prunelight.models.families.config_fields import vocabulary_size
from prunelight.models.forward import evaluating
from prunelight.models.sizes import longest_sequence

TOKENS_OF_A_PROBE = 512
TOKENS_OF_A_ROW = 256
MOST_TOKENS = 4096  # of all probes and samples
_BATCH_TOKENS = 1024  # whose logits are held at once


def run_probes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    generated: Sequence[Sample] | None = None,
) -> dict[str, ProbeResult]:
    """Return what each probe finds of a model; questions come from a fixed seed, nothing is loaded.

    Args:
        model: in any mode and dtype.
        tokenizer: of the model.
        generated: what `samples` gave for the model; None generates it.
    """
    rows = {name: _rows(name, model, tokenizer) for name in QUESTIONS}
    answers = _answers(model, [row for each in rows.values() for row in each])
    results = {}
    for name, each in rows.items():
        right = [answer for row in each for answer in answers[id(row)]]
        chance = PROBES[name].chance
        too_few = len(right) < FEWEST_QUESTIONS
        note = _why_not(model, tokenizer) if too_few else ""
        results[name] = ProbeResult(sum(right), len(right), chance, note)
    found = samples(model, tokenizer) if generated is None else generated
    return results | generation_probes(found)


def probe_rows(
    name: str, tokenizer: PreTrainedTokenizerBase, limit: int | None = None
) -> list[Row]:
    """Return the rows of one probe, of at most `TOKENS_OF_A_PROBE` tokens together.

    Args:
        name: of the probe.
        tokenizer: of the model.
        limit: longest sequence in tokens that the model reads; None: any.
    """
    length = TOKENS_OF_A_ROW if limit is None else min(TOKENS_OF_A_ROW, limit)
    num_rows = TOKENS_OF_A_PROBE // length
    return make_rows(QUESTIONS[name](), tokenizer, num_rows=num_rows, length=length)


def _rows(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    size = vocabulary_size(model)
    rows = probe_rows(name, tokenizer, longest_sequence(model))
    return [row for row in rows if max(row.ids) < size]


def _why_not(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    limit = longest_sequence(model)
    if limit is not None and limit < TOKENS_OF_A_ROW:
        return f"the model reads {limit} tokens, too few for examples and questions"
    return "the tokenizer does not express the questions"


def _answers(model: PreTrainedModel, rows: Sequence[Row]) -> Mapping[int, list[bool]]:
    """Return, for the id of each row, whether the model is right at each of its places."""
    answers: dict[int, list[bool]] = {}
    rows = sorted(rows, key=lambda row: len(row.ids))
    while rows:
        size = max(1, _BATCH_TOKENS // len(rows[-1].ids))
        batch, rows = rows[-size:], rows[:-size]
        # A causal model does not see what pads a row on its right.
        ids = pad_sequence([torch.tensor(row.ids) for row in batch], batch_first=True)
        with evaluating(model):
            logits = model(input_ids=ids.to(model.device)).logits
        for row, row_logits in zip(batch, logits, strict=True):
            answers[id(row)] = _right(row, row_logits)
    return answers


def _right(row: Row, logits: Tensor) -> list[bool]:
    """Return whether logits (T, V) are right at each place of a row."""
    ids = torch.tensor(row.ids, device=logits.device)
    likeliest = logits.argmax(dim=-1)
    correct = likeliest[:-1][: len(ids) - 1] == ids[1:]
    right = []
    for place in row.places:
        if place.options:
            options = torch.tensor(place.options, device=logits.device)
            chosen = options[logits[place.start - 1, options].argmax()]
            right.append(bool(chosen == ids[place.start]))
        else:
            right.append(bool(correct[place.start - 1 : place.stop - 1].all()))
    return right
