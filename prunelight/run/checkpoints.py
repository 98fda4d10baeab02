"""Whether a checkpoint fits the run that loads it: same base, same training, same parameters."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FORMAT = 1  # of what a RecoveryModule keeps in a checkpoint

KEY = "prunelight"  # of a checkpoint, under which a RecoveryModule keeps what it says of itself


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Say what can be done where a checkpoint cannot be read.

    Raises:
        ValueError: if the file is damaged or holds other objects.
    """
    try:
        yield
    except (RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise ValueError(
            f"checkpoint {path} is damaged, or holds other objects than tensors and plain data "
            f"({reason}); delete it to start the recovery anew from the pruned base, or give "
            "another one as ckpt_path"
        ) from error


def read_metadata(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the module that wrote a checkpoint said of itself.

    Raises:
        ValueError: if another module or a newer version wrote it.
    """
    if KEY not in checkpoint:
        raise ValueError(f"the checkpoint has no key {KEY!r}: it is not from this module")
    check_format("the checkpoint", checkpoint[KEY].get("format", FORMAT), FORMAT)
    earlier = {"zeros": "not kept", "masks": None, "quantization": "none"}  # before version 0.2
    return {**earlier, **checkpoint[KEY]}


def check_format(what: str, found: Any, known: int) -> None:
    """Check that this version can read a file.

    Raises:
        ValueError: if a newer one wrote it.
    """
    if not isinstance(found, int) or found > known:
        raise ValueError(
            f"{what} has format={found!r}, written by a newer prunelight; this one reads up to "
            f"{known}: use the version that wrote it, or another trainer.default_root_dir"
        )


def check_same_run(saved: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Check that a checkpoint was trained on our base, in our way.

    Raises:
        ValueError: if not; names both.
    """
    if any(saved[key] != ours[key] for key in ("fingerprint", "recovery", "zeros", "quantization")):
        raise ValueError(
            f"the checkpoint was trained by {_describe(saved)}, this run trains by "
            f"{_describe(ours)}; use the arguments of that run, or start without ckpt_path"
        )


def check_same_settings(
    saved: Mapping[str, Any], ours: Mapping[str, Any], path: str | Path | None
) -> None:
    """Check that a run goes on with the settings that it began with.

    Raises:
        ValueError: if not; names each on both sides, and the checkpoint.
    """
    odd = sorted(k for k in {*saved, *ours} if saved.get(k) != ours.get(k))
    if odd:
        then, now = (", ".join(f"{k}={run.get(k)}" for k in odd) for run in (saved, ours))
        raise ValueError(
            f"{path} was written by a run with {then}, this one has {now}: going on would give "
            "neither result. Take the settings of that run, or start anew with another "
            "trainer.default_root_dir or ckpt_path=null"
        )


def _describe(run: Mapping[str, Any]) -> str:
    return (
        f"{run['recovery']} with quantization {run['quantization']} on base {run['fingerprint']} "
        f"({run['base']}) with zeros {run['zeros']}"
    )


def check_same_parameters(saved: Mapping[str, Any], trained: Mapping[str, Any]) -> None:
    """Check that a checkpoint holds the trained parameters, and no other, in their shapes.

    Raises:
        ValueError: if not; names one.
    """
    then, now = ({k: tuple(p.shape) for k, p in side.items()} for side in (saved, trained))
    odd = sorted(k for k in {*then, *now} if then.get(k) != now.get(k))
    if odd:
        raise ValueError(
            f"{len(odd)} trained parameters do not fit, e.g. {odd[0]}: {then.get(odd[0])} in the "
            f"checkpoint, {now.get(odd[0])} in this run; the LoRA settings must be those of the "
            "run that wrote it"
        )
