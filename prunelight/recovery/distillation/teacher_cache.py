"""What the dense model says of the training set, on disk: its k most likely next tokens.

Written once per data set before the training, so that teacher and student are never in memory
together. A directory holds teacher.json, which says what it was made from, and a safetensors file
for every `BLOCK` training examples, with ids (M, k) and float16 log-probabilities (M, k + 1) of the
M tokens in them that count. A file appears by a rename: what is there is whole, what is not there
is made, by several processes if there are. Rows are found by their tokens, whatever the order, the
padding and the number of processes of the loader.
"""

# B sequences, T tokens, M tokens that count, k most likely ones

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from prunelight.calibration.shared_windows import MICRO_BATCH_TOKENS
from prunelight.losses import counted_targets, top_k
from prunelight.models.forward import evaluating
from prunelight.planning.fingerprints import fingerprint_of, library_versions
from prunelight.recovery.distillation.language_head import LanguageHead, without_adapters
from prunelight.recovery.packed_rows import model_inputs
from prunelight.runtime.atomic_files import remove_temporaries, replacing

log = logging.getLogger(__name__)

FORMAT = 1

DESCRIPTION = "teacher.json"

BLOCK = 64  # examples in a file

_CHUNK_TOKENS = 128  # whose logits are held at a time; fewer would read the head too often

# Called with places of training examples, returns them as one batch.
Batches: TypeAlias = Callable[[Sequence[int]], dict[str, Tensor]]


class TeacherCache:
    """The cache for one training set, whether it is there already or not.

    Args:
        directory: where it is or will be; None: beside `root`, under a name with its fingerprint.
        root: directory of the run.
        batches: gives the training examples.
        num_examples: how many there are.
        teacher: what identifies the teacher, JSON values.
        k: how many tokens are kept.
        temperature: at which probabilities are taken.
        vocabulary: number of ids.
    """

    def __init__(
        self,
        directory: str | Path | None,
        root: Path,
        batches: Batches,
        num_examples: int,
        *,
        teacher: Mapping[str, Any],
        k: int,
        temperature: float,
        vocabulary: int,
    ) -> None:
        self.batches, self.k, self.temperature = batches, k, temperature
        self.vocabulary = vocabulary
        self._place: dict[bytes, int] = {}  # key of an example's tokens -> its place
        self.lengths: list[int] = []  # tokens of each example
        counts: list[int] = []  # of them that count
        digest = hashlib.sha256()
        for place in range(num_examples):
            ((key, length, count),) = _rows(batches([place]))
            digest.update(key)
            self._place.setdefault(key, place)
            self.lengths.append(length)
            counts.append(count)
        self.ends = list(accumulate(counts))
        made_from = {
            "teacher": dict(teacher),
            "data": digest.hexdigest()[:16],
            "k": k,
            "temperature": temperature,
        }
        self.fingerprint = fingerprint_of(FORMAT, made_from)
        self.description = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            **made_from,
            "examples": num_examples,
            "tokens": self.ends[-1],
            "versions": library_versions(),
        }
        self.directory = Path(directory or root / f"teacher-{self.fingerprint}")

    @property
    def num_blocks(self) -> int:
        """Return how many files there are when it is complete."""
        return -(-len(self.lengths) // BLOCK)

    def open(self) -> None:
        """Make the directory, or check that what is there was made from the same.

        Raises:
            ValueError: if it was not, naming both fingerprints, if its format is newer, a file is
                damaged, or the disk is too small for what is missing.
        """
        file = self.directory / DESCRIPTION
        if file.exists():
            self._check(file)
        missing = self.missing()
        if not missing:
            log.info("reusing the teacher cache %s", self.directory)
            return
        remove_temporaries([self.directory])
        self.directory.mkdir(parents=True, exist_ok=True)
        size = self._bytes() * len(missing) / self.num_blocks
        free = shutil.disk_usage(self.directory).free
        told = f"{size / 1e6:.1f} MB for {self.ends[-1]} tokens, {free / 1e6:.1f} MB are free"
        log.info("teacher cache %s: %d files, %s", self.directory, len(missing), told)
        if size > free:
            raise ValueError(
                f"the teacher cache {self.directory} needs {told}; lower "
                f"distillation.k={self.k}, or set distillation.cache to another disk"
            )
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(self.description, indent=1) + "\n", encoding="utf-8")

    def _check(self, file: Path) -> None:
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            version, fingerprint = found["format"], found["fingerprint"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{file} is damaged ({error}); delete {self.directory}") from error
        if version != FORMAT:
            raise ValueError(
                f"{file} has format={version!r}, this version reads {FORMAT}; use the version of "
                "prunelight that wrote it, or another distillation.cache"
            )
        if fingerprint != self.fingerprint:
            names = ("teacher", "data", "k", "temperature")
            odd = [name for name in names if found.get(name) != self.description[name]]
            raise ValueError(
                f"the teacher cache {self.directory} has fingerprint {fingerprint}, this run needs "
                f"{self.fingerprint}: it differs in {', '.join(odd)} (data are the tokens of the "
                "training set); set distillation.cache to another directory, or leave it out"
            )

    def missing(self) -> list[int]:
        """Return which files are not there.

        Raises:
            ValueError: if one is damaged; names it.
        """
        missing = []
        for block in range(self.num_blocks):
            file = self._file(block)
            if not file.exists():
                missing.append(block)
                continue
            tokens = self._end(block) - self._start(block)
            with _opened(file) as tensors:
                shape = tensors.get_slice("ids").get_shape()
                made_for = (tensors.metadata() or {}).get("fingerprint")
            if shape != [tokens, self.k] or made_for != self.fingerprint:
                raise ValueError(
                    f"{file} holds ids of shape {shape} for {made_for}, not {[tokens, self.k]} for "
                    f"{self.fingerprint}; delete it, and the next run makes it again"
                )
        return missing

    @torch.no_grad()
    def write(self, teacher: Any, blocks: Sequence[int], *, progress: bool) -> None:
        """Write files.

        Args:
            teacher: the model, in eval mode.
            blocks: which ones.
            progress: show a bar.
        """
        head = LanguageHead(teacher)
        apart = head.runs_apart()
        with evaluating(without_adapters(teacher)):
            for block in tqdm(blocks, desc="teacher cache", disable=None if progress else True):
                parts = [
                    self._look_up(head, apart, self.batches(places))
                    for places in self._micro_batches(block)
                ]
                ids, log_probabilities = (torch.cat(part) for part in zip(*parts, strict=True))
                made = {"ids": ids.to(self._ids_dtype), "log_probabilities": log_probabilities}
                with replacing(self._file(block)) as temporary:
                    # One entry: several would be written in any order.
                    save_file(made, temporary, metadata={"fingerprint": self.fingerprint})

    def _micro_batches(self, block: int) -> Iterator[range]:
        first, last = block * BLOCK, min((block + 1) * BLOCK, len(self.lengths))
        size = max(1, MICRO_BATCH_TOKENS // max(self.lengths[first:last]))
        return (range(i, min(i + size, last)) for i in range(first, last, size))

    def _look_up(
        self, head: LanguageHead, apart: bool, batch: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Run the teacher on a batch; returns ids (M, k) and log-probabilities, on the CPU."""
        batch = {name: value.to(head.model.device) for name, value in batch.items()}
        inputs, (tokens, _) = model_inputs(batch), counted_targets(batch["labels"])
        states = head.hidden_states(inputs) if apart else head.model(**inputs).logits
        found = []
        for part in tokens.split(_CHUNK_TOKENS):
            chunk = states.flatten(0, 1)[part]
            logits = head.logits(chunk) if apart else chunk
            ids, log_probabilities = top_k(logits, self.k, self.temperature)
            found.append((ids.to(torch.int32).cpu(), log_probabilities.half().cpu()))
        ids, log_probabilities = (torch.cat(part) for part in zip(*found, strict=True))
        return ids, log_probabilities

    def targets(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return ids (M, k) and log-probabilities (M, k + 1) for the tokens of a batch that count.

        Raises:
            ValueError: if a row of the batch is no training example, or a file is damaged.
        """
        parts = []
        for key, _, count in _rows(batch):
            if key not in self._place:
                raise ValueError(
                    f"a row of the batch is not among the {len(self.lengths)} training examples "
                    f"of the teacher cache {self.directory}; data that changes from epoch to epoch "
                    "needs loss=kd"
                )
            place = self._place[key]
            block = place // BLOCK
            first = self.ends[place] - count - self._start(block)
            with _opened(self._file(block)) as tensors:
                names = ("ids", "log_probabilities")
                parts.append([tensors.get_slice(n)[first : first + count] for n in names])
        device = batch["labels"].device
        ids, log_probabilities = zip(*parts, strict=True)
        # Not every operation knows unsigned 16-bit whole numbers.
        joined = torch.cat([part.to(torch.int32) for part in ids])
        return joined.to(device), torch.cat(log_probabilities).to(device)

    @property
    def _ids_dtype(self) -> torch.dtype:
        return torch.uint16 if self.vocabulary <= 2**16 else torch.int32

    def _bytes(self) -> int:
        """Return the bytes of all files but their headers."""
        return self.ends[-1] * (self.k * self._ids_dtype.itemsize + 2 * (self.k + 1))

    def _file(self, block: int) -> Path:
        return self.directory / f"block-{block:06d}.safetensors"

    def _start(self, block: int) -> int:
        return self.ends[block * BLOCK - 1] if block else 0

    def _end(self, block: int) -> int:
        return self.ends[min((block + 1) * BLOCK, len(self.ends)) - 1]


def _rows(batch: Mapping[str, Tensor]) -> Iterator[tuple[bytes, int, int]]:
    """Yield for each row what identifies its tokens, how many they are, and how many count."""
    ids, labels = batch["input_ids"].cpu(), batch["labels"].cpu()
    mask = batch.get("attention_mask")
    kept = torch.ones_like(ids) if mask is None or mask.ndim != 2 else mask.cpu()
    for row, wanted, keep in zip(ids, labels, kept.bool(), strict=True):
        row, wanted = row[keep], wanted[keep]
        key = hashlib.sha256(row.numpy().tobytes() + wanted.numpy().tobytes()).digest()[:16]
        yield key, len(row), len(counted_targets(wanted[None])[0])


def _opened(file: Path) -> Any:
    """Open a file of the cache, memory-mapped.

    Raises:
        ValueError: if it is damaged; names it.
    """
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} is damaged ({error}); delete it, and the next run makes it again"
        ) from error
