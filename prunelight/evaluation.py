"""Evaluation of a model in memory: perplexity, accuracy, speed, and the memory a phase takes.

Speeds are tokens per second of this machine: compare them within one run only.
"""

from __future__ import annotations

import logging
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunelight.architecture import decoder_layers, matrices, maximum_length, vocabulary_size
from prunelight.calibration import (
    Windows,
    check_length,
    evaluating,
    micro_batches,
    next_token_labels,
    split_windows,
)
from prunelight.metrics import next_token_sums, parameter_bytes, parameter_count, zero_share
from prunelight.plan import library_versions
from prunelight.report import RunRecord, Stage
from prunelight.shares import own_windows, ranks_of

log = logging.getLogger(__name__)

# Logits are the largest tensor of an evaluation: (tokens, vocabulary) in the model's dtype.
_EVALUATION_TOKENS = 1024
_PREFILL_TOKENS = 256
_DECODE_TOKENS = 24


@dataclass(frozen=True)
class Evaluation:
    """Quality on held-out windows: perplexity, next-token accuracy in [0, 1], predicted tokens."""

    perplexity: float
    accuracy: float
    tokens: int


def perplexity(model: PreTrainedModel, windows: Windows) -> float:
    """Return the token-weighted perplexity of windows (N, T), each predicted on its own.

    Raises:
        ValueError: if windows are not token ids.
    """
    return evaluate(model, windows).perplexity


def evaluate(model: PreTrainedModel, windows: Windows) -> Evaluation:
    """Evaluate a model on windows (N, T), or a mapping with attention_mask and labels beside them.

    Raises:
        ValueError: if windows are not token ids, or nothing is predicted.
    """
    ids, _ = split_windows(windows)
    labels = next_token_labels(own_windows(windows))
    sums, start = torch.zeros(3, dtype=torch.float64), 0
    with evaluating(model):
        for batch in micro_batches(model, windows, tokens=_EVALUATION_TOKENS, label="evaluation"):
            wanted = labels[start : start + len(batch["input_ids"])]
            start += len(wanted)
            sums += torch.stack(next_token_sums(model(**batch).logits, wanted)).double()
    nll, correct, tokens = ranks_of(windows).sum(sums)
    if tokens == 0:
        raise ValueError(
            f"windows of shape {tuple(ids.shape)} predict 0 tokens; each needs two tokens or more, "
            "and labels other than -100"
        )
    return Evaluation((nll / tokens).exp().item(), (correct / tokens).item(), int(tokens))


@dataclass(frozen=True)
class Speed:
    """Tokens per second at batch 1: reading a prompt, and greedy decoding with the cache."""

    prefill: float
    decode: float


def measure_speed(model: PreTrainedModel, *, repeats: int = 5) -> Speed:
    """Measure prefill of 256 tokens (or as many as the model allows) and decoding of 24.

    The fastest of `repeats`, after a warm-up: other work on the machine only ever adds time.
    """
    tokens = min(_PREFILL_TOKENS, maximum_length(model.config) or _PREFILL_TOKENS)
    ids = torch.arange(3, 3 + tokens, device=model.device)[None] % vocabulary_size(model)
    calls = (
        lambda: model(ids),
        lambda: _generate(model, ids[:, :16], 1),
        lambda: _generate(model, ids[:, :16], 1 + _DECODE_TOKENS),
    )
    with evaluating(model):
        prefill, one, many = (
            min([_seconds(model, call) for _ in range(repeats + 1)][1:]) for call in calls
        )
    # The first generated token pays for the prompt: take its time off.
    return Speed(tokens / prefill, _DECODE_TOKENS / max(many - one, 1e-9))


@dataclass(frozen=True)
class LatencyProtocol:
    """How the depth-pruning papers time generation (arXiv:2402.02834, arXiv:2502.19159).

    They sample; here decoding is greedy, which costs the same and is repeatable.

    Attributes:
        prompt: fixed text.
        num_tokens: generated each time, whatever they are.
        batch_size: copies of the prompt.
        num_warmup: generations that do not count, first.
        num_runs: generations that count.

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
        for name, least in (("num_tokens", 1), ("batch_size", 1), ("num_warmup", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"latency.{name}={getattr(self, name)} must be at least {least}")
        if self.num_runs < 2:
            raise ValueError(f"latency.num_runs={self.num_runs} must be at least 2: a deviation")
        if not self.prompt.strip():
            raise ValueError("latency.prompt='' must hold text")


@dataclass(frozen=True)
class Latency:
    """Seconds of one generation, mean and standard deviation, and generated tokens per second."""

    latency_seconds: float
    latency_deviation: float
    throughput: float


def measure_latency(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, protocol: LatencyProtocol
) -> Latency:
    """Time generation by a protocol.

    Raises:
        ValueError: if prompt and tokens are longer than the model allows.
    """
    ids = tokenizer(protocol.prompt, return_tensors="pt")["input_ids"].to(model.device)
    check_length(model, ids.shape[1] + protocol.num_tokens)
    ids = ids.expand(protocol.batch_size, -1)
    total = protocol.num_warmup + protocol.num_runs
    with evaluating(model):
        call = partial(_generate, model, ids, protocol.num_tokens)
        rounds = tqdm(range(total), desc="latency", disable=None, leave=False)
        seconds = [_seconds(model, call) for _ in rounds][protocol.num_warmup :]
    mean = statistics.fmean(seconds)
    throughput = protocol.batch_size * protocol.num_tokens / mean
    return Latency(mean, statistics.stdev(seconds), throughput)


def _generate(model: PreTrainedModel, ids: Tensor, count: int) -> Tensor:
    pad = model.config.pad_token_id
    tokens: Tensor = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        use_cache=True,
        min_new_tokens=count,
        max_new_tokens=count,
        pad_token_id=0 if pad is None else pad,
    )
    return tokens


def greedy_tokens(model: PreTrainedModel, ids: Tensor, count: int) -> Tensor:
    """Continue ids (B, T) greedily by `count` tokens with the cache, (B, T + count)."""
    with evaluating(model):
        return _generate(model, ids, count)


def _seconds(model: PreTrainedModel, call: Callable[[], object]) -> float:
    synchronize(model.device)
    start = time.perf_counter()
    call()
    synchronize(model.device)
    return time.perf_counter() - start


def forward_seconds(model: PreTrainedModel, windows: Windows) -> float:
    """Estimate F: seconds of one forward of the windows through the whole model.

    Times up to two micro-batches after a warm-up and scales to all windows, of all ranks too.
    """
    ids, _ = split_windows(windows)
    sizes, seconds = [], []
    with evaluating(model):
        for batch in islice(micro_batches(model, windows), 3):
            seconds.append(_seconds(model, partial(model, **batch)))
            sizes.append(len(batch["input_ids"]))
    timed = slice(len(seconds) > 1, None)
    return sum(seconds[timed]) / sum(sizes[timed]) * len(ids)


def measure_stage(
    name: str,
    model: PreTrainedModel,
    windows: Windows,
    latency_of: Callable[[PreTrainedModel], Latency] | None = None,
) -> Stage:
    """Measure one state of a model for the report: sizes, zeros, quality on windows, and speed.

    Ranks that share the windows evaluate together; the first alone takes the time.
    """
    ranks = ranks_of(windows)
    # Before anything that takes long: it may find its text too long.
    latency = None if latency_of is None else ranks.on_zero(partial(latency_of, model))
    quality, speed = evaluate(model, windows), ranks.on_zero(partial(measure_speed, model))
    return Stage(
        name=name,
        num_layers=len(decoder_layers(model)),
        parameters=parameter_count(model),
        size_bytes=parameter_bytes(model),
        perplexity=quality.perplexity,
        accuracy=quality.accuracy,
        prefill_tokens_per_second=speed.prefill,
        decode_tokens_per_second=speed.decode,
        sparsity=zero_share(model.parameters()),
        linear_sparsity=linear_sparsity(model),
        **({} if latency is None else asdict(latency)),
    )


def linear_sparsity(model: PreTrainedModel) -> float:
    """Return the share of zeros in all `architecture.matrices`, in [0, 1].

    0 for a model in which none are found, or whose weights are quantized.
    """
    try:
        found = matrices(model)
    except TypeError:
        return 0.0
    return zero_share(matrix.parameter for matrix in found.values())


def new_record(
    name: str, model: PreTrainedModel, fingerprint: str, evaluation: dict[str, Any]
) -> RunRecord:
    """Start the record of a run from the dense model, before anything is measured."""
    return RunRecord(
        model=name,
        device=device_name(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        fingerprint=fingerprint,
        checkpoint_bytes=parameter_bytes(model),
        layer_bytes=max(parameter_bytes(layer) for layer in decoder_layers(model)),
        evaluation=evaluation,
        versions=library_versions(),
    )


@dataclass
class Measurement:
    """Seconds and peak memory of one phase; filled in when the phase ends."""

    seconds: float = 0.0
    peak_bytes: int = 0
    started: float | None = None  # while the phase goes on

    def so_far(self, device: torch.device) -> dict[str, Any]:
        """Return seconds and peak at this moment, for a phase that a later run continues."""
        if self.started is None:
            return {"seconds": self.seconds, "peak_bytes": self.peak_bytes}
        seconds = self.seconds + time.perf_counter() - self.started
        return {"seconds": seconds, "peak_bytes": max(self.peak_bytes, peak_memory(device))}


@contextmanager
def measuring(
    device: torch.device, measurement: Measurement | None = None
) -> Iterator[Measurement]:
    """Measure a phase: wall seconds, and the peak of allocated CUDA memory or of process memory.

    `measurement` is that of the phase's part before an interruption, which is continued.
    """
    measurement = measurement or Measurement()
    _reset_peak(device)
    synchronize(device)
    measurement.started = time.perf_counter()
    try:
        yield measurement
    finally:
        synchronize(device)
        spent = measurement.so_far(device)
        measurement.seconds, measurement.peak_bytes = spent["seconds"], spent["peak_bytes"]
        measurement.started = None


def synchronize(device: torch.device) -> None:
    """Wait for the device; does nothing on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)
        except OSError:
            return  # a sandbox without it: the peak is then that of the whole process


def peak_memory(device: torch.device) -> int:
    """Return the peak bytes since the last reset: allocated on CUDA, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def to_device(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Move a model to a device, in place, and return it."""
    movable: Any = model  # transformers decorates `to` in a way that type checkers lose
    return movable.to(device)


def place_for(model: PreTrainedModel, device: torch.device) -> torch.device:
    """Return a device if it has memory for a model, else where the model is."""
    if device.type == "cuda" and free_memory(device) < 1.2 * parameter_bytes(model):
        log.warning("the model does not fit on %s; it runs on the CPU instead", device)
        return model.device
    return device


def where_it_fits(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Move a model to a device if it has memory for it, in place, and return it."""
    return to_device(model, place_for(model, device))


def device_name(device: torch.device) -> str:
    """Return a device's name for reports: that of the card, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def free_memory(device: torch.device) -> int:
    """Return the bytes that can still be allocated on a device."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return psutil.virtual_memory().available
