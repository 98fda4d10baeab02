"""Speed of a model in memory: prefill, decoding, generation, and F.

Speeds are tokens per second on this machine: compare them within one run only.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunelight.calibration.windows import Windows, check_length, micro_batches, split_windows
from prunelight.models.families.config_fields import vocabulary_size
from prunelight.models.forward import evaluating, generate_tokens
from prunelight.models.sizes import longest_sequence
from prunelight.runtime.arguments import NOT_EMPTY, at_least, check_fields
from prunelight.runtime.devices import synchronize

_PREFILL_TOKENS = 256

_DECODE_TOKENS = 24


@dataclass(frozen=True)
class Speed:
    """Tokens per second at batch 1: reading a prompt, and greedy decoding with the cache."""

    prefill: float
    decode: float


def measure_speed(model: PreTrainedModel, *, repeats: int = 5) -> Speed:
    """Measure prefill of 256 tokens (or as many as the model allows) and decoding of 24.

    Returns the fastest of `repeats` measurements after a warm-up: other work on the machine only
    adds time.
    """
    tokens = min(_PREFILL_TOKENS, longest_sequence(model) or _PREFILL_TOKENS)
    ids = torch.arange(3, 3 + tokens, device=model.device)[None] % vocabulary_size(model)
    calls = (
        lambda: model(ids),
        lambda: generate_tokens(model, ids[:, :16], 1),
        lambda: generate_tokens(model, ids[:, :16], 1 + _DECODE_TOKENS),
    )
    with evaluating(model):
        prefill, first_token, all_tokens = (
            min([_seconds(model, call) for _ in range(repeats + 1)][1:]) for call in calls
        )
    # The time of the first generated token includes the prompt: subtract it.
    decode_seconds = max(all_tokens - first_token, 1e-9)
    return Speed(tokens / prefill, _DECODE_TOKENS / decode_seconds)


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
    ids = tokenizer(protocol.prompt, return_tensors="pt")["input_ids"].to(model.device)
    check_length(model, ids.shape[1] + protocol.num_tokens)
    ids = ids.expand(protocol.batch_size, -1)
    total = protocol.num_warmup + protocol.num_runs
    with evaluating(model):
        call = partial(generate_tokens, model, ids, protocol.num_tokens)
        rounds = tqdm(range(total), desc="latency", disable=None, leave=False)
        seconds = [_seconds(model, call) for _ in rounds][protocol.num_warmup :]
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
