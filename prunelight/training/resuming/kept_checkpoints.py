"""The checkpoints that ModelCheckpoints keep, over any number of kills and resumes.

A run is resumed from one file, the resume point. Other ModelCheckpoints keep best or regular
checkpoints beside it. Lightning alone forgets their scores when a resumed run writes into another
directory, and their counters always. Here every one has a directory that stays, its whole state is
in the resume point, and a file that the resume point still names is not removed before the next.

Private names of Lightning used here: the counters of ModelCheckpoint in `_COUNTERS`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from prunelight.runtime.files.checksums import check_checkpoint_file

log = logging.getLogger(__name__)

DIRECTORY = "checkpoints"  # in the directory of a run

# What a ModelCheckpoint knows and does not keep in its own state.
_COUNTERS = (
    "current_score",
    "_last_global_step_saved",
    "_last_checkpoint_saved",
    "_defer_save_until_validation",
)


class ResumePoint(ModelCheckpoint):
    """A ModelCheckpoint that writes the one file from which a run is resumed."""

    def find(self, trainer: Trainer) -> Path | None:
        """Return the file, if there is one already."""
        self.dirpath = self.dirpath or str(directory_of(trainer))
        file = Path(self.dirpath, f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}")
        return file if file.is_file() else None


def check_resume_point(trainer: Trainer, is_ours: Callable[[Path], bool]) -> None:
    """Check that the resume point replaces no file of others.

    Args:
        trainer: of the run.
        is_ours: whether a file is a whole checkpoint of a run of prunelight.

    Raises:
        FileExistsError: if it would.
    """
    file = resume_file(trainer)
    if file and not is_ours(file):
        raise FileExistsError(
            f"{file} is damaged, or no checkpoint of prunelight, and the run would write there; "
            "move or delete it, or set trainer.default_root_dir to a directory of its own"
        )


def retire_resume_point(trainer: Trainer) -> None:
    """Give the resume point of an earlier run another name, where this run starts anew.

    It tells of files that this run writes over: nothing may go on from it by itself.
    """
    file = resume_file(trainer)
    if file:
        earlier = file.with_name(f"{file.stem}-earlier{file.suffix}")
        file.replace(earlier)
        log.info("starting anew: the last checkpoint of the earlier run is now %s", earlier)


def directory_of(trainer: Trainer) -> Path:
    """Return where the checkpoints of a run are, unless a ModelCheckpoint names a directory."""
    return Path(trainer.default_root_dir).resolve() / DIRECTORY


def find_resume_point(trainer: Trainer) -> ResumePoint | None:
    """Return the callback that writes the file from which a run is resumed."""
    points = [point for point in trainer.checkpoint_callbacks if isinstance(point, ResumePoint)]
    return points[0] if points else None


def resume_file(trainer: Trainer) -> Path | None:
    """Return the file from which a run can be resumed, if there is one already."""
    point = find_resume_point(trainer)
    return None if point is None else point.find(trainer)


def keepers(trainer: Trainer) -> list[ModelCheckpoint]:
    """Return the ModelCheckpoints that keep files beside the resume point."""
    saving = [saver for saver in trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint)]
    return [saver for saver in saving if not isinstance(saver, ResumePoint)]


def settle(trainer: Trainer) -> None:
    """Give every ModelCheckpoint a directory and names that stay the same after a resume, in place.

    Raises:
        ValueError: if one would write over the file from which the run is resumed.
    """
    point = find_resume_point(trainer)
    reserved = None
    if point is not None:
        point.dirpath = point.dirpath or str(directory_of(trainer))
        reserved = Path(point.dirpath).resolve()
    for keeper in keepers(trainer):
        if keeper.dirpath is None:
            keeper.dirpath = str(directory_of(trainer))
        if reserved is None or Path(keeper.dirpath).resolve() != reserved:
            continue
        last = ModelCheckpoint.CHECKPOINT_NAME_LAST
        if keeper.filename == last:
            raise ValueError(
                f"ModelCheckpoint(filename={last!r}) would write over {reserved}/{last}.ckpt, from "
                "which the run is resumed; take another filename or dirpath"
            )
        if keeper.save_last and last == keeper.CHECKPOINT_NAME_LAST:
            monitor = str(keeper.monitor or "unmonitored").replace("/", "-")
            keeper.CHECKPOINT_NAME_LAST = f"{last}-{monitor}"
            log.info(
                "save_last writes %s.ckpt: the run is resumed from %s.ckpt",
                keeper.CHECKPOINT_NAME_LAST,
                last,
            )


def reuse_own_files(
    trainer: Trainer, is_ours: Callable[[Path], bool], finish: Callable[[], None]
) -> None:
    """Let ModelCheckpoints write over what this run wrote before it was killed, in place.

    A killed run may leave files that its resume point does not know. Lightning would keep them and
    give the same checkpoint another name.

    Args:
        trainer: of the run.
        is_ours: whether a checkpoint on disk is of this run.
        finish: waits until all that this process writes is on disk.
    """
    for keeper in keepers(trainer):
        exists = type(keeper).file_exists.__get__(keeper)
        vars(keeper)["file_exists"] = partial(_is_taken, exists, is_ours, finish)


def _is_taken(
    exists: Callable[[Any, Trainer], bool],
    is_ours: Callable[[Path], bool],
    finish: Callable[[], None],
    path: Any,
    trainer: Trainer,
) -> bool:
    """Return, on all processes, whether a name is that of a file that must stay."""
    finish()
    if not exists(path, trainer):
        return False
    known = any(str(path) in _files(keeper) for keeper in keepers(trainer))
    left = trainer.is_global_zero and not known and is_ours(Path(path))
    return not trainer.strategy.reduce_boolean_decision(left, all=False)


def _files(keeper: ModelCheckpoint) -> set[str]:
    """Return the files that a ModelCheckpoint knows as its own."""
    single = (keeper.best_model_path, keeper.last_model_path, keeper._last_checkpoint_saved)
    return {str(path) for path in (*keeper.best_k_models, *single) if path}


# --- what the resume point holds -------------------------------------------------------------


def counters(trainer: Trainer) -> dict[str, dict[str, Any]]:
    """Return what the ModelCheckpoints know and Lightning does not keep, by state key."""
    return {
        keeper.state_key: {name: getattr(keeper, name) for name in _COUNTERS}
        for keeper in keepers(trainer)
    }


def take_over(trainer: Trainer, checkpoint: dict[str, Any], saved: Mapping[str, Any]) -> None:
    """Let ModelCheckpoints go on with the files of the run that wrote a checkpoint, in place.

    Its directory may be elsewhere by now. A best checkpoint that is gone is told.

    Args:
        trainer: of the run.
        checkpoint: whose "callbacks" Lightning loads afterwards.
        saved: what `counters` returned.
    """
    states = checkpoint.get("callbacks", {})
    for keeper in keepers(trainer):
        state = states.get(keeper.state_key)
        if state is None:
            continue
        move = partial(_moved, state.get("dirpath"), keeper.dirpath)
        states[keeper.state_key] = _present(keeper, state, move)
        for name, value in saved.get(keeper.state_key, {}).items():
            if name in _COUNTERS:
                setattr(keeper, name, move(value) if isinstance(value, str) else value)


def _moved(old: Any, new: Any, path: str) -> str:
    """Return where a file is that was in the directory `old`, if `new` has it now."""
    if not path or old is None or new is None or not Path(path).is_relative_to(old):
        return path
    moved = Path(new) / Path(path).relative_to(old)
    return str(moved) if moved.exists() or not Path(path).exists() else path


def _present(
    keeper: ModelCheckpoint, state: Mapping[str, Any], move: Callable[[str], str]
) -> dict[str, Any]:
    """Return the state of a ModelCheckpoint with the files that are there."""
    best = {move(path): score for path, score in state["best_k_models"].items()}
    for path in best:
        check_kept(path, keeper)
    there = {path: score for path, score in best.items() if Path(path).exists()}
    moved = {
        **state,
        "dirpath": keeper.dirpath,
        "best_model_path": move(state["best_model_path"]),
        "last_model_path": move(state["last_model_path"]),
        "kth_best_model_path": move(state["kth_best_model_path"]),
        "best_k_models": there,
    }
    if len(there) == len(best):
        return moved
    gone = sorted(set(best) - set(there))
    log.warning(
        "%s is gone, which was kept for %s: final/ can only be the best of what is left and of "
        "what follows",
        ", ".join(gone),
        keeper.monitor,
    )
    order = sorted(there, key=lambda path: float(there[path]), reverse=keeper.mode == "max")
    return {
        **moved,
        "best_model_path": order[0] if order else "",
        "best_model_score": there[order[0]] if order else None,
        "kth_best_model_path": order[-1] if order else "",
        "kth_value": there[order[-1]] if order else torch.tensor(_worst(keeper)),
    }


def check_kept(path: str, keeper: ModelCheckpoint) -> None:
    """Check that a file that is kept for its score holds the bytes that were written.

    Raises:
        ValueError: if it is damaged.
    """
    file = Path(path)
    try:
        if file.is_file():
            check_checkpoint_file(file)
    except ValueError as error:
        raise ValueError(
            f"{file}, which is kept for {keeper.monitor}, is damaged ({error}); put a whole copy "
            "there, or delete it to end with the best of what is left and of what follows"
        ) from error


def _worst(keeper: ModelCheckpoint) -> float:
    return float("-inf") if keeper.mode == "max" else float("inf")


# --- removing what is not needed any more ----------------------------------------------------


class DelayedRemovals:
    """Files that may be removed once the resume point does not name them any more."""

    def __init__(self) -> None:
        self.waiting: list[str] = []

    def add(self, path: Any) -> None:
        """Remove a file later."""
        if str(path) not in self.waiting:
            self.waiting.append(str(path))

    def keep(self, path: Any) -> None:
        """Do not remove a file that is written again."""
        self.waiting = [other for other in self.waiting if other != str(path)]

    def taken(self) -> list[str]:
        """Return the files, to be removed now; none waits any more."""
        paths, self.waiting = self.waiting, []
        return paths

    def take_over(self, paths: Iterable[str], trainer: Trainer) -> None:
        """Go on with what an earlier start had no time to remove."""
        roots = {Path(str(keeper.dirpath)) for keeper in keepers(trainer)}
        for path in paths:
            if roots.intersection(Path(path).parents):
                self.add(path)
