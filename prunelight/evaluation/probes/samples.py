"""Fixed prompts continued greedily: what a reader sees at once, and what loops or ends too soon."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunelight.evaluation.probes.results import ProbeResult
from prunelight.evaluation.probes.rows import first_tokens
from prunelight.models.families.config_fields import vocabulary_size
from prunelight.models.forward import evaluating
from prunelight.models.placement import compute_device
from prunelight.models.sizes import longest_sequence

NEW_TOKENS = 40
# All are cut to as many tokens as the shortest has, so that none needs padding.
PROMPTS = (
    "The old man walked down to the river and",
    "To bake a simple loaf of bread, you first",
    "The three largest cities of the country are",
    "def is_even(number):\n    return number",
    "Once upon a time there was a girl who",
)
QUESTION = "Why is the sky blue? Answer in two sentences."
_NGRAM = 3


@dataclass(frozen=True)
class Sample:
    """A prompt and what a model made of it.

    Attributes:
        prompt: as text; of a chat the question alone.
        text: that the model wrote, without special tokens.
        tokens: that the model wrote, without the token that ends a text.
    """

    prompt: str
    text: str
    tokens: tuple[int, ...] = field(repr=False, default=())


def samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] = PROMPTS,
    *,
    new_tokens: int = NEW_TOKENS,
) -> list[Sample]:
    """Continue prompts greedily, and answer a question where the tokenizer has a chat template.

    Args:
        model: in any mode and dtype.
        tokenizer: of the model.
        prompts: texts to continue; all are cut to as many tokens as the shortest has.
        new_tokens: most tokens of each continuation.

    Returns:
        A sample for each prompt, then that of the chat; fewer where the model cannot read them.
    """
    start = first_tokens(tokenizer)
    ids = [start + tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
    shortest = min(map(len, ids), default=0)
    batches = [[row[:shortest] for row in ids]] if shortest else []
    shown = [[_text(tokenizer, row) for row in batch] for batch in batches]
    if tokenizer.chat_template is not None:
        batches.append([_chat(tokenizer)])
        shown.append([QUESTION])
    found: list[Sample] = []
    for batch, texts in zip(batches, shown, strict=True):
        count = _room(model, batch, new_tokens)
        if count:
            rows = _continued(model, torch.tensor(batch), count, tokenizer.eos_token_id)
            found += [
                Sample(text, _text(tokenizer, row), tuple(row))
                for text, row in zip(texts, rows, strict=True)
            ]
    return found


def generation_probes(
    found: Sequence[Sample], new_tokens: int = NEW_TOKENS
) -> dict[str, ProbeResult]:
    """Return how much of the generated text is new, and how long it is.

    "new_trigrams" counts the distinct runs of three tokens in each text among all of them;
    "length" counts the tokens that were written before a text ended.
    """
    if not found:
        note = "the model reads no prompt"
        return {name: ProbeResult(0, 0, note=note) for name in ("new_trigrams", "length")}
    runs = [
        [sample.tokens[i : i + _NGRAM] for i in range(len(sample.tokens) - _NGRAM + 1)]
        for sample in found
    ]
    new, total = sum(len({*each}) for each in runs), sum(map(len, runs))
    written = sum(len(sample.tokens) for sample in found)
    short = "" if total else "all texts end at once"
    return {
        "new_trigrams": ProbeResult(new, total, note=short),
        "length": ProbeResult(written, new_tokens * len(found)),
    }


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode([*ids], skip_special_tokens=True))


def _chat(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    messages = [{"role": "user", "content": QUESTION}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer.encode(str(text), add_special_tokens=False)
    return ids


def _room(model: PreTrainedModel, batch: Sequence[Sequence[int]], new_tokens: int) -> int:
    """Return how many tokens the model can write; 0 where it cannot read the prompts."""
    if max(max(row) for row in batch) >= vocabulary_size(model):
        return 0
    limit = longest_sequence(model)
    room = new_tokens if limit is None else limit - len(batch[0])
    return max(0, min(new_tokens, room))


def _continued(model: PreTrainedModel, ids: Tensor, count: int, end: int | None) -> list[list[int]]:
    """Return the tokens that follow ids (B, T) greedily, up to the token that ends a text."""
    ids = ids.to(compute_device(model))
    with evaluating(model):
        rows: Tensor = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            use_cache=True,
            min_new_tokens=0,
            max_new_tokens=count,
            eos_token_id=end,
            pad_token_id=0 if end is None else end,
        )
    written = [row[ids.shape[1] :].tolist() for row in rows]
    return [row if end not in row else row[: row.index(end)] for row in written]
