"""How checkpoints come to disk: whole or not at all, at once or by a thread.

`AtomicCheckpointIO` takes the place of Lightning's own CheckpointIO, `BackgroundCheckpointIO` that
of its AsyncCheckpointIO. A trainer that was given another one keeps it.
"""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import Tensor

from prunelight.runtime.files.atomic_files import (
    atomic_replacement,
    explaining_write_errors,
    newest_checkpoint,
    remove_temporaries,
)
from prunelight.runtime.files.checkpoint_files import read_checkpoint
from prunelight.runtime.files.checksums import ChecksumWriter
from prunelight.runtime.measuring import Phases
from prunelight.training.resuming.kept_checkpoints import (
    DelayedRemovals,
    directory_of,
    find_resume_point,
    keepers,
)

log = logging.getLogger(__name__)

WRITING = "write checkpoints"  # a phase


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written whole or not at all, and read without unpickling.

    Args:
        phases: of the run, to which the time for checkpoints is added.

    Attributes:
        removals: where removed files wait until the resume point is written; None: at once.
    """

    removals: DelayedRemovals | None = None

    def __init__(self, phases: Phases | None = None) -> None:
        self.phases = phases or Phases()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write beside the final name, flush to disk, rename.

        Raises:
            OSError: if it cannot be written; names the reason and the checkpoint that is intact.
        """
        if "://" in str(path):  # not a file of this machine
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with self.phases.phase(WRITING):
            self._save(checkpoint, Path(path))
        if self.removals is not None:
            self.removals.keep(path)

    def _save(self, checkpoint: dict[str, Any], path: Path) -> None:
        write_checkpoint(checkpoint, path)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a file, once the resume point does not name it."""
        if self.removals is None or "://" in str(path):
            super().remove_checkpoint(path)
        else:
            self.removals.add(path)

    def carry_out_removals(self) -> None:
        """Remove the files that wait for it: the resume point is written."""
        if self.removals is not None:
            remove_files(self.removals.taken())

    def finish(self) -> None:
        """Wait until all is on disk that was given to be written; here it is.

        Raises:
            OSError: if something could not be written.
        """

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read tensors and plain data, whatever `weights_only` is; see `read_checkpoint`."""
        self.finish()
        with self.phases.phase("read a checkpoint"):
            return read_checkpoint(path, map_location)


class BackgroundCheckpointIO(AtomicCheckpointIO):
    """The same by a thread, while the training goes on: one file after another, in order.

    The training waits for a copy of the tensors in the memory of the host, and for the write before
    this one. Files are removed by the same thread, so never before what replaces them is on disk,
    and not at all where that could not be written.
    """

    def __init__(self, phases: Phases | None = None) -> None:
        super().__init__(phases)
        self._thread: ThreadPoolExecutor | None = None
        self._work: list[Future[None]] = []

    def _save(self, checkpoint: dict[str, Any], path: Path) -> None:
        self.finish()  # two copies at most: of what is written, and the training's own
        self._do(write_checkpoint, _copied_to_host(checkpoint), path)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a file once the resume point does not name it, after what is to be written."""
        if self.removals is None and "://" not in str(path):
            self._remove([str(path)])
        else:
            super().remove_checkpoint(path)

    def carry_out_removals(self) -> None:
        """Remove the files that wait for it, after the resume point is on disk."""
        if self.removals is not None and (paths := self.removals.taken()):
            self._remove(paths)

    def _remove(self, paths: list[str]) -> None:
        before = [*self._work]

        def remove() -> None:
            if all(work.exception() is None for work in before):
                remove_files(paths)

        self._do(remove)

    def _do(self, work: Callable[..., None], *arguments: Any) -> None:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="prunelight checkpoints")
        self._work.append(self._thread.submit(work, *arguments))

    def finish(self) -> None:
        """Wait until all is on disk.

        Raises:
            OSError: if something could not be written: the first error, and once.
        """
        work, self._work = self._work, []
        faults = [fault for one in work if (fault := one.exception()) is not None]
        for fault in faults[:1]:
            raise fault

    def teardown(self) -> None:
        """Finish, and end the thread."""
        try:
            self.finish()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
                self._thread = None


def write_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint with its checksum, whole or not at all.

    Raises:
        OSError: if it cannot be written; names the reason and the checkpoint that is intact.
    """
    with explaining_write_errors(path, newest_checkpoint(path.parent)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_replacement(path) as temporary, temporary.open("wb") as file:
            writer: Any = ChecksumWriter(file)
            torch.save(checkpoint, writer)
            writer.end()


def remove_files(paths: list[str]) -> None:
    """Remove files, links, or directories of Lightning's, that may be gone already."""
    for path in map(Path, paths):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _copied_to_host(value: Any) -> Any:
    """Return a copy of tensors, however deep they lie in dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        copied = copy.copy(value)  # of its own class, which Lightning has for arguments
        copied.update({key: _copied_to_host(each) for key, each in value.items()})
        return copied
    if type(value) in (list, tuple):
        return type(value)(_copied_to_host(each) for each in value)
    return value


def use_safe_files(trainer: Trainer) -> None:
    """Let a trainer write checkpoints whole or not at all, and read them without running code.

    A trainer that was given its own way of writing keeps it; Lightning's asynchronous one becomes
    ours.
    """
    strategy = trainer.strategy
    files = strategy.checkpoint_io
    if type(files) is TorchCheckpointIO:
        strategy.checkpoint_io = AtomicCheckpointIO()
    elif type(files) is AsyncCheckpointIO and _is_plain(files.checkpoint_io):
        strategy.checkpoint_io = BackgroundCheckpointIO()


def _is_plain(files: Any) -> bool:
    """Return whether what AsyncCheckpointIO writes by is Lightning's own, or not set yet."""
    return files is None or type(files) in (TorchCheckpointIO, AtomicCheckpointIO)


def write_atomically(trainer: Trainer, phases: Phases) -> None:
    """Let a trainer write checkpoints whole or not at all, unless it was given its own way.

    Also removes what a killed process left half-written.
    """
    use_safe_files(trainer)
    files = trainer.strategy.checkpoint_io
    if isinstance(files, AtomicCheckpointIO):
        files.phases = phases
        files.removals = DelayedRemovals() if find_resume_point(trainer) else None
    if trainer.is_global_zero:
        root = Path(trainer.default_root_dir)
        kept = {Path(str(keeper.dirpath)) for keeper in keepers(trainer)}
        remove_temporaries({root, directory_of(trainer), *root.glob("pruned-*"), *kept})


def removals_of(trainer: Trainer) -> DelayedRemovals | None:
    """Return the files that wait to be removed; None where they are removed at once."""
    files = trainer.strategy.checkpoint_io
    return files.removals if isinstance(files, AtomicCheckpointIO) else None


def carry_out_removals(trainer: Trainer) -> None:
    """Remove the files that wait for the resume point, which is written or will be before."""
    files = trainer.strategy.checkpoint_io
    if trainer.is_global_zero and isinstance(files, AtomicCheckpointIO):
        files.carry_out_removals()


def finish_writing(trainer: Trainer) -> None:
    """Wait until all checkpoints of this process are on disk.

    Raises:
        OSError: if one could not be written.
    """
    files = trainer.strategy.checkpoint_io
    if isinstance(files, AtomicCheckpointIO):
        files.finish()


def end_writing(trainer: Trainer) -> None:
    """Wait until all checkpoints of this process are on disk, where a run has ended by an error.

    A write that failed is told, so that it does not take that error's place.
    """
    try:
        finish_writing(trainer)
    except OSError as error:
        log.error("%s", error)
