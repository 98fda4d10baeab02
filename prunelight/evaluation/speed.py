"""Speed of a model in memory: prefill, decoding, generation by a paper's protocol, and F.

All of it is timed by the one clock of `prunelight.evaluation.serving.timing`.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from prunelight.calibration.windows import Windows, check_length, micro_batches, split_windows
from prunelight.evaluation.serving.measured import ServingProtocol, measure_cost
from prunelight.evaluation.serving.timing import Spread, in_turn, seconds_of
from prunelight.models.forward import evaluating, generate_tokens
from prunelight.models.placement import compute_device
from prunelight.models.sizes import is_quantized, parameter_bytes
from prunelight.runtime.arguments import NOT_EMPTY, at_least, check_fields
from prunelight.runtime.devices import free_memory
from prunelight.runtime.random_state import random_state_kept

_ALONE = ServingProtocol(new_tokens=25, batch_size=1)


@dataclass(frozen=True)
class Speed:
    """Tokens per second at batch 1: reading a prompt, and greedy decoding with the cache."""

    prefill: float
    decode: float


@dataclass(frozen=True)
class Architecture:
    """What a model was built from: enough to build one that is as fast, with random weights."""

    kind: type[PreTrainedModel]
    config: PretrainedConfig
    dtype: torch.dtype
    num_bytes: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Architecture | None:
        """Return the architecture of a model; None for packed weights, whose code needs them."""
        if is_quantized(model):
            return None
        return cls(type(model), copy.deepcopy(model.config), model.dtype, parameter_bytes(model))

    def build(self, device: torch.device) -> PreTrainedModel | None:
        """Return a model with random weights on a device; None if there is no room for it."""
        if free_memory(device) < 1.5 * self.num_bytes:
            return None
        with random_state_kept():
            model: Any = self.kind(copy.deepcopy(self.config))
            built: PreTrainedModel = model.to(device=device, dtype=self.dtype).eval()
            return built


def measure_speed(model: PreTrainedModel, *, repeats: int = 5) -> Speed:
    """Measure a prompt of 256 tokens (or as many as the model allows) and decoding of 24.

    Returns the medians of `repeats` measurements after a warm-up; of fewer, down to 3, where they
    take more than a minute.
    """
    (cost,) = measure_cost([model], replace(_ALONE, num_rounds=repeats))
    single = cost.single
    return Speed(single.prefill_tokens_per_second.median, single.decode_tokens_per_second.median)


@dataclass(frozen=True)
class LatencyProtocol:
    """How the depth-pruning papers time generation (arXiv:2402.02834, arXiv:2502.19159).

    The papers sample tokens. Here decoding is greedy, which costs the same and is repeatable.

    Attributes:
        prompt: fixed text.
        num_tokens: tokens of each generation; an end-of-text token does not stop it.
        batch_size: copies of the prompt in a batch.
        num_warmup: generations before the timed ones.
        num_runs: timed generations.

    Raises:
        ValueError: if a number is out of range or the prompt is empty.
    """

    prompt: str = "The Leaning Tower of Pisa is known for"
    num_tokens: int = 128
    batch_size: int = 1
    num_warmup: int = 10
    num_runs: int = 20

    def __post_init__(self) -> None:
        """Check the values."""
        check_fields(
            self,
            "latency.",
            prompt=NOT_EMPTY,
            num_tokens=at_least(1),
            batch_size=at_least(1),
            num_warmup=at_least(0),
            num_runs=at_least(2),  # for a standard deviation
        )


@dataclass(frozen=True)
class Latency:
    """Mean and standard deviation of seconds per generation, and generated tokens per second."""

    latency_seconds: float
    latency_deviation: float
    throughput: float


def measure_latency(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, protocol: LatencyProtocol
) -> Latency:
    """Time the generation of text as a protocol says.

    Raises:
        ValueError: if prompt and tokens are longer than the model allows.
    """
    (seconds,) = _generations([model], tokenizer, protocol)
    return _latency(seconds, protocol)


def compare_latency(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    protocol: LatencyProtocol,
) -> tuple[Latency, Spread]:
    """Return the latency of a model, and its factor against the dense one, timed in turn.

    Raises:
        ValueError: if prompt and tokens are longer than a model allows.
    """
    ours, theirs = _generations([model, dense], tokenizer, protocol)
    factor = Spread.of([own / other for own, other in zip(ours, theirs, strict=True)])
    return _latency(ours, protocol), factor


def _generations(
    models: Sequence[PreTrainedModel], tokenizer: PreTrainedTokenizerBase, protocol: LatencyProtocol
) -> list[list[float]]:
    """Return, for each model, the seconds of the timed generations, in turn."""
    calls = []
    for model in models:
        ids = tokenizer(protocol.prompt, return_tensors="pt")["input_ids"].to(compute_device(model))
        check_length(model, ids.shape[1] + protocol.num_tokens)
        ids = ids.expand(protocol.batch_size, -1)
        calls.append(partial(_timed_generation, model, ids, protocol.num_tokens))
    return in_turn(calls, protocol.num_runs, warmups=protocol.num_warmup, label="latency")


def _timed_generation(model: PreTrainedModel, ids: torch.Tensor, num_tokens: int) -> float:
    with evaluating(model):
        return seconds_of(model.device, partial(generate_tokens, model, ids, num_tokens))


def _latency(seconds: Sequence[float], protocol: LatencyProtocol) -> Latency:
    mean = statistics.fmean(seconds)
    throughput = protocol.batch_size * protocol.num_tokens / mean
    return Latency(mean, statistics.stdev(seconds), throughput)


def forward_seconds(model: PreTrainedModel, windows: Windows) -> float:
    """Estimate F: seconds of one forward of the windows through the whole model.

    Times up to two micro-batches after a warm-up. Scales their time to all windows, those of other
    processes included.
    """
    ids, _ = split_windows(windows)
    sizes, seconds = [], []
    with evaluating(model):
        for batch in islice(micro_batches(model, windows), 3):
            seconds.append(seconds_of(model.device, partial(model, **batch)))
            sizes.append(len(batch["input_ids"]))
    timed = slice(len(seconds) > 1, None)
    return sum(seconds[timed]) / sum(sizes[timed]) * len(ids)
