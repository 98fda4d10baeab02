"""Calibration windows that the dense model writes: it continues short prefixes of a text.

Ji et al., Beware of Calibration Data for Pruning Large Language Models (ICLR 2025,
arXiv:2410.17711): pruning wants text like that of the pre-training, which few have; what the model
writes is like it. Of what it wrote the windows with the highest perplexity are dropped.

Each batch is kept in a file when it is written. So all commands and starts that ask for the same
windows get the same, and a killed one loses one batch.
"""

# N windows written, n windows kept, P tokens of a prefix, T tokens of a window

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from prunelight.calibration.windows import check_readable
from prunelight.losses import next_token_sums
from prunelight.models.forward import evaluating, generate_tokens
from prunelight.models.placement import is_streamed
from prunelight.runtime.files.atomic_files import (
    atomic_creation,
    check_writable,
    explaining_write_errors,
    remove_temporaries,
)
from prunelight.runtime.progress import Bar
from prunelight.runtime.random_state import random_state_kept

log = logging.getLogger(__name__)

FORMAT = 1  # of how windows are written; another one writes them anew
_WORD = "self"  # the source that stands for the model
_PREFIX_TOKENS = 8
_SHORTEST = 4  # tokens of a window: a prefix is cut from a text, which takes two
_WRITTEN = 1.25  # windows written for each that is kept
_TOKENS_AT_ONCE = 8192  # the cache of a 7B model in 16 bits without grouped heads then takes 4 GB
_TOP_K = 50


def is_self_written(calibration: str | list[str]) -> bool:
    """Return whether calibration sources say that the model writes the windows."""
    return all(_is_self(source) for source in _listed(calibration))


def sources_read(calibration: str | list[str]) -> list[str]:
    """Return the sources that are read: of "self:SOURCE" that of the prefixes."""
    sources = _listed(calibration)
    if is_self_written(calibration):
        return [source.partition(":")[2] or "sample:calibration" for source in sources]
    return sources


def check_calibration_sources(calibration: str | list[str]) -> None:
    """Check that calibration sources go together.

    Raises:
        ValueError: if "self" stands beside other sources, or a source is named twice.
    """
    sources = _listed(calibration)
    for place, source in enumerate(sources if len(sources) > 1 else ()):
        if _is_self(source):
            raise ValueError(
                f"calibration: {source!r} must stand alone; self:SOURCE continues prefixes of a "
                "text of yours"
            )
        if source in sources[:place]:
            raise ValueError(f"calibration names {source!r} twice; name each source once")


def _is_self(source: str) -> bool:
    return source.partition(":")[0] == _WORD


def _listed(sources: str | list[str]) -> list[str]:
    return [sources] if isinstance(sources, str) else [*sources]


def prefix_length(seq_len: int) -> int:
    """Return the tokens of a prefix of windows of `seq_len`: 8, or half of a shorter window.

    Raises:
        ValueError: if a window would be too short for a prefix that text can be cut into.
    """
    if seq_len < _SHORTEST:
        raise ValueError(
            f"seq_len={seq_len} must be at least {_SHORTEST} where calibration={_WORD!r}; "
            "raise it, or calibrate on a text"
        )
    return min(_PREFIX_TOKENS, seq_len // 2)


def prefixes_for(count: int) -> int:
    """Return how many prefixes `count` windows need: a fifth of what is written is dropped."""
    return math.ceil(_WRITTEN * count)


def self_written_windows(
    model: PreTrainedModel,
    prefixes: Tensor,
    seq_len: int,
    count: int,
    directory: Path,
    *,
    seed: int = 0,
) -> Tensor:
    """Return windows that a model writes, those of lowest perplexity, in the order of the prefixes.

    Tokens are drawn at temperature 1 from the 50 most probable; no text ends early.

    Args:
        model: the dense model, on the device where it writes.
        prefixes: token ids, LongTensor (N, P).
        seq_len: T, tokens of a window with its prefix.
        count: n, windows that are returned, at most N.
        directory: for what this model writes behind these prefixes, at this length and with this
            seed; what lies there is taken.
        seed: of the draws; the global random state is left as it was.

    Returns:
        LongTensor (n, T) on the CPU.

    Raises:
        ValueError: if the model cannot read windows of this length, or does not fit on its device,
            so that every token would move its layers.
        OSError: if the windows cannot be kept.
    """
    batches = prefixes.split(max(1, _TOKENS_AT_ONCE // seq_len))
    parts, written = [], seq_len - prefixes.shape[1]
    with Bar("the model writes windows", len(batches) * written, unit="tokens each") as bar:
        for number, batch in enumerate(batches):
            file = directory / f"{number}.safetensors"
            part = _read(file)
            if part is None:
                _check_writing(model, batch, seq_len, directory)
                part = _written(model, batch, written, _seed_of(seed, number), bar)
                part = _keep(part, file)
            else:
                bar.update(written)
            parts.append(part)
    windows, nll = (torch.cat([part[name] for part in parts]) for name in ("windows", "nll"))
    best = nll.argsort(stable=True)[:count].sort().values
    return windows[best].long()


def _check_writing(model: PreTrainedModel, prefixes: Tensor, seq_len: int, directory: Path) -> None:
    if is_streamed(model):
        raise ValueError(
            f"calibration={_WORD!r}: the layers of this model go to the device one at a time, and "
            "would do so for each token it writes; calibrate on a text, or take a device that "
            "holds the model"
        )
    check_readable(model, prefixes[:1].repeat(1, seq_len)[:, :seq_len])
    try:
        check_writable(directory)
    except OSError as error:
        raise OSError(
            f"calibration={_WORD!r} keeps what the model writes in {directory}: {error}; set the "
            "environment variable HF_HOME to a directory that can be written"
        ) from error


def _read(file: Path) -> dict[str, Tensor] | None:
    """Return what was kept; None if it is not there, or damaged."""
    if not file.is_file():
        return None
    try:
        return load_file(file)
    except SafetensorError as error:
        log.warning("%s is damaged (%s): the model writes these windows again", file, error)
        file.unlink(missing_ok=True)
        return None


def _keep(part: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Keep what was written, and return it; or what another process kept before."""
    with explaining_write_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        remove_temporaries([file.parent])
        with atomic_creation(file) as temporary:
            save_file(part, temporary)
    return _read(file) or part


def _written(
    model: PreTrainedModel, prefixes: Tensor, count: int, seed: int, bar: Bar
) -> dict[str, Tensor]:
    """Return windows, int32 (N, T), and the mean nll of their tokens in nats, float64 (N,)."""
    ids = prefixes.to(model.device)
    with evaluating(model), _drawing_plainly(model), random_state_kept():
        torch.manual_seed(seed)
        windows = generate_tokens(model, ids, count, top_k=_TOP_K, streamer=_Counting(bar))
        rows = [next_token_sums(model(row).logits, row) for row in windows.split(1)]
    nll = torch.stack([nats / tokens for nats, _, tokens in rows])
    return {"windows": windows.int().cpu(), "nll": nll}


@contextmanager
def _drawing_plainly(model: PreTrainedModel) -> Iterator[None]:
    """Leave out what a model's own settings of generation change in its probabilities."""
    own: Any = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id)
    try:
        yield
    finally:
        model.generation_config = own


def _seed_of(seed: int, number: int) -> int:
    """Return a seed of each batch: of a seed torch's generator on CPUs reads 32 bits alone."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:4], "little")


class _Counting(BaseStreamer):
    """Counts tokens of a batch as they are written: first come the prompts, then one each."""

    def __init__(self, bar: Bar) -> None:
        self._bar, self._prompts_seen = bar, False

    def put(self, value: Tensor) -> None:
        """Take the prompts, or the next token of each row."""
        if self._prompts_seen:
            self._bar.update()
        self._prompts_seen = True

    def end(self) -> None:
        """Nothing is left to count."""
