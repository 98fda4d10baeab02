"""What a model costs on this machine: time to the first token, tokens per second, and memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from prunelight.evaluation.serving.shape import PROMPT_TOKENS, prompt, prompt_length
from prunelight.evaluation.serving.timing import Spread, TimedGeneration, in_turn, time_generation
from prunelight.models.placement import compute_device
from prunelight.runtime.arguments import at_least, check_fields
from prunelight.runtime.devices import free_memory
from prunelight.runtime.measuring import memory_growth


@dataclass(frozen=True)
class ServingProtocol:
    """How serving is timed: greedy generations with the cache, at batch 1 and at a larger batch.

    Attributes:
        prompt_tokens: of each prompt at batch 1; None for 256, or as many as the models allow.
        new_tokens: generated for each prompt; an end-of-text token does not stop it.
        batch_size: of the larger batch; 1 leaves it out.
        batch_prompt_tokens: of each of its prompts; None for as many as at batch 1.
        num_rounds: in turn at batch 1, after a warm-up; fewer, down to 3, where patience ends.
        num_batch_rounds: of the larger batch, likewise.
        patience: seconds for the rounds of each batch size.

    Raises:
        TypeError: if a value has the wrong type.
        ValueError: if it is out of range.
    """

    prompt_tokens: int | None = None
    new_tokens: int = 32
    batch_size: int = 8
    batch_prompt_tokens: int | None = None
    num_rounds: int = 9  # the second lowest to the second highest hold the median at 96 %
    num_batch_rounds: int = 5
    patience: float = 60.0

    def __post_init__(self) -> None:
        """Check the values."""
        check_fields(
            self,
            "serving.",
            prompt_tokens=at_least(1),
            new_tokens=at_least(2),  # the first belongs to the prompt
            batch_size=at_least(1),
            batch_prompt_tokens=at_least(1),
            num_rounds=at_least(1),
            num_batch_rounds=at_least(1),
            patience=at_least(0),
        )


@dataclass(frozen=True)
class TimedBatch:
    """Generations of one batch size, and what they took.

    Attributes:
        batch_size: prompts at a time.
        prompt_tokens: of each prompt.
        new_tokens: generated for each.
        rounds: seconds of each generation.
        working_bytes: peak of memory over what was held before: cache and hidden states, not the
            weights. Process memory on a CPU, allocated memory on CUDA.
    """

    batch_size: int
    prompt_tokens: int
    new_tokens: int
    rounds: tuple[TimedGeneration, ...]
    working_bytes: int

    @property
    def time_to_first_token(self) -> Spread:
        """Seconds from the prompt to its first new token."""
        return Spread.of([generation.first_token for generation in self.rounds])

    @property
    def prefill_tokens_per_second(self) -> Spread:
        """Tokens of all prompts over the time to the first new token."""
        tokens = self.batch_size * self.prompt_tokens
        return Spread.of([tokens / generation.first_token for generation in self.rounds])

    @property
    def decode_tokens_per_second(self) -> Spread:
        """New tokens of all prompts, but the first, over the time that they take."""
        tokens = self.batch_size * (self.new_tokens - 1)
        return Spread.of([tokens / generation.decode for generation in self.rounds])


@dataclass(frozen=True)
class MeasuredCost:
    """What a model costs on this machine.

    Attributes:
        single: at batch 1.
        batch: at the larger batch; None where it was left out.
        notes: what differs from the protocol, and why.
    """

    single: TimedBatch
    batch: TimedBatch | None
    notes: tuple[str, ...] = ()

    @property
    def batches(self) -> list[TimedBatch]:
        """The batches that were timed."""
        return [self.single] if self.batch is None else [self.single, self.batch]


def measure_cost(
    models: Sequence[PreTrainedModel], protocol: ServingProtocol = ServingProtocol()
) -> list[MeasuredCost]:
    """Measure models in turn, such as a pruned one and the dense one.

    Every model gets prompts of the same length. The larger batch is left out, with a note, where
    there is no memory for it, or batch 1 alone took twice as long as the patience.

    Raises:
        ValueError: if prompt and new tokens are longer than a model allows.
    """
    lengths = _lengths(models, protocol)
    begun = time.monotonic()
    single = _measure(models, 1, lengths[0], protocol.num_rounds, protocol)
    notes = _clipped(lengths[0], protocol)
    batch: list[TimedBatch] | list[None] = [None] * len(models)
    if protocol.batch_size > 1:
        obstacle = _obstacle(models, single, lengths, time.monotonic() - begun, protocol)
        if obstacle is None:
            size, rounds = protocol.batch_size, protocol.num_batch_rounds
            batch = _measure(models, size, lengths[1], rounds, protocol)
        else:
            notes += (f"batch {protocol.batch_size} was left out: {obstacle}",)
    return [MeasuredCost(one, many, notes) for one, many in zip(single, batch, strict=True)]


def _obstacle(
    models: Sequence[PreTrainedModel],
    single: Sequence[TimedBatch],
    lengths: tuple[int, int],
    seconds: float,
    protocol: ServingProtocol,
) -> str | None:
    """Return what speaks against the larger batch: memory, or time; None if nothing does."""
    growth = max(alone.working_bytes for alone in single) * lengths[1] / lengths[0]
    needed = protocol.batch_size * growth
    free = min(free_memory(compute_device(model)) for model in models)
    if needed > free:
        return f"it needs about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
    if seconds > 2 * protocol.patience:
        return f"batch 1 took {seconds:.0f} s, and patience ends after {protocol.patience:.0f} s"
    return None


def compare_batches(own: TimedBatch, other: TimedBatch) -> tuple[Spread, Spread]:
    """Return the factors of prefill and of decoding against another model, timed in turn.

    2.0 where a model is twice as fast as the other; the median over the rounds.
    """
    pairs = [*zip(own.rounds, other.rounds, strict=True)]
    return (
        Spread.of([beside.first_token / one.first_token for one, beside in pairs]),
        Spread.of([beside.decode / one.decode for one, beside in pairs]),
    )


def check_lengths(models: Sequence[PreTrainedModel], protocol: ServingProtocol) -> None:
    """Check that the models allow the lengths of a protocol, before anything is computed.

    Raises:
        ValueError: if prompt and new tokens are longer than a model allows.
    """
    _lengths(models, protocol)


def _lengths(models: Sequence[PreTrainedModel], protocol: ServingProtocol) -> tuple[int, int]:
    """Return the lengths of the prompts at batch 1, and at the larger batch."""
    new = protocol.new_tokens
    single = min(prompt_length(m, protocol.prompt_tokens, new_tokens=new) for m in models)
    if protocol.batch_prompt_tokens is None:
        return single, single
    asked = protocol.batch_prompt_tokens
    return single, min(prompt_length(m, asked, new_tokens=new) for m in models)


def _clipped(length: int, protocol: ServingProtocol) -> tuple[str, ...]:
    usual = PROMPT_TOKENS if protocol.prompt_tokens is None else length
    if length == usual:
        return ()
    return (f"prompts have {length} tokens instead of {usual}: the context is not longer",)


def _measure(
    models: Sequence[PreTrainedModel],
    batch_size: int,
    prompt_tokens: int,
    num_rounds: int,
    protocol: ServingProtocol,
) -> list[TimedBatch]:
    generations = [
        _Generation(model, batch_size, prompt_tokens, protocol.new_tokens) for model in models
    ]
    label, patience = f"speed at batch {batch_size}", protocol.patience
    rounds = in_turn(generations, num_rounds, patience=patience, label=label)
    return [
        TimedBatch(
            batch_size, prompt_tokens, protocol.new_tokens, tuple(times), one.working_bytes or 0
        )
        for one, times in zip(generations, rounds, strict=True)
    ]


class _Generation:
    """One generation, to be repeated; the first one, which warms up, measures memory."""

    def __init__(
        self, model: PreTrainedModel, batch_size: int, prompt_tokens: int, new_tokens: int
    ) -> None:
        self.model, self.new_tokens = model, new_tokens
        self.ids = prompt(model, prompt_tokens, batch_size)
        self.working_bytes: int | None = None

    def __call__(self) -> TimedGeneration:
        if self.working_bytes is not None:
            return time_generation(self.model, self.ids, self.new_tokens)
        with memory_growth(compute_device(self.model)) as growth:
            timed = time_generation(self.model, self.ids, self.new_tokens)
        self.working_bytes = growth()
        return timed
