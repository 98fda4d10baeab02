"""Speed of a model in memory: prefill, decoding, generation, and F.

Speeds are tokens per second on this machine, whose clock drifts with its load: two speeds compare
only if they were measured in turn. So a pruned model is timed beside the dense one, round by round:
dense, pruned, pruned, dense, ... The factor is the median over the rounds.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from prunelight.calibration.windows import Windows, check_length, micro_batches, split_windows
from prunelight.models.families.config_fields import vocabulary_size
from prunelight.models.forward import evaluating, generate_tokens
from prunelight.models.sizes import is_quantized, longest_sequence, parameter_bytes
from prunelight.runtime.arguments import NOT_EMPTY, at_least, check_fields
from prunelight.runtime.devices import free_memory, synchronize
from prunelight.runtime.progress import Bar

_PREFILL_TOKENS = 256

_DECODE_TOKENS = 24

_ROUNDS = 9  # in turn; the second lowest to the second highest hold the median at 96 %
_PATIENCE = 60.0  # seconds; then no further round begins, once there are
_LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Speed:
    """Tokens per second at batch 1: reading a prompt, and greedy decoding with the cache."""

    prefill: float
    decode: float


@dataclass(frozen=True)
class Factor:
    """How a figure compares with that of the dense model: the median over rounds in turn.

    Attributes:
        median: 2.0 where the figure is twice that of the dense model.
        low: second lowest of the rounds; the lowest, where there are fewer than 6.
        high: second highest, likewise.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, ratios: Sequence[float]) -> Factor:
        """Return the factor of one ratio for each round."""
        inner = sorted(ratios)
        inner = inner[1:-1] if len(inner) >= 6 else inner
        return cls(statistics.median(ratios), inner[0], inner[-1])


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
        devices = range(torch.cuda.device_count())
        with torch.random.fork_rng(devices):  # the run's own random numbers stay as they are
            model: Any = self.kind(copy.deepcopy(self.config))
            built: PreTrainedModel = model.to(device=device, dtype=self.dtype).eval()
            return built


def measure_speed(model: PreTrainedModel, *, repeats: int = 5) -> Speed:
    """Measure prefill of 256 tokens (or as many as the model allows) and decoding of 24.

    Returns the medians of `repeats` measurements after a warm-up; of fewer, down to 3, where they
    take more than a minute.
    """
    (rounds,) = _in_turn([model], repeats)
    tokens = _prompt(model).shape[1]
    return Speed(
        tokens / statistics.median(prefill for prefill, _ in rounds),
        _DECODE_TOKENS / statistics.median(decode for _, decode in rounds),
    )


def compare_speed(model: PreTrainedModel, dense: PreTrainedModel) -> tuple[Factor, Factor]:
    """Return the factors of prefill and of decoding of a model against the dense one, in turn.

    Over 9 rounds, or fewer, down to 3, where they take more than a minute.
    """
    ours, theirs = _in_turn([model, dense], _ROUNDS)
    shares = _prompt(model).shape[1] / _prompt(dense).shape[1]
    pairs = [*zip(ours, theirs, strict=True)]
    return (
        Factor.of([shares * other[0] / own[0] for own, other in pairs]),
        Factor.of([other[1] / own[1] for own, other in pairs]),
    )


def _prompt(model: PreTrainedModel) -> torch.Tensor:
    tokens = min(_PREFILL_TOKENS, longest_sequence(model) or _PREFILL_TOKENS)
    return torch.arange(3, 3 + tokens, device=model.device)[None] % vocabulary_size(model)


def _in_turn(models: Sequence[PreTrainedModel], rounds: int) -> list[list[tuple[float, float]]]:
    """Return, for each model, seconds of prefill and of decoding in each round.

    A first round warms up. Every other round goes the other way, so that a drift cancels.
    """
    seconds: list[list[tuple[float, float]]] = [[] for _ in models]
    order, begun = [*enumerate(models)], time.monotonic()
    with Bar("speed", (rounds + 1) * len(models), unit="measurements") as bar:
        for number in range(rounds + 1):
            if number > _LEAST_ROUNDS and time.monotonic() - begun > _PATIENCE:
                break
            for index, model in order if number % 2 else order[::-1]:
                measured = _prefill_and_decode(model)
                bar.update()
                if number:
                    seconds[index].append(measured)
    return seconds


def _prefill_and_decode(model: PreTrainedModel) -> tuple[float, float]:
    ids = _prompt(model)
    with evaluating(model):
        prefill = _seconds(model, lambda: model(ids))
        first_token = _seconds(model, lambda: generate_tokens(model, ids[:, :16], 1))
        tokens = 1 + _DECODE_TOKENS
        all_tokens = _seconds(model, lambda: generate_tokens(model, ids[:, :16], tokens))
    # The time of the first generated token includes the prompt: subtract it.
    return prefill, max(all_tokens - first_token, 1e-9)


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
) -> tuple[Latency, Factor]:
    """Return the latency of a model, and its factor against the dense one, timed in turn.

    Raises:
        ValueError: if prompt and tokens are longer than a model allows.
    """
    ours, theirs = _generations([model, dense], tokenizer, protocol)
    factor = Factor.of([own / other for own, other in zip(ours, theirs, strict=True)])
    return _latency(ours, protocol), factor


def _generations(
    models: Sequence[PreTrainedModel], tokenizer: PreTrainedTokenizerBase, protocol: LatencyProtocol
) -> list[list[float]]:
    """Return, for each model, the seconds of the timed generations, in turn."""
    calls = []
    for model in models:
        ids = tokenizer(protocol.prompt, return_tensors="pt")["input_ids"].to(model.device)
        check_length(model, ids.shape[1] + protocol.num_tokens)
        ids = ids.expand(protocol.batch_size, -1)
        calls.append(partial(generate_tokens, model, ids, protocol.num_tokens))
    total = protocol.num_warmup + protocol.num_runs
    seconds: list[list[float]] = [[] for _ in models]
    with Bar("latency", total * len(models), unit="generations") as bar:
        for _ in range(total):
            for times, model, call in zip(seconds, models, calls, strict=True):
                with evaluating(model):
                    times.append(_seconds(model, call))
                bar.update()
    return [times[protocol.num_warmup :] for times in seconds]


def _latency(seconds: Sequence[float], protocol: LatencyProtocol) -> Latency:
    mean = statistics.fmean(seconds)
    throughput = protocol.batch_size * protocol.num_tokens / mean
    return Latency(mean, statistics.stdev(seconds), throughput)


def _seconds(model: PreTrainedModel, call: Callable[[], object]) -> float:
    synchronize(model.device)
    start = time.perf_counter()
    call()
    synchronize(model.device)
    return time.perf_counter() - start


def forward_seconds(model: PreTrainedModel, windows: Windows) -> float:
    """Estimate F: seconds of one forward of the windows through the whole model.

    Times up to two micro-batches after a warm-up. Scales their time to all windows, those of other
    processes included.
    """
    ids, _ = split_windows(windows)
    sizes, seconds = [], []
    with evaluating(model):
        for batch in islice(micro_batches(model, windows), 3):
            seconds.append(_seconds(model, partial(model, **batch)))
            sizes.append(len(batch["input_ids"]))
    timed = slice(len(seconds) > 1, None)
    return sum(seconds[timed]) / sum(sizes[timed]) * len(ids)
