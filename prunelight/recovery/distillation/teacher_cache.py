"""The teacher's k most likely next tokens for the training set, on disk.

The cache is written once per data set before the training, so that teacher and student are never
in memory together. Its directory holds teacher.json, which describes teacher and data. Each `BLOCK`
training examples have a safetensors file with ids (M, k) and float16 log-probabilities (M, k + 1)
of the M tokens that count. A rename puts each file in place, so that a file is complete or absent.
Processes share the writing of absent files. A row of a batch is looked up by its tokens, whatever
the order, the padding and the number of processes of the loader.
"""

# B sequences, T tokens, M tokens that count, k most likely ones

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from prunelight.calibration.shared_windows import MICRO_BATCH_TOKENS
from prunelight.losses import counted_targets, top_k
from prunelight.models.forward import evaluating
from prunelight.planning.fingerprints import fingerprint_of, library_versions
from prunelight.recovery.distillation.language_head import LanguageHead, without_adapters
from prunelight.recovery.packed_rows import model_inputs
from prunelight.runtime.atomic_files import atomic_replacement, remove_temporaries
from prunelight.runtime.checksums import CHECKSUM, sealed, unsealed
from prunelight.runtime.finite import check_tensors
from prunelight.runtime.progress import show_progress

log = logging.getLogger(__name__)

FORMAT = 1

DESCRIPTION = "teacher.json"

BLOCK = 64  # examples in a file

NO_CHECKSUM = "00000000"  # stands in a file while its checksum is computed

_CHUNK_TOKENS = 128  # tokens whose logits are held at a time; fewer read the head too often

# Indices of training examples -> one batch of these examples.
Batches: TypeAlias = Callable[[Sequence[int]], dict[str, Tensor]]


class TeacherCache:
    """The cache for one training set, whether its files exist already or not.

    Args:
        directory: directory of the cache; None: teacher-<fingerprint> in `root`.
        root: directory of the run.
        batches: returns training examples as one batch.
        num_examples: number of training examples.
        teacher: facts that identify the teacher, JSON values.
        k: number of most likely tokens that are kept.
        temperature: temperature of the probabilities.
        vocabulary: number of token ids.
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
        self._index: dict[bytes, int] = {}  # key of an example's tokens -> index of the example
        self.lengths: list[int] = []  # tokens of each example
        counts: list[int] = []  # tokens that count, of each example
        digest = hashlib.sha256()
        for index in range(num_examples):
            ((key, length, count),) = _rows(batches([index]))
            digest.update(key)
            self._index.setdefault(key, index)
            self.lengths.append(length)
            counts.append(count)
        self.ends = list(accumulate(counts))
        sources = {
            "teacher": dict(teacher),
            "data": digest.hexdigest()[:16],
            "k": k,
            "temperature": temperature,
        }
        self.fingerprint = fingerprint_of(FORMAT, sources)
        self.description = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            **sources,
            "examples": num_examples,
            "tokens": self.ends[-1],
            "versions": library_versions(),
        }
        self.directory = Path(directory or root / f"teacher-{self.fingerprint}")

    @property
    def num_blocks(self) -> int:
        """Return the number of safetensors files of a complete cache."""
        return -(-len(self.lengths) // BLOCK)

    def open(self) -> None:
        """Create the directory, or check that its files are for this teacher and data.

        Raises:
            ValueError: if the files are for another teacher or data (names both fingerprints), the
                format is newer, a file is damaged or holds NaN, or the disk is too small for
                missing files.
        """
        file = self.directory / DESCRIPTION
        if file.exists():
            self._check(file)
        missing = self.missing(whole=True)
        for block in set(range(self.num_blocks)) - set(missing):
            self._check_finite(block)
        if not missing:
            log.info("reusing the teacher cache %s", self.directory)
            return
        remove_temporaries([self.directory])
        self.directory.mkdir(parents=True, exist_ok=True)
        size = self._bytes() * len(missing) / self.num_blocks
        free = shutil.disk_usage(self.directory).free
        space = f"{size / 1e6:.1f} MB for {self.ends[-1]} tokens, {free / 1e6:.1f} MB are free"
        log.info("teacher cache %s: %d files, %s", self.directory, len(missing), space)
        if size > free:
            raise ValueError(
                f"the teacher cache {self.directory} needs {space}; lower "
                f"distillation.k={self.k}, or set distillation.cache to another disk"
            )
        with atomic_replacement(file) as temporary:
            temporary.write_text(sealed(self.description), encoding="utf-8")

    def _check_finite(self, block: int) -> None:
        """Check the probabilities of a file, in one pass; the training then finds them in memory.

        Raises:
            ValueError: if one is NaN or infinite; names the file.
        """
        with _open_tensors(self._file(block)) as tensors:
            name = "log_probabilities"
            check_tensors(
                [(name, tensors.get_tensor(name))],
                str(self._file(block)),
                "delete it, and the next run makes it again",
            )

    def _check(self, file: Path) -> None:
        try:
            text = file.read_text(encoding="utf-8")
            description = json.loads(text)
            version, fingerprint = description["format"], description["fingerprint"]
            if version == FORMAT:
                unsealed(text)
                if odd := description.keys() - {*self.description, CHECKSUM}:
                    raise ValueError(f"it has the key {min(odd)!r}")
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{file} is damaged ({error}); delete {self.directory}") from error
        if version != FORMAT:
            raise ValueError(
                f"{file} has format={version!r}, this version reads {FORMAT}; use the version of "
                "prunelight that wrote it, or another distillation.cache"
            )
        if fingerprint != self.fingerprint:
            names = ("teacher", "data", "k", "temperature")
            differing = [name for name in names if description.get(name) != self.description[name]]
            raise ValueError(
                f"the teacher cache {self.directory} has fingerprint {fingerprint}, this run needs "
                f"{self.fingerprint}: it differs in {', '.join(differing)} (data are the tokens of "
                "the training set); set distillation.cache to another directory, or leave it out"
            )

    def missing(self, *, whole: bool = False) -> list[int]:
        """Return the indices of the files that do not exist yet.

        Args:
            whole: read the files and check all their bytes.

        Raises:
            ValueError: if a file is damaged; names the file.
        """
        missing = []
        for block in range(self.num_blocks):
            file = self._file(block)
            if not file.exists():
                missing.append(block)
                continue
            tokens = self._end(block) - self._start(block)
            shape, seal = _read_header(file)
            fingerprint = seal.partition(" ")[0]
            if whole:
                self._check_seal(file, seal, block)
            if shape != [tokens, self.k] or fingerprint != self.fingerprint:
                raise ValueError(
                    f"{file} holds ids of shape {shape} for {fingerprint}, not {[tokens, self.k]} "
                    f"for {self.fingerprint}; delete it, and the next run makes it again"
                )
        return missing

    def _seal(self, block: int) -> str:
        """Return what is written into a file: whose it is, which one, and room for its checksum."""
        return f"{self.fingerprint} file {block} crc32 {NO_CHECKSUM}"

    def _check_seal(self, file: Path, seal: str, block: int) -> None:
        """Check that a file is the one of its name; one of an older version has no checksum.

        Raises:
            ValueError: if not; names the file.
        """
        if seal == self.fingerprint:
            return
        mine = self._seal(block).removesuffix(NO_CHECKSUM)
        told, checksum = seal[: len(mine)], seal[len(mine) :]
        if told != mine and told.partition(" ")[0] == self.fingerprint:
            raise _damaged(file, "it is another file of this cache")
        if told == mine and checksum_without(file.read_bytes(), seal, checksum) != checksum:
            raise _damaged(file, "its bytes are not those that were written")

    @torch.no_grad()
    def write(self, teacher: Any, blocks: Sequence[int], *, progress: bool) -> None:
        """Run the teacher on training examples and write its probabilities.

        Args:
            teacher: the model, in eval mode.
            blocks: indices of the files to write.
            progress: show a progress bar.
        """
        head = LanguageHead(teacher)
        separable = head.is_separable()
        with evaluating(without_adapters(teacher)):
            shown = show_progress(blocks, "teacher cache", unit="files", quiet=not progress)
            for block in shown:
                parts = [
                    self._top_k(head, separable, self.batches(indices))
                    for indices in self._micro_batches(block)
                ]
                ids, log_probabilities = (torch.cat(part) for part in zip(*parts, strict=True))
                check_tensors(
                    [("log_probabilities", log_probabilities)],
                    f"what the teacher says of training examples from {block * BLOCK}",
                    "hold it in bfloat16 or float32 if float16 is too narrow for it",
                )
                tensors = {"ids": ids.to(self._ids_dtype), "log_probabilities": log_probabilities}
                with atomic_replacement(self._file(block)) as temporary:
                    temporary.write_bytes(sealed_tensors(tensors, self._seal(block)))

    def _micro_batches(self, block: int) -> Iterator[range]:
        first, last = block * BLOCK, min((block + 1) * BLOCK, len(self.lengths))
        size = max(1, MICRO_BATCH_TOKENS // max(self.lengths[first:last]))
        return (range(i, min(i + size, last)) for i in range(first, last, size))

    def _top_k(
        self, head: LanguageHead, separable: bool, batch: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Run the teacher on a batch; returns ids (M, k) and log-probabilities, on the CPU."""
        batch = {name: value.to(head.model.device) for name, value in batch.items()}
        inputs, (tokens, _) = model_inputs(batch), counted_targets(batch["labels"])
        states = head.hidden_states(inputs) if separable else head.model(**inputs).logits
        chunks = []
        for part in tokens.split(_CHUNK_TOKENS):
            selected = states.flatten(0, 1)[part]
            logits = head.logits(selected) if separable else selected
            ids, log_probabilities = top_k(logits, self.k, self.temperature)
            chunks.append((ids.to(torch.int32).cpu(), log_probabilities.half().cpu()))
        ids, log_probabilities = (torch.cat(part) for part in zip(*chunks, strict=True))
        return ids, log_probabilities

    def targets(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return ids (M, k) and log-probabilities (M, k + 1) for the tokens of a batch that count.

        Raises:
            ValueError: if a row of the batch is not among the training examples, or a file is
                damaged.
        """
        parts = []
        for key, _, count in _rows(batch):
            if key not in self._index:
                raise ValueError(
                    f"a row of the batch is not among the {len(self.lengths)} training examples "
                    f"of the teacher cache {self.directory}; data that changes from epoch to epoch "
                    "needs loss=kd"
                )
            index = self._index[key]
            block = index // BLOCK
            first = self.ends[index] - count - self._start(block)
            with _open_tensors(self._file(block)) as tensors:
                names = ("ids", "log_probabilities")
                parts.append([tensors.get_slice(n)[first : first + count] for n in names])
        device = batch["labels"].device
        ids, log_probabilities = zip(*parts, strict=True)
        # Not every operation of torch supports uint16.
        all_ids = torch.cat([part.to(torch.int32) for part in ids])
        return all_ids.to(device), torch.cat(log_probabilities).to(device)

    @property
    def _ids_dtype(self) -> torch.dtype:
        return torch.uint16 if self.vocabulary <= 2**16 else torch.int32

    def _bytes(self) -> int:
        """Return the bytes of all files without their headers."""
        return self.ends[-1] * (self.k * self._ids_dtype.itemsize + 2 * (self.k + 1))

    def _file(self, block: int) -> Path:
        return self.directory / f"block-{block:06d}.safetensors"

    def _start(self, block: int) -> int:
        return self.ends[block * BLOCK - 1] if block else 0

    def _end(self, block: int) -> int:
        return self.ends[min((block + 1) * BLOCK, len(self.ends)) - 1]


def _rows(batch: Mapping[str, Tensor]) -> Iterator[tuple[bytes, int, int]]:
    """Yield for each row: a key of its tokens and labels, number of tokens, number that count."""
    ids, labels = batch["input_ids"].cpu(), batch["labels"].cpu()
    mask = batch.get("attention_mask")
    is_token = torch.ones_like(ids) if mask is None or mask.ndim != 2 else mask.cpu()
    for row, row_labels, keep in zip(ids, labels, is_token.bool(), strict=True):
        row, row_labels = row[keep], row_labels[keep]
        key = hashlib.sha256(row.numpy().tobytes() + row_labels.numpy().tobytes()).digest()[:16]
        yield key, len(row), len(counted_targets(row_labels[None])[0])


def _open_tensors(file: Path) -> Any:
    """Open a file of the cache, memory-mapped.

    Raises:
        ValueError: if the file is damaged; names the file.
    """
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise _damaged(file, str(error)) from error


def _read_header(file: Path) -> tuple[list[int], str]:
    """Return the shape of the ids in a file, and its metadata.

    Raises:
        ValueError: if the file is damaged; names the file.
    """
    with _open_tensors(file) as tensors:
        try:
            shape = tensors.get_slice("ids").get_shape()
        except SafetensorError as error:
            raise _damaged(file, str(error)) from error
        return shape, (tensors.metadata() or {}).get("fingerprint", "")


def _damaged(file: Path, reason: str) -> ValueError:
    return ValueError(f"{file} is damaged ({reason}); delete it, and the next run makes it again")


def sealed_tensors(tensors: dict[str, Tensor], seal: str) -> bytes:
    """Return a safetensors file whose metadata hold the checksum of all its other bytes.

    Args:
        tensors: of the file.
        seal: the metadata, which end with `NO_CHECKSUM`.
    """
    # One entry of metadata: safetensors writes several in no fixed order.
    data = save(tensors, metadata={"fingerprint": seal})
    checksum = f"{zlib.crc32(data):08x}"
    return data.replace(
        seal.encode(), seal.removesuffix(NO_CHECKSUM).encode() + checksum.encode(), 1
    )


def checksum_without(data: bytes, seal: str, checksum: str) -> str:
    """Return the checksum of a file as it was before its checksum was written into the seal."""
    blank = seal.removesuffix(checksum) + NO_CHECKSUM
    return f"{zlib.crc32(data.replace(seal.encode(), blank.encode(), 1)):08x}"
