"""What each decoder layer costs while a model serves: bytes of its cache, and its time.

The cache is watched while a layer runs, so nothing is known of a family.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn
from transformers import PreTrainedModel

from prunelight.evaluation.serving.counting import cache_bytes_in
from prunelight.evaluation.serving.shape import prompt, prompt_length
from prunelight.evaluation.serving.verdicts import hardware
from prunelight.models.families.architectures import sublayers_of
from prunelight.models.families.layers import decoder_layers
from prunelight.models.forward import evaluating, generate_tokens
from prunelight.models.placement import compute_device
from prunelight.models.sizes import longest_sequence
from prunelight.runtime.devices import synchronize

Visit: TypeAlias = Callable[[int, Any], None]  # of a part's index and its arguments

_LONGEST = 2048  # tokens of the cache, where a model allows so many and nothing else is asked
_STEPS = 24  # of decoding that are timed


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of one step of decoding at batch 1, by part; medians.

    Attributes:
        device: that was timed.
        rest: all but the decoder layers.
        layers: each decoder layer.
        mlps: of them, the layer's MLP; 0 where it is not known.
    """

    device: str
    rest: float
    layers: list[float]
    mlps: list[float]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


def cache_bytes_by_layer(model: PreTrainedModel, tokens: int | None = None) -> list[int]:
    """Return the bytes of each decoder layer's cache after a prompt of one sequence.

    Args:
        model: any; it is unchanged.
        tokens: of the prompt; None for 2048, or as many as the model allows.

    Raises:
        ValueError: if there are fewer than 1, or more than the model allows.
    """
    if tokens is None:
        tokens = min(_LONGEST, (longest_sequence(model) or _LONGEST) - 1)
    length = prompt_length(model, tokens, new_tokens=1)
    layers = [*decoder_layers(model)]
    grown, before = [0] * len(layers), [0]

    def enter(index: int, caches: Any) -> None:
        before[0] = cache_bytes_in(caches)

    def leave(index: int, caches: Any) -> None:
        grown[index] += cache_bytes_in(caches) - before[0]

    with evaluating(model), _visiting(layers, enter, leave):
        generate_tokens(model, prompt(model, length), 1)
    return grown


def measure_latency_table(model: PreTrainedModel) -> LatencyTable:
    """Time the parts of a model in steps of decoding, after a warm-up.

    Every part waits for the device, so that the parts of a fast GPU take somewhat longer than they
    do in a row.
    """
    place, layers = compute_device(model), [*decoder_layers(model)]
    try:
        name = sublayers_of(model).mlp
        mlps: list[nn.Module | None] = [dict(layer.named_modules()).get(name) for layer in layers]
    except TypeError:
        mlps = [None] * len(layers)
    parts: list[nn.Module] = [model, *layers, *(mlp for mlp in mlps if mlp is not None)]
    seconds: list[list[float]] = [[] for _ in parts]
    starts = [0.0] * len(parts)

    def enter(index: int, caches: Any) -> None:
        synchronize(place)
        starts[index] = time.perf_counter()

    def leave(index: int, caches: Any) -> None:
        synchronize(place)
        seconds[index].append(time.perf_counter() - starts[index])

    length = prompt_length(model, None, new_tokens=_STEPS + 1)
    with evaluating(model), _visiting(parts, enter, leave):
        for _ in range(2):
            for timed in seconds:
                timed.clear()
            generate_tokens(model, prompt(model, length), _STEPS)
    # The first forward is that of the prompt. A layer that is shared runs several times in a step.
    whole, *each = (statistics.median(timed[1:]) if timed[1:] else 0.0 for timed in seconds)
    of_mlps = iter(each[len(layers) :])
    return LatencyTable(
        hardware(place),
        max(0.0, whole - sum(each[: len(layers)])),
        each[: len(layers)],
        [0.0 if mlp is None else next(of_mlps) for mlp in mlps],
    )


def read_latency_table(file: str, model: PreTrainedModel) -> LatencyTable:
    """Return the table of a JSON file: the table alone, or a plan that was made with one.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds no table, or one of another device or another number of layers.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"latency_table={file}: there is no such file; leave it out to time"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        table = LatencyTable(**value.get("found", {}).get("latency_table", value))
        numbers = [table.rest, *table.layers, *table.mlps]
        if not all(type(x) in (int, float) and math.isfinite(x) for x in numbers):
            raise ValueError("a time is no number")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"latency_table={file} holds no table of device, rest, layers and mlps; take a plan "
            "that metric: latency made, or leave it out to time the model now"
        ) from error
    device, total = hardware(compute_device(model)), len(decoder_layers(model))
    if table.device != device:
        raise ValueError(
            f"latency_table={file} was timed on {table.device!r}, and this is {device!r}: times of "
            "one device say nothing of another; plan there, or leave it out to time here"
        )
    if not len(table.layers) == len(table.mlps) == total or min(numbers) < 0:
        raise ValueError(
            f"latency_table={file} has times of {len(table.layers)} layers, and the model has "
            f"{total}; leave it out to time the model now"
        )
    return table


@contextmanager
def _visiting(parts: Sequence[nn.Module], enter: Visit, leave: Visit) -> Iterator[None]:
    """Call `enter` before each forward of a part and `leave` after it, with index and arguments."""
    with ExitStack() as stack:
        for index, part in enumerate(parts):

            def before(_: nn.Module, args: Any, kwargs: Any, index: int = index) -> None:
                enter(index, (args, kwargs))

            def after(_: nn.Module, args: Any, kwargs: Any, out: Any, index: int = index) -> None:
                leave(index, (args, kwargs))

            stack.callback(part.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(part.register_forward_hook(after, with_kwargs=True).remove)
        yield
